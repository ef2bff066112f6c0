"""What clients do that they should not: one coroutine function for each kind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import requests
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from serving_client import Connection, Reply, Server, data_uri, picture, request_bytes

BadThing = Callable[[Connection, random.Random], Awaitable[Reply | None]]

_MADE_UP = 25  # for each route, and each of what it allows and forbids


def bad_things(server: Server) -> dict[str, BadThing]:
    """Returns all of them by name."""
    known = made_up_requests(server)

    async def made_up(connection: Connection, choice: random.Random) -> Reply | None:
        return await connection.send(choice.choice(known))

    functions: list[BadThing] = [malformed, broken_json, no_http, oversized, slow, abandoned, visit, burst, made_up]
    return {function.__name__: function for function in functions}


def made_up_requests(server: Server) -> list[bytes]:
    """Returns requests that are made up from the description of the API, as it allows and as it forbids."""
    address = f"http://{server.host}:{server.port}"
    found: list[bytes] = []
    usual = settings(max_examples=_MADE_UP, deadline=None, database=None, derandomize=True)
    for mode in schemathesis.GenerationMode:
        for result in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
            operation = result.ok()
            if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing to send

            @settings(usual, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def collect(case: Any) -> None:
                made = requests.Request(**case.as_transport_kwargs(base_url=address)).prepare()
                body = made.body.encode() if isinstance(made.body, str) else made.body or b""
                lines = [f"{made.method} {made.path_url} HTTP/1.1", "Host: localhost"]
                lines += [f"{name}: {value}" for name, value in made.headers.items()]
                found.append("\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body)

            collect()
    return found


async def malformed(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends JSON that is no request."""
    picture_cut = data_uri(b"\xff\xd8\xff" + choice.randbytes(200))
    bodies: list[Any] = [
        *({}, [], None, 7, "text", {"input": 7}, {"input": []}, {"input": [[1, 2]]}, {"input": "a", "x": 1}),
        {"input": "a", "dimensions": 3},
        {"input": "a", "model": "other"},
        {"input": picture_cut, "modality": "image"},
        {"input": "/etc/passwd", "modality": "image"},
        {"input": "http://169.254.169.254/latest", "modality": "image"},
        {"input": "\ud800"},
        {"input": "a" * 3000},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"images": picture_cut, "texts": "a"},
        {"query": "a", "documents": [{"image": picture_cut}, "b"]},
        {"images": "data:image/png;base64,", "texts": "<mask>", "top": choice.choice([0, -1, 10**30, 1.5])},
    ]
    path = choice.choice(["/v1/embeddings", "/v1/match", "/v1/rerank", "/v1/fill-mask", "/v1/answer", "/v1/search"])
    return await connection.send(request_bytes(path, choice.choice(bodies)))


async def broken_json(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends bytes that are no JSON."""
    content = choice.choice([b"{", b"[" * 50_000, b'{"input": ' + b"9" * 9000 + b"}", choice.randbytes(500), b'"\xff"'])
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    return await connection.send(head.encode() + content)


async def no_http(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends what is not HTTP, or only almost."""
    sent = [choice.randbytes(300), b"GET\r\n\r\n", b"POST /v1/match HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
    sent += [b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"b" * 90_000 + b"\r\n\r\n"]
    return await connection.send(choice.choice(sent))


async def oversized(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends too much of something."""
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0"
    bodies: list[Any] = [
        {"input": "a" * 3_000_000},
        {"input": ["a"] * 1000},
        {"input": "a " * 9000, "truncate": choice.random() < 0.5},
        {"input": data_uri(bomb + choice.randbytes(100)), "modality": "image"},
        {"input": data_uri(picture(torch.Generator().manual_seed(0), 2048)), "modality": "image"},
        {"images": [data_uri(bomb)] * 20, "texts": ["a"] * 20, "all_pairs": True},
    ]
    return await connection.send(request_bytes("/v1/embeddings", choice.choice(bodies[:5])))


async def slow(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends a request in small parts, and perhaps never ends."""
    request = request_bytes("/v1/embeddings", {"input": "two dogs"})
    writer, parts = await connection.open(), [request[start : start + 20] for start in range(0, len(request), 20)]
    for part in parts[: choice.choice([len(parts), len(parts) - 1])]:
        writer.write(part)
        await asyncio.sleep(choice.random() * 0.3)
    return await connection.reply()


async def abandoned(connection: Connection, choice: random.Random) -> Reply | None:
    """Leaves after having sent all of a request or a part."""
    uris = [data_uri(picture(torch.Generator().manual_seed(choice.randrange(99)), 256))] * choice.randrange(1, 60)
    request = request_bytes("/v1/embeddings", {"input": uris, "modality": "image"})
    writer = await connection.open()
    writer.write(request[: choice.choice([50, 1000, len(request) // 2, len(request)])])
    await writer.drain()
    await asyncio.sleep(choice.random() * 0.05)
    return None


async def visit(connection: Connection, choice: random.Random) -> Reply | None:
    """Opens the page, uploads something, or presses a button and leaves."""
    session = f"{choice.randrange(10**9)}"
    body = {"data": [None, "two dogs"], "fn_index": choice.randrange(4), "session_hash": session}
    file = picture(torch.Generator().manual_seed(choice.randrange(99)), 128)[: choice.choice([100, None])]
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n' + file + b"\r\n--x--\r\n"
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(part)}\r\n"
    sent = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        head.encode() + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + part,
        request_bytes("/gradio_api/queue/join", body),
    ]
    reply = await connection.send(choice.choice(sent))
    if reply.status == 200 and b"event_id" in reply.body:
        writer = await connection.open()
        path = choice.choice(["queue/data?session_hash=", "heartbeat/"])
        writer.write(f"GET /gradio_api/{path}{session} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await asyncio.sleep(choice.random() * 0.3)
    return reply


async def burst(connection: Connection, choice: random.Random) -> Reply | None:
    """Asks for as much as is allowed, many times at once: the queue runs full."""
    request = request_bytes("/v1/embeddings", {"input": ["two dogs in the snow"] * choice.randrange(50, 200)})
    writer = await connection.open()
    writer.write(request * 4)
    replies = [await connection.reply() for _ in range(4)]
    return max(replies, key=lambda reply: reply.status)
