"""Where a server listens, and that it finishes what it has taken in."""

import resource
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from bridgetower.predictor import Predictor
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.server import listen
from served import PATIENCE, TEXTS, held_up, started, until


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_only_with_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="can be reached from other machines; set an API key"):
        listen(ServeConfig(host=host, port=0))
    with listen(ServeConfig(host=host, port=0, api_key="secret")) as listener:
        assert listener.getsockname()[0] == host


def test_answers_are_not_held_back() -> None:
    with listen(ServeConfig(port=0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        accepted.close()


def test_a_port_that_is_taken() -> None:
    with listen(ServeConfig(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen at 127\.0\.0\.1, port {port}: .*; choose another"):
            listen(ServeConfig(port=port))


def test_no_such_host() -> None:
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1"):
        listen(ServeConfig(host="192.0.2.1", api_key="secret", port=0))


@pytest.mark.parametrize(("soft", "hard", "files"), [(64, 100, 100), (100, 100, 100), (256, 20_000, 8000)])
def test_as_many_open_files_as_are_of_use(soft: int, hard: int, files: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY:
        hard, files = min(hard, most), min(files, most)
    code = f"""
import resource
from bridgetower.serve.server import _open_files
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [int(number) for number in done.stdout.split()] == [files, files, hard]


def test_stopping_finishes_what_was_taken_in(predictor: Predictor) -> None:
    with started(predictor, max_batch=2) as running, held_up(predictor) as gate, ThreadPoolExecutor(4) as pool:
        waiting = [
            pool.submit(
                httpx.post, f"{running.client.base_url}/v1/embeddings", json={"input": TEXTS * 3}, timeout=PATIENCE
            )
            for _ in range(4)
        ]
        until(lambda: running.service.batcher.admitted == 36)
        running.server.should_exit = True
        until(lambda: not _accepts(running.address))
        gate.set()
        answers = [answer.result() for answer in waiting]
        running.thread.join(PATIENCE)
        assert not running.thread.is_alive()
    assert [len(answer.json()["data"]) for answer in answers] == [9] * 4
    assert not running.service.ready


def _accepts(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True
