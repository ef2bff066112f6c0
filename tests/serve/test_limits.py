"""How much is read, how long it may take, and what becomes of requests whose clients leave."""

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from starlette.responses import Response, StreamingResponse

from bridgetower.serve import middleware
from bridgetower.serve.middleware import RequestLimitsMiddleware
from helpers.servers import (
    PATIENCE,
    SERVED_TEXTS,
    error_of,
    held_up_text_tower,
    start_server,
    wait_until,
)

PATH = "/v1/embeddings"
FOUR = {"input": SERVED_TEXTS[:1] * 4}
MIB = 2**20


@pytest.fixture(scope="module")
def patient(predictor):
    with start_server(predictor, queue=9, max_items=4) as running:
        yield running


def connect(running):
    return socket.create_connection(running.address, timeout=PATIENCE)


def request(body, *, length=None):
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return (
        f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body
    )


def read_status(connection):
    return int(connection.recv(4096).split()[1])


@contextmanager
def large_ones(running, count):
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(running)) for _ in range(count)]
        for connection in connections:
            connection.sendall(request(b" " * (MIB - 10), length=MIB))
        yield connections


def test_the_largest_body(hasty):
    body = json.dumps({"input": "a"}).encode()
    headers = {"Content-Type": "application/json"}
    assert (
        hasty.client.post(
            PATH, content=body + b" " * (MIB - len(body)), headers=headers
        ).status_code
        == 200
    )
    blocks = (b" " * 65536 for _ in range(40))  # without a length
    for content in (body + b" " * (MIB - len(body) + 1), blocks):
        error = error_of(hasty.client.post(PATH, content=content, headers=headers), 413)
        assert f"larger than {MIB} bytes" in error["message"]
    with connect(hasty) as connection:
        connection.sendall(request(b"", length=MIB + 1))  # of which nothing is read
        assert read_status(connection) == 413


def test_bodies_that_arrive_together_share_a_limit(hasty):
    """Probes and small bodies have room beside as many large ones as there may be. Those end for want of time."""
    with large_ones(hasty, 9) as connections:
        for _ in range(5):
            assert hasty.client.post(PATH, json={"input": "a"}).status_code == 200
            assert {hasty.client.get(path).status_code for path in ("/health", "/ready")} == {200}
            assert hasty.client.post("/health", content=b" " * (MIB - 10)).status_code == 405
        assert {read_status(connection) for connection in connections} == {429, 408}


def test_no_answer_in_time(hasty, predictor):
    with held_up_text_tower(predictor):
        response = hasty.client.post(PATH, json={"input": "a"})
        error = error_of(response, 503)
        assert int(response.headers["retry-after"]) >= 1
        assert "no answer within 1.5 s" in error["message"]
    wait_until(lambda: hasty.service.scheduler.admitted == 0)
    assert hasty.client.post(PATH, json={"input": "a"}).status_code == 200


def test_a_greedy_client_is_refused_and_others_are_not(patient, predictor):
    """Its requests fill its share of the queue. Those of another address are admitted, and answered in their turn."""
    cost = patient.service.costs["text"]
    greedy = httpx.Client(
        base_url=patient.client.base_url, transport=httpx.HTTPTransport(local_address="127.0.0.2")
    )
    with greedy, held_up_text_tower(predictor) as gate, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(greedy.post, PATH, json=FOUR, timeout=PATIENCE) for _ in range(3)]
        wait_until(lambda: patient.service.scheduler.admitted == 12 * cost)
        response = greedy.post(PATH, json=FOUR)
        assert error_of(response, 429)["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        other_requests = [
            pool.submit(patient.client.post, PATH, json={"input": "a"}) for _ in range(3)
        ]
        wait_until(lambda: patient.service.scheduler.admitted == 15 * cost)
        gate.set()
        assert [request.result().status_code for request in (*waiting, *other_requests)] == [
            200
        ] * 6


def test_a_client_that_leaves_makes_room(hasty, predictor):
    with held_up_text_tower(predictor):
        connections = [connect(hasty), connect(hasty)]
        for connection in connections:
            connection.sendall(request(json.dumps(FOUR).encode()))
        for remaining in (8, 4, 0):
            wait_until(
                lambda remaining=remaining: (
                    hasty.service.scheduler.admitted == remaining * hasty.service.costs["text"]
                )
            )
            if remaining:
                connections.pop().close()
    with connect(hasty) as connection:
        connection.sendall(request(b'{"inp', length=100))  # and leaves while it sends
    assert hasty.client.post(PATH, json={"input": "a"}).status_code == 200
    assert hasty.service.scheduler.admitted == 0


async def nothing():
    return await asyncio.Event().wait() or {}


async def send_limited(limits, body=b"a", method="POST", path="/", client="127.0.0.1"):
    """Sends a request, without its body if that is None, and returns the status of the answer."""
    statuses = []
    bodies = [] if body is None else [{"type": "http.request", "body": body}]

    async def receive():
        return bodies.pop() if bodies else await nothing()

    async def send(message):
        statuses.extend([message["status"]] if "status" in message else [])

    scope = {"type": "http", "method": method, "path": path, "headers": [], "client": (client, 1)}
    await limits(scope, receive, send)
    return statuses[0]


@pytest.mark.anyio
class TestMiddleware:
    async def test_of_too_many_requests_the_one_that_stalls_longest_is_dropped(self):
        limits = RequestLimitsMiddleware(Response(), max_body=10, timeout=60, requests=6)
        stalled = [asyncio.create_task(send_limited(limits, None)) for _ in range(3)]
        await asyncio.sleep(0)
        for number in range(2):
            assert await send_limited(limits) == 200
            assert await stalled[number] == 429
            stalled.append(asyncio.create_task(send_limited(limits, None)))
            await asyncio.sleep(0)
        assert not any(request.done() for request in stalled[2:])
        for request in stalled[2:]:
            request.cancel()

    async def test_no_refusal_is_held_back_until_its_time_is_over(self):
        limits = RequestLimitsMiddleware(Response(status_code=429), max_body=10, timeout=1)
        statuses = await asyncio.gather(*(send_limited(limits) for _ in range(50)))
        assert set(statuses) == {429}

    async def test_one_client_s_requests_end_no_other_s(self):
        """Of 8, one client may have 4. A fifth ends its own that stalls, and another's only if that has more."""
        limits = RequestLimitsMiddleware(Response(), max_body=10, timeout=60, requests=8)
        first = asyncio.create_task(send_limited(limits, None, client="203.0.113.9"))
        await asyncio.sleep(0)
        stalled = [asyncio.create_task(send_limited(limits, None)) for _ in range(3)]
        await asyncio.sleep(0)
        later = [asyncio.create_task(send_limited(limits, None)) for _ in range(2)]
        await asyncio.sleep(0)
        assert await stalled[0] == 429
        assert await stalled[1] == 429
        assert await send_limited(limits, client="203.0.113.8") == 200
        assert not first.done()
        for request in (first, *stalled, *later):
            request.cancel()

    async def test_refusals_are_held_back_the_longer_the_more_a_client_gets(self, monkeypatch):
        monkeypatch.setattr(middleware, "_PAUSE", 0.1)
        limits = RequestLimitsMiddleware(Response(status_code=429), max_body=10, timeout=60)
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def seconds(client):
            assert await send_limited(limits, client=client) == 429
            return loop.time() - began

        times = await asyncio.gather(*map(seconds, ["203.0.113.8"] * 8 + ["203.0.113.9"]))
        assert times[-1] < 0.5  # the first of its client
        assert times[:8] == sorted(times[:8])
        assert 0.1 <= times[0] < 0.5
        assert times[7] >= 0.8

    async def test_clients_begin_in_turn(self):
        """One of many requests of a client leaves before its turn, which the next one takes."""
        begun = []

        async def app(scope, receive, send):
            begun.append(scope["path"])
            await Response()(scope, receive, send)

        limits = RequestLimitsMiddleware(app, max_body=10, timeout=60)
        clients = {"/a": "203.0.113.8", "/b": "203.0.113.9", "/c": "203.0.113.10"}
        paths = ["/a0", "/a1", "/a2", "/a3", "/b0", "/b1", "/c0"]
        requests = [
            asyncio.create_task(send_limited(limits, path=path, client=clients[path[:2]]))
            for path in paths
        ]
        await asyncio.sleep(0)
        requests.pop(1).cancel()
        assert await asyncio.gather(*requests) == [200] * 6
        assert begun == ["/a0", "/b0", "/c0", "/a2", "/b1", "/a3"]

    async def test_requests_in_progress_have_a_limit(self):
        """Those of GET are not counted, and what has ended makes room, however it ends."""
        answered = []
        gate = asyncio.Event()

        async def app(scope, receive, send):
            if scope["path"] == "/fails":
                raise RuntimeError
            if scope["method"] == "POST":
                await gate.wait()
            answered.append(scope["path"])
            await Response()(scope, receive, send)

        limits = RequestLimitsMiddleware(app, max_body=10, timeout=60, requests=4)
        waiting = [asyncio.create_task(send_limited(limits, path="/waits")) for _ in range(2)]
        await asyncio.sleep(0)
        assert await send_limited(limits, path="/more") == 429
        assert await send_limited(limits, None, "GET", "/health") == 200
        gate.set()
        assert [await request for request in waiting] == [200, 200]
        for _ in range(3):
            assert await send_limited(limits, path="/fails") == 500
        assert await send_limited(limits, path="/more") == 200
        assert answered == ["/health", "/waits", "/waits", "/more"]

    async def test_only_large_bodies_that_are_not_answered_count(self):
        """800,000 bytes of bodies are held, of each of which the first 64 KiB do not count."""
        gate = asyncio.Event()
        held = []

        async def app(scope, receive, send):
            if len((await receive())["body"]) == 100_000:
                held.append(scope["client"])
                await gate.wait()
            await Response()(scope, receive, send)

        limits = RequestLimitsMiddleware(app, max_body=100_000, timeout=60)
        large = [asyncio.create_task(send_limited(limits, bytes(100_000))) for _ in range(40)]
        await asyncio.wait(large[11:], timeout=60)  # 11 are held: half of 800,000 / 34,464
        small = [
            asyncio.create_task(send_limited(limits, bytes(100_000), client="203.0.113.9"))
            for _ in range(5)
        ]
        async with asyncio.timeout(60):
            while len(held) < 16:
                await asyncio.sleep(0)
        assert await send_limited(limits, bytes(60_000)) == 200
        gate.set()
        assert await asyncio.gather(*large, *small) == [200] * 11 + [429] * 29 + [200] * 5
        assert [await send_limited(limits, bytes(100_000)) for _ in range(60)] == [200] * 60

    async def test_get_has_to_be_answered_in_time_too(self):
        async def app(scope, receive, send):
            await nothing()

        assert (
            await send_limited(RequestLimitsMiddleware(app, max_body=10, timeout=0.01), None, "GET")
            == 503
        )

    async def test_a_response_takes_as_long_as_its_parts_are_read(self, monkeypatch):
        """Reading ten parts takes ten times the limit. One that is read for longer than the limit is the last."""
        seconds = 0.0
        sent = []
        loop = asyncio.get_running_loop()
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + seconds)

        async def send(message):
            nonlocal seconds
            seconds += 50 if len(sent) < 10 else 70
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # timers that are due have run
            sent.append(message)

        stream = StreamingResponse(str(number) for number in range(20))
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "headers": [],
            "asgi": {"spec_version": "2.4"},
        }
        with pytest.raises(TimeoutError):  # the server then closes the connection
            await RequestLimitsMiddleware(stream, max_body=10, timeout=60)(scope, nothing, send)
        assert [message["body"] for message in sent[1:]] == [b"%d" % number for number in range(9)]
