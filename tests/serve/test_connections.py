"""Silent connections, too many connections, and requests that are no HTTP or ambiguous. All are on real sockets."""

import contextlib
import json
import socket
import time
from pathlib import Path

import pytest

from bridgetower.serve import middleware
from helpers.servers import wait_until

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = GET[:-2] + b"Connection: close\r\n\r\n"
MODELS = GET.replace(b"/health", b"/v1/models")
BODY = b'{"input":"a"}'
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
POST = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@contextlib.contextmanager
def connections(running, number):
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(running.address, timeout=60))
            for _ in range(number)
        ]


def receive_all(connection):
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while block := connection.recv(65536):
            content += block
    return content


def answers_to(running, *sent):
    with connections(running, 1) as (connection,):
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for block in sent:
                connection.sendall(block)
        return receive_all(connection)


def status_of(content):
    return int(content.split(b" ", 2)[1])


def error(content, expected):
    head, _, body = content.partition(b"\r\n\r\n")
    assert status_of(content) == expected
    lines = head.lower().split(b"\r\n")
    assert {
        b"connection: close",
        b"content-type: application/json",
        b"content-length: %d" % len(body),
    } <= set(lines)
    (details,) = json.loads(body).values()
    assert details.keys() == {"message", "type", "param", "code"}
    return dict(details)


def test_heads_that_do_not_come_end_their_connections_and_leave_room(hasty):
    heads = [b"", b"G", b"POST /v1/match HTTP/1.1\r\nHost: loc", GET[:-2], GET + GET[:9]]
    with connections(hasty, 500) as silent:
        for sent, connection in zip(heads * 100, silent, strict=True):
            connection.sendall(sent)
        assert hasty.client.get("/health").status_code == 200
        answered = [receive_all(connection).count(b"HTTP/1.1 200") for connection in silent]
    assert answered == [int(GET in sent) for sent in heads] * 100


def test_headers_that_come_a_line_at_a_time(hasty):
    with (
        connections(hasty, 1) as (connection,),
        contextlib.suppress(ConnectionResetError, BrokenPipeError),
    ):
        for number in range(300):
            connection.sendall(b"a: b\r\n" if number else GET[:-2])
            time.sleep(0.1)
        pytest.fail("headers come for 30 s")


def test_a_body_that_goes_on_after_its_answer(hasty, monkeypatch):
    monkeypatch.setattr(middleware, "_DRAIN", 0.5)
    with (
        connections(hasty, 1) as (connection,),
        contextlib.suppress(ConnectionResetError, BrokenPipeError),
    ):
        connection.sendall(
            POST.replace(b"/v1/embeddings", b"/health") + b"Content-Length: 9999999999\r\n\r\n"
        )
        assert status_of(connection.recv(65536)) == 405
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            connection.sendall(b"a" * 65536)
        pytest.fail("a body is read for 60 s")


def is_open_at_the_server(connection):
    """Whether Linux lists the other end of a connection."""
    client = connection.getsockname()[1]
    server = connection.getpeername()[1]
    localhost = "0100007F"
    return (
        f" {localhost}:{server:04X} {localhost}:{client:04X} " in Path("/proc/net/tcp").read_text()
    )


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs Linux")
def test_a_client_that_reads_nothing_is_disconnected(hasty):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(hasty.address)
        connection.sendall(GET.replace(b"/health", b"/openapi.json") * 60)
        wait_until(lambda: not is_open_at_the_server(connection))
        connection.settimeout(60)
        with pytest.raises(ConnectionResetError):
            list(iter(lambda: connection.recv(65536), b""))


def test_a_connection_is_kept_for_the_next_request(hasty):
    content = answers_to(hasty, GET * 4 + GET[:-2] + b"Content-Length: 0\r\n\r\n" + LAST)
    assert content.count(b"HTTP/1.1 200 OK") == 6


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 30 + b"\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "length": POST + b"Content-Length: x\r\n\r\n",
    "signed length": POST + b"Content-Length: +13\r\n\r\n" + BODY,
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "two in one": POST + b"Content-Length: 14, 15\r\n\r\n" + BODY,
    "HEAD with a body": GET[:-2].replace(b"GET", b"HEAD") + b"Content-Length: 5\r\n\r\n",
    "two of GET": GET[:-2] + b"Content-Length: 14\r\nContent-Length: 15\r\n\r\n" + BODY,
    "space": POST + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKS,
    "other encoding": POST + b"Transfer-Encoding: gzip\r\n\r\nab",
    "control character": GET[:-2] + b"a: \x00\r\n\r\n",
    "many headers": GET[:-2] + b"a:b\r\n" * 200 + b"\r\n",
    "very long": GET[:-2] + b"a: " + b"b" * 2**20 + b"\r\n\r\n",
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_http(hasty, sent):
    """One answer from the HTTP library, or none, and what follows is not read."""
    content = answers_to(hasty, sent, MODELS)
    assert content.count(b"HTTP/1.1 ") <= 1
    assert not content or status_of(content) in (400, 431)


REFUSED = {
    "no host": (400, MODELS.replace(b"Host: localhost\r\n", b"")),
    "two hosts": (400, GET[:-2] + b"Host: evil.example\r\n\r\n"),
    "gzip and chunks": (400, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS),
    "chunks twice": (400, POST + CHUNKED * 2 + b"\r\n" + CHUNKS),
    "long": (431, GET[:-2] + b"a: " + b"b" * 2**16 + b"\r\n\r\n"),
    "long path": (
        431,
        GET.replace(b"/health", b"/" + b"a" * 65_000)[:-2] + b"a: " + b"b" * 600 + b"\r\n\r\n",
    ),
    "no chunk": (400, POST + CHUNKED + b"\r\n3\r\n{\r\n\r\nno chunk\r\n"),
    "negative chunk": (400, POST + CHUNKED + b"\r\n-1\r\n" + BODY),
    "short chunks": (400, POST + CHUNKED + b"\r\n" + b"1\r\n \r\n" * 3000),
    "many trailers": (400, POST + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"a:b\r\n" * 100_000 + b"\r\n"),
    "GET with a body": (400, GET[:-2] + b"Content-Length: %d\r\n\r\n" % len(MODELS)),
    "GET with chunks": (400, GET[:-2] + CHUNKED + b"\r\n"),
    "length of what are no chunks": (400, POST + LENGTH + CHUNKED + b"\r\n" + BODY),
    "chunks of what has a length": (400, POST + CHUNKED + LENGTH + b"\r\n" + BODY),
}


@pytest.mark.parametrize(("expected", "sent"), REFUSED.values(), ids=REFUSED)
def test_what_others_may_read_in_another_way(hasty, expected, sent):
    details = error(answers_to(hasty, sent, MODELS), expected)
    assert details["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "lengths", [LENGTH + CHUNKED, CHUNKED + LENGTH, b"Content-Length: 3\r\n" + CHUNKED]
)
def test_a_length_beside_chunks_is_the_last_that_is_read(hasty, lengths):
    """RFC 9112, 6.3: the chunks count, and the connection is closed, so that nothing is left over of it."""
    content = answers_to(hasty, POST + lengths + b"\r\n" + CHUNKS, MODELS)
    assert status_of(content) == 200
    assert content.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in content.lower()


def test_some_short_chunks_and_many_long_ones(hasty):
    chunks = (
        b"".join(b"1\r\n%c\r\n" % byte for byte in BODY)
        + (b"800\r\n" + b" " * 2048 + b"\r\n") * 400
    )
    content = answers_to(
        hasty, (POST + CHUNKED + b"\r\n" + chunks + b"0\r\na: b\r\n\r\n") * 2 + LAST
    )
    assert content.count(b"HTTP/1.1 200") == 3


def test_another_protocol_is_not_spoken(hasty):
    upgrade = b"Connection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YQ==\r\n\r\n"
    for protocol in (b"websocket", b"h2c"):
        content = answers_to(hasty, GET[:-2] + upgrade % protocol + LAST)
        assert content.count(b"HTTP/1.1 200") == 2


def test_the_software_is_not_told(hasty):
    assert hasty.client.get("/health").headers["server"] == "bridgetower"


def test_a_large_body_that_is_refused_does_not_lose_its_answer(hasty):
    with connections(hasty, 1) as (connection,):
        size = 20_000_000
        head = POST.replace(b"/v1/embeddings", b"/health") + b"Content-Length: %d\r\n\r\n" % size
        connection.sendall(head + bytes(size))
        time.sleep(0.2)
        content = receive_all(connection)
    assert status_of(content) == 405
    assert b"connection: close" in content
