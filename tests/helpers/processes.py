"""Processes of tests: commands that start at once, and processes that end at a chosen event."""

import atexit
import fnmatch
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import forkserver, get_context, parent_process, process
from pathlib import Path

# What starts threads, which a fork loses, is left out: the runtimes of exported graphs.
COMMAND_MODULES = (
    *(
        f"bridgetower.{name}"
        for name in ("inference.predictor", "reports.errors", "search.searcher", "serve.app")
    ),
    "torch.distributed.run",
)
COMMAND_NAMES = ("bridgetower", "torchrun", "python")
LENDER_FIELDS = (
    "_forkserver_address",
    "_forkserver_authkey",
)  # what tells where processes are lent
MAX_REQUEST_BYTES = 1 << 20

CLIENT_SCRIPT = """#!{python} -IS
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({address!r})
request = dict(command=sys.argv, folder=os.getcwd(), environment=dict(os.environ))
socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
process = int(connection.recv(100))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(process, number))
code = int(connection.recv(100))
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def forked_commands(folder):
    """Makes the names in a folder such commands."""
    address = folder / "socket"
    for name in COMMAND_NAMES:
        (folder / name).write_text(
            CLIENT_SCRIPT.format(python=sys.executable, address=str(address))
        )
        (folder / name).chmod(0o755)
    context = get_context("forkserver")
    is_ready, ready = context.Pipe(duplex=False)
    forkserver.ensure_running()
    lender = {
        name: value for name, value in vars(forkserver._forkserver).items() if name in LENDER_FIELDS
    }
    server = context.Process(target=serve_commands, args=(address, ready, lender))
    server.start()
    ready.close()  # so that a server that ends is noticed
    try:
        assert is_ready.recv()
        yield
    finally:
        server.terminate()
        server.join()


def serve_commands(address, ready, lender):
    """Waits for commands, and runs each in a process of its own."""
    gc.disable()
    import_preloaded(*COMMAND_MODULES)
    vars(forkserver._forkserver).update(lender)
    forkserver._forkserver.ensure_running = lambda: None
    os.fsync = lambda descriptor: None  # as in tests
    gc.freeze()
    gc.set_threshold(10_000, 10, 100)  # as in tests
    gc.enable()
    parent = parent_process()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(address))
        listener.listen()
        ready.send(True)
        watchers = []
        while parent.sentinel not in select.select([listener, parent.sentinel], [], [])[0]:
            connection, _ = listener.accept()
            watchers = [
                watcher for watcher in watchers if os.waitpid(watcher, os.WNOHANG) == (0, 0)
            ]
            watcher = os.fork()
            if not watcher:
                break
            watchers.append(watcher)
            connection.close()
        else:
            return
    watch_command(connection)
    try:
        run_command()
    except BaseException as error:  # noqa: BLE001 - its process ends with it
        exit_process(error)
    exit_process(None)


def watch_command(connection):
    """Starts the command of a request and ends with it. Returns in the process of the command, with its state."""
    content, streams, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
    command = os.fork()
    if command:
        connection.send(str(command).encode())
        for stream in (0, 1, 2, *streams):
            os.close(stream)
        ended = os.pidfd_open(command)
        # whoever asked for it was killed
        alone = ended not in select.select([connection, ended], [], [])[0]
        if alone:
            os.kill(command, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
        if not alone:
            connection.send(str(code).encode())
        os._exit(0)
    connection.close()
    process._parent_process = None
    request = json.loads(content)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    # what torchrun starts
    os.environ["PYTHON_EXEC"] = str(Path(request["command"][0]).with_name("python"))
    sys.argv = request["command"]


def run_command():
    """Runs the command in `sys.argv` as Python would."""
    name, *arguments = sys.argv
    modules = {"bridgetower": "bridgetower", "torchrun": "torch.distributed.run"}
    if module := modules.get(Path(name).name):
        arguments = ["-m", module, *arguments]
    elif arguments[0] == "-u":  # as torchrun calls Python
        arguments = arguments[1:]
    option, value, *options = arguments if arguments[0] in ("-c", "-m") else ["", *arguments]
    sys.path[0] = str(Path(value).parent) if not option else ""
    sys.argv = [option or value, *options]
    if option == "-c":
        exec(value, {"__name__": "__main__"})
    elif option == "-m":
        runpy.run_module(value, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(value, run_name="__main__")


def exit_process(error):
    """Ends the process as Python would after an error or none, but frees nothing, which takes longer than the fork."""
    code = 0
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


FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def act_before(event, number, act):
    """Acts in this process right before the event happens for the given time, counted from 1."""
    remaining = number

    def hook(name, arguments):
        nonlocal remaining
        if remaining > 0 and event(name, arguments):
            remaining -= 1
            if remaining == 0:
                act()

    sys.addaudithook(hook)


def exit_code_of(process):
    """Waits for the end. Returns the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def renames_to(pattern):
    """The event that a file is renamed to a path that matches."""
    return lambda name, arguments: (
        name == "os.rename" and fnmatch.fnmatch(os.fsdecode(arguments[1]), pattern)
    )


def touches(folder, events=FILE_EVENTS):
    """The event that something in a folder is opened, renamed, made or removed."""

    def happens(name, arguments):
        path = arguments[0] if name in events else None
        return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)

    return happens


def send_to_self(number):
    os.kill(os.getpid(), number)


def announce_and_wait(number, file):
    """Makes a file, and waits until the signal arrives here."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    os.set_blocking(reading, True)
    signal.set_wakeup_fd(writing)
    Path(file).touch()
    assert os.read(reading, 1) == bytes([number])


def signal_at_rename(when, number, name, target, *arguments):
    from bridgetower import cli

    sent = signal.Signals[name]
    act_before(
        renames_to(when),
        int(number),
        lambda: send_to_self(sent) if target == "self" else announce_and_wait(sent, target),
    )
    cli.main(arguments)


PRELOADED_MODULES = (
    "bridgetower.training.run",
    "bridgetower.evaluation.retrieval",
    "bridgetower.evaluation.masked_words",
    "datasets",
    "lancedb",
    "pandas",  # by pyarrow
    "pytest",
    "sklearn.linear_model",
    "sklearn.metrics",
    "torch._dynamo",  # by every optimiser
    "torch._inductor.config",
)


def import_preloaded(*names):
    for name in (*PRELOADED_MODULES, *names):
        import_module(name)


if __name__ == "__main__":
    signal_at_rename(*sys.argv[1:])
