"""Starts commands as forks of one process that has imported what they need: a start takes milliseconds, not seconds.

`python forks.py FOLDER` is that process. The `bridgetower`, `torchrun` and `python` that it writes to FOLDER start
there what they are called with, in their folder, with their environment and standard streams. They pass signals on and
end as it ends; if they are killed, so is it. The processes of `torchrun` are such forks too.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from preloaded import preload

# What starts threads, which a fork loses, is left out: LanceDB and the runtimes of exported graphs.
OTHERS = (
    "bridgetower.predictor",
    "bridgetower.reports.errors",
    "bridgetower_demo.toysets",
    "bridgetower.serve.app",
    "torch.distributed.run",
)
NAMES = ("bridgetower", "torchrun", "python")
MOST_BYTES = 1 << 20

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({address!r})
request = dict(command=sys.argv, folder=os.getcwd(), environment=dict(os.environ))
socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
process = int(connection.recv(100))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(process, number))
code = int(connection.recv(100))
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def commands(folder: Path) -> Iterator[None]:
    """Makes the names in a folder such commands."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # forks keep the number of threads
    with subprocess.Popen([sys.executable, __file__, folder], stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline()
            yield
        finally:
            server.terminate()


def main(folder: Path) -> None:
    """Waits for commands; returns in the process of each of them, once it has the state of one."""
    sys.path.append(str(Path(__file__).parents[1] / "demo"))
    preload(*OTHERS)
    gc.freeze()
    address = str(folder / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        for name in NAMES:
            (folder / name).write_text(CLIENT.format(python=sys.executable, address=address))
            (folder / name).chmod(0o755)
        os.write(1, b"ready\n")
        watchers = []
        while True:
            connection, _ = listener.accept()
            watchers = [watcher for watcher in watchers if os.waitpid(watcher, os.WNOHANG) == (0, 0)]
            watcher = os.fork()
            if not watcher:
                break
            watchers.append(watcher)
            connection.close()
    watch(connection)


def watch(connection: socket.socket) -> None:
    """Starts the command of a request and ends with it; returns in the process of the command."""
    content, streams, _, _ = socket.recv_fds(connection, MOST_BYTES, 3)
    process = os.fork()
    if process:
        connection.send(str(process).encode())
        for stream in (0, 1, 2, *streams):
            os.close(stream)
        ended = os.pidfd_open(process)
        alone = ended not in select.select([connection, ended], [], [])[0]  # whoever asked for it was killed
        if alone:
            os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if not alone:
            connection.send(str(code).encode())
        os._exit(0)
    connection.close()
    request = json.loads(content)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ["PYTHON_EXEC"] = str(Path(request["command"][0]).with_name("python"))  # what torchrun starts
    sys.argv = request["command"]


def run() -> None:
    """Runs the command in `sys.argv` as Python would."""
    name, *arguments = sys.argv
    modules = {"bridgetower": "bridgetower", "torchrun": "torch.distributed.run"}
    if module := modules.get(Path(name).name):
        arguments = ["-m", module, *arguments]
    elif arguments[0] == "-u":  # as torchrun calls Python
        arguments = arguments[1:]
    option, value, *rest = arguments if arguments[0] in ("-c", "-m") else ["", *arguments]
    sys.path[0] = str(Path(value).parent) if not option else ""
    sys.argv = [option or value, *rest]
    if option == "-c":
        exec(value, {"__name__": "__main__"})
    elif option == "-m":
        runpy.run_module(value, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(value, run_name="__main__")


def end(error: BaseException | None) -> NoReturn:
    """Ends the process as Python would after an error or none, but frees nothing, which takes longer than the fork."""
    code: Any = 0
    if isinstance(error, SystemExit):
        code = error.code
        if code is not None and not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
            code = 1
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    try:
        run()
    except BaseException as error:  # noqa: BLE001 - its process ends with it
        end(error)
    end(None)
