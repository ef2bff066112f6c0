"""Connections that keep silent, too many of them, and what is no HTTP; all on real sockets."""

import contextlib
import json
import logging
import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from bridgetower.predictor import Predictor
from served import Running, started, until

PATH = "/v1/embeddings"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
MOST = 12


@pytest.fixture(scope="module")
def hasty(predictor: Predictor) -> Iterator[Running]:
    """A server that waits a second."""
    with started(predictor, patience=1.0, timeout=2.0) as found:
        yield found


@pytest.fixture(scope="module")
def patient(predictor: Predictor) -> Iterator[Running]:
    """A server that waits longer than any test takes, with few connections."""
    with started(predictor, connections=MOST, patience=600.0, timeout=600.0) as found:
        yield found


@contextlib.contextmanager
def connections(running: Running, number: int) -> Iterator[list[socket.socket]]:
    """Sockets that are connected, one after the other."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(running.address, timeout=60)) for _ in range(number)]


def everything(connection: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            content += part
    return content


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = {}
    while line := file.readline().strip().decode():
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    return status, headers, file.read(int(headers["content-length"]))


def error(content: bytes, status: int) -> dict[str, Any]:
    """The error in an answer after which the connection is closed."""
    head, _, body = content.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    lines = head.lower().split(b"\r\n")
    assert {b"connection: close", b"content-type: application/json", b"content-length: %d" % len(body)} <= set(lines)
    (found,) = json.loads(body).values()
    assert found.keys() == {"message", "type", "param", "code"}
    return dict(found)


class TestSilence:
    def test_a_connection_that_sends_nothing_is_closed(self, hasty: Running) -> None:
        with connections(hasty, 1) as (connection,):
            assert everything(connection) == b""

    @pytest.mark.parametrize("sent", [b"G", b"POST /v1/match HTTP/1.1\r\nHost: loc", GET[:-2]])
    def test_half_sent_headers(self, hasty: Running, sent: bytes) -> None:
        with connections(hasty, 1) as (connection,):
            connection.sendall(sent)
            found = error(everything(connection), 408)
        assert found["code"] == "request_timeout"
        assert found["message"] == "the headers were not sent within 1 s; send them faster"

    def test_headers_that_come_a_byte_at_a_time(self, hasty: Running) -> None:
        with connections(hasty, 1) as (connection,):
            for byte in b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 10_000:
                if select.select([connection], [], [], 0.05)[0]:
                    break
                connection.sendall(bytes([byte]))
            error(everything(connection), 408)

    def test_half_sent_headers_on_a_connection_that_was_used(self, hasty: Running) -> None:
        with connections(hasty, 1) as (connection,):
            for _ in range(2):
                connection.sendall(GET)
                assert answer(connection)[0] == 200
            connection.sendall(GET + GET[:9])
            assert answer(connection)[0] == 200
            error(everything(connection), 408)

    def test_a_body_that_goes_on_after_its_answer(self, hasty: Running) -> None:
        with connections(hasty, 1) as (connection,):
            connection.sendall(
                b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n" + b"a" * 99
            )
            assert answer(connection)[0] == 405
            connection.settimeout(60)
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                while True:
                    connection.sendall(b"a")
        until(lambda: not hasty.server.server_state.connections)

    def test_a_client_that_reads_nothing_of_its_answers(self, hasty: Running) -> None:
        with connections(hasty, 1) as (connection,):
            connection.setblocking(False)
            request = GET.replace(b"/health", b"/openapi.json")
            until(lambda: bool(hasty.server.server_state.connections))
            with contextlib.suppress(BlockingIOError, ConnectionResetError, BrokenPipeError):
                while True:
                    connection.send(request * 100)
            until(lambda: not hasty.server.server_state.connections)

    def test_a_connection_is_kept_for_the_next_request(self, patient: Running) -> None:
        with connections(patient, 1) as (connection,):
            for _ in range(3):
                connection.sendall(GET)
                status, headers, _ = answer(connection)
                assert (status, headers.get("connection")) == (200, None)


class TestTooMany:
    def test_silent_ones_give_way(self, patient: Running) -> None:
        """Far more than there may be: each new client is let in, and those that were silent longest are closed."""
        with connections(patient, 3 * MOST) as silent:
            with connections(patient, 1) as (one,):
                one.sendall(GET)
                assert answer(one)[0] == 200
            assert [everything(connection) for connection in silent[: 2 * MOST]] == [b""] * 2 * MOST
            silent[-1].sendall(GET)
            assert answer(silent[-1])[0] == 200

    def test_half_sent_ones_are_told(self, patient: Running) -> None:
        with connections(patient, MOST) as first:
            for connection in first:
                connection.sendall(GET[:9])
            until(lambda: sum(bool(one.conn.trailing_data[0]) for one in _connections(patient)) == MOST)
            with connections(patient, 1) as (one,):
                one.sendall(GET)
                assert answer(one)[0] == 200
                found = error(everything(first[0]), 503)
        assert found["message"] == "too many connections; try again in a second"

    def test_those_that_were_used_stay_longer(self, patient: Running) -> None:
        with connections(patient, 1) as (kept,):
            kept.sendall(GET)
            assert answer(kept)[0] == 200
            with connections(patient, 3 * MOST):
                for _ in range(2):
                    kept.sendall(GET)
                    assert answer(kept)[0] == 200

    def test_of_those_that_were_used_the_oldest_goes(self, patient: Running) -> None:
        with connections(patient, MOST) as used:
            for connection in used:
                connection.sendall(GET)
                assert answer(connection)[0] == 200
            with connections(patient, 1) as (one,):
                one.sendall(GET)
                assert answer(one)[0] == 200
                assert everything(used[0]) == b""
                for connection in used[1:]:
                    connection.sendall(GET)
                    assert answer(connection)[0] == 200

    def test_those_that_read_nothing_give_way(self, patient: Running) -> None:
        def count_stalled() -> int:
            return sum(one.flow.write_paused for one in _connections(patient))

        until(lambda: not _connections(patient))
        with connections(patient, MOST) as stalled:
            for number, connection in enumerate(stalled, start=1):
                connection.sendall(GET.replace(b"/health", b"/openapi.json") * 400)
                until(lambda number=number: count_stalled() == number)  # type: ignore[misc]
            for _ in range(3):
                with connections(patient, 1) as (one,):
                    one.sendall(GET)
                    assert answer(one)[0] == 200
                    assert count_stalled() == MOST - 1
                until(lambda: len(_connections(patient)) == MOST - 1)
            stalled[0].settimeout(60)
            everything(stalled[0])

    def test_requests_in_progress_stay(self, patient: Running) -> None:
        body = b'{"input": "a"}'
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with connections(patient, MOST) as working:
            for connection in working:
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:-1])
            until(lambda: len(_connections(patient)) == MOST and all(one.cycle for one in _connections(patient)))
            with connections(patient, 1) as (one,):
                assert everything(one) == b""
            for connection in working:
                connection.sendall(body[-1:])
                assert answer(connection)[0] == 200


def _connections(running: Running) -> list[Any]:
    return list(running.server.server_state.connections)


CHUNKED = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 30 + b"\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "length": b"POST /v1/match HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    "two lengths": b"POST /v1/match HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "encoding": b"POST /v1/match HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\nab",
    "long": b"GET / HTTP/1.1\r\nHost: a\r\na: " + b"b" * 2**20 + b"\r\n\r\n",
    "control character": b"GET / HTTP/1.1\r\nHost: a\r\na: \x00\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:b\r\n" * 200 + b"\r\n",
    "many trailers": CHUNKED % b"/v1/match" + b"1\r\na\r\n0\r\n" + b"a:b\r\n" * 200 + b"\r\n",
    "short chunks": CHUNKED % b"/v1/match" + b"1\r\na\r\n" * 300,
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_http(patient: Running, sent: bytes) -> None:
    with connections(patient, 1) as (connection,):
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        found = error(everything(connection), 400)
    assert (found["type"], found["code"]) == ("invalid_request_error", "invalid_http")
    assert found["message"] == "the request is not valid HTTP, or has too many headers or chunks; expected HTTP/1.1"


def test_some_short_chunks_and_many_long_ones(patient: Running) -> None:
    body = b'{"input": "a"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"800\r\n" + (b" " * 2048 + b"\r\n800\r\n") * 1000
    with connections(patient, 1) as (connection,):
        for _ in range(2):
            connection.sendall(CHUNKED % PATH.encode() + chunks + b" " * 2048 + b"\r\n0\r\na: b\r\n\r\n")
            assert answer(connection)[0] == 200


@pytest.mark.parametrize("sent", [b"no chunk\r\n", b"1\r\na\r\n" * 300])
def test_a_body_that_is_no_http(patient: Running, caplog: pytest.LogCaptureFixture, sent: bytes) -> None:
    """Before there is an answer, the error is the answer; after it, the connection is closed."""
    with caplog.at_level(logging.ERROR):
        with connections(patient, 1) as (connection,):
            connection.sendall(CHUNKED % b"/v1/match" + b"3\r\n{\r\n")
            until(lambda: any(one.cycle for one in _connections(patient)))
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            error(everything(connection), 400)
        with connections(patient, 1) as (connection,):
            connection.sendall(CHUNKED % b"/health")
            assert answer(connection)[0] == 405
            connection.sendall(sent)
            assert everything(connection) == b""
        until(lambda: not _connections(patient) and not patient.server.server_state.tasks)
    assert not caplog.records


def test_another_protocol_is_not_spoken(patient: Running) -> None:
    upgrade = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YQ==\r\n\r\n"
    )
    with connections(patient, 1) as (connection,):
        connection.sendall(GET[:-2] + upgrade)
        assert answer(connection)[0] == 200
