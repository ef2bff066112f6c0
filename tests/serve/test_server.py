"""Where a server listens, what it admits, and that it finishes what it has taken in."""

import logging
import resource
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial

import httpx
import pytest
from granian import net

from bridgetower.serve.config import ServeConfig
from bridgetower.serve.errors import ApiError
from bridgetower.serve.server import _open_files, shared_port, take_port
from bridgetower.serve.service import Service
from helpers.servers import PATIENCE, SERVED_TEXTS, held_up_text_tower, start_server, wait_until


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_only_with_a_key(host):
    with pytest.raises(ValueError, match="can be reached from other machines; set an API key"):
        take_port(ServeConfig(host=host, port=0))
    with take_port(ServeConfig(host=host, port=0, api_key="secret")) as listener:
        assert listener.getsockname()[0] == host


def test_connections_opened_together_reach_all_processes():
    """A pool of kept connections, as nginx has one, is spread over the listeners of one port."""
    with take_port(ServeConfig(port=0)) as taken_port, ExitStack() as stack:
        address = taken_port.getsockname()
        listeners = [stack.enter_context(shared_port(address, taken_port.family)) for _ in range(2)]
        for listener in listeners:
            listener.listen(64)
            listener.setblocking(False)
        for _ in range(64):
            stack.enter_context(socket.create_connection(address))
        counts = [0, 0]
        for number, listener in enumerate(listeners):
            with suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
                    counts[number] += 1
        assert sum(counts) == 64
        assert min(counts) >= 10  # fewer by chance once in 10**9


def test_a_port_that_is_taken_and_a_host_that_is_not_here():
    with take_port(ServeConfig(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            OSError, match=rf"cannot listen at 127\.0\.0\.1, port {port}: .*; choose another"
        ):
            take_port(ServeConfig(port=port))
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1"):
        take_port(ServeConfig(host="192.0.2.1", api_key="secret", port=0))


@pytest.mark.parametrize(
    ("soft", "hard", "files"),
    [(64, 100, 100), (100, 100, 100), (256, 20_000, 16_384), (256, resource.RLIM_INFINITY, 16_384)],
)
def test_as_many_open_files_as_are_of_use(monkeypatch, soft, hard, files):
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    assert _open_files() == files
    assert limits[-1] == (files, hard)


class Handler(logging.Handler):
    closed = False

    def close(self):
        self.closed = True
        super().close()


def test_stopping_finishes_what_was_taken_in_and_logs_stay_open(predictor):
    handler = Handler()
    with (
        start_server(predictor, max_batch=2) as running,
        held_up_text_tower(predictor) as gate,
        ThreadPoolExecutor(4) as pool,
    ):
        ask = partial(httpx.post, f"{running.client.base_url}/v1/embeddings", timeout=PATIENCE)
        waiting = [pool.submit(ask, json={"input": SERVED_TEXTS * 3}) for _ in range(4)]
        wait_until(lambda: running.service.scheduler.admitted == 36 * running.service.costs["text"])
        running.server.stop()
        wait_until(lambda: not _accepts(running.address))
        gate.set()
        answers = [answer.result() for answer in waiting]
        running.thread.join(PATIENCE)
        assert not running.thread.is_alive()
    assert [len(answer.json()["data"]) for answer in answers] == [9] * 4
    assert not running.service.ready
    assert not handler.closed


def test_a_release_of_granian_that_takes_no_socket_binds_the_address_itself(predictor, monkeypatch):
    def refuse(*arguments):
        raise TypeError("takes 1 argument")

    monkeypatch.setattr(net, "SocketHolder", refuse)
    with start_server(predictor) as running:
        wait_until(lambda: _accepts(running.address))
        assert running.client.get("/ready").status_code == 200


def _accepts(address):
    try:
        socket.create_connection(address, timeout=1).close()
    except ConnectionError:
        return False
    return True


@pytest.mark.anyio
async def test_ready_while_it_runs_and_admits_what_it_can_do(predictor):
    service = Service(predictor, ServeConfig(name="tiny", max_items=3))
    assert not service.ready
    async with service.running():
        assert service.ready
        with service.admission({"pair": 1, "image": 2}, "input", "tiny"):
            assert service.scheduler.admitted == 1 + 2 * service.costs["image"]
        for cost, words in (
            (({"text": 4}, "input", None), "4 items, the limit is 3"),
            (({"text": 1}, "input", "other"), "this server has 'tiny'"),
            (
                ({"pair": 1}, "images", None, "vqa"),
                "no vqa head .* name it with --answer-model when the server is started$",
            ),
        ):
            with pytest.raises(ApiError, match=words), service.admission(*cost):
                pass
        assert service.scheduler.admitted == 0
    assert not service.ready


def test_another_server_starts_at_once_at_the_port_of_one_that_ended(predictor):
    with socket.socket() as client:
        with start_server(predictor) as running:
            client.connect(running.address)
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            with pytest.raises(OSError, match="in use"):
                socket.create_server(running.address)  # which sets SO_REUSEADDR
        while client.recv(1000):  # up to where the server closed it
            pass
        with take_port(ServeConfig(port=running.address[1])) as listener:
            assert listener.getsockname()[1] == running.address[1]
