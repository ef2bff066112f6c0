"""What clients do that they should not: one coroutine function for each kind.

Where only some answers are right, the function itself says so with `expect`; an answer that shows a hole is an error.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import struct
import sys
import zlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import requests
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from serving_client import Connection, Reply, Server, data_uri, image, request_bytes

BadThing = Callable[[Connection, random.Random], Awaitable[Reply | None]]

BUSY = frozenset({429, 503})
"""Statuses that any request may be answered with when there is much to do."""

_MADE_UP = 25  # for each route, and each of what it allows and forbids


def bad_things(server: Server) -> dict[str, BadThing]:
    """Returns all of them by name."""
    requests_made = made_up_requests(server)

    async def made_up(connection: Connection, choice: random.Random) -> Reply | None:
        return await connection.send(choice.choice(requests_made))

    functions: list[BadThing] = [
        *(malformed, broken_json, no_http, oversized, slow, abandoned, visit, burst, made_up),
        *(
            old_page,
            odd_sources,
            far_url,
            many_pairs,
            long_lists,
            heavy_json,
            probed,
            silent,
            half_sent,
        ),
        *(
            other_sites,
            odd_images,
            endless,
            odd_filters,
            many_scans,
            stalled,
            two_lengths,
            short_chunks,
        ),
    ]

    async def not_indexed(connection: Connection, choice: random.Random) -> Reply | None:
        """Asks for images that are not in the index, and for those that are in ways that there are not."""
        odd = choice.choice(
            [
                "0" * 64,
                ids[0][:-1] + "g",
                ids[0].upper(),
                "../" + ids[0],
                "%2e%2e%2fetc%2fhostname",
                "",
            ]
        )
        size = choice.choice(
            ["", "?size=64", "?size=0", "?size=-1", "?size=99999999999999999999", "?size=a"]
        )
        return expect(await connection.send(head(f"GET /v1/images/{odd}{size}")), 400, 404)

    async def unread(connection: Connection, choice: random.Random) -> Reply | None:
        """Asks for images of the index many times and reads nothing."""
        writer = await connection.open()
        writer.write(head(f"GET /v1/images/{choice.choice(ids)}") * 20)
        await asyncio.sleep(3 * choice.random())
        return None

    ids = [
        example["id"]
        for example in requests.get(
            f"http://{server.host}:{server.port}/v1/index", timeout=60
        ).json()["examples"]
    ]
    functions += [not_indexed, unread]
    return {function.__name__: function for function in functions}


class HoleError(Exception):
    """An answer that should not have been given."""


def expect(reply: Reply, *statuses: int) -> Reply:
    """Returns a reply with one of some statuses, or that the server is busy.

    Raises:
        HoleError: It has another.
    """
    if reply.status not in (*statuses, *BUSY):
        raise HoleError(f"status {reply.status}, expected {statuses}: {reply.body[:200]!r}")
    return reply


def check_error(reply: Reply) -> None:
    """Checks that a reply that is an error has the API's form.

    Raises:
        HoleError: It has not.
    """
    if reply.status in (400, 431) and not reply.body:
        return  # of the HTTP library, to what is no HTTP
    if reply.status >= 400 and reply.headers.get("content-type") != "application/json":
        raise HoleError(f"status {reply.status} is no JSON: {reply.body[:200]!r}")
    if reply.status >= 400 and len(reply.body) > 2**16:
        raise HoleError(
            f"status {reply.status} with an error of {len(reply.body)} bytes: {reply.body[:200]!r}"
        )


def head(line: str, **headers: object) -> bytes:
    """Returns a request without a body."""
    lines = [f"{line} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def made_up_requests(server: Server) -> list[bytes]:
    """Returns requests that are made up from the description of the API, as it allows and as it forbids."""
    address = f"http://{server.host}:{server.port}"
    requests_made: list[bytes] = []
    usual = settings(max_examples=_MADE_UP, deadline=None, database=None, derandomize=True)
    for mode in schemathesis.GenerationMode:
        for result in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
            operation = cast(Any, result).ok()
            if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing to send

            @settings(usual, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def collect(case: Any) -> None:
                made: Any = requests.Request(**case.as_transport_kwargs(base_url=address)).prepare()
                body = made.body.encode() if isinstance(made.body, str) else made.body or b""
                lines = [f"{made.method} {made.path_url} HTTP/1.1", "Host: localhost"]
                lines += [f"{name}: {value}" for name, value in made.headers.items()]
                requests_made.append(
                    "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body
                )

            collect()
    return requests_made


async def malformed(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends JSON that is no request."""
    image_cut = data_uri(b"\xff\xd8\xff" + choice.randbytes(200))
    bodies: list[Any] = [
        *(
            {},
            [],
            None,
            7,
            "text",
            {"input": 7},
            {"input": []},
            {"input": [[1, 2]]},
            {"input": "a", "x": 1},
        ),
        {"input": "a", "dimensions": 3},
        {"input": "a", "model": "other"},
        {"input": image_cut, "modality": "image"},
        {"input": "/etc/passwd", "modality": "image"},
        {"input": "http://169.254.169.254/latest", "modality": "image"},
        {"input": "\ud800"},
        {"input": "a" * 3000},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"images": image_cut, "texts": "a"},
        {"query": "a", "documents": [{"image": image_cut}, "b"]},
        {
            "images": "data:image/png;base64,",
            "texts": "<mask>",
            "top": choice.choice([0, -1, 10**30, 1.5]),
        },
    ]
    path = choice.choice(
        ["/v1/embeddings", "/v1/match", "/v1/rerank", "/v1/fill-mask", "/v1/answer", "/v1/search"]
    )
    return await connection.send(request_bytes(path, choice.choice(bodies)))


async def broken_json(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends bytes that are no JSON, or that are nested deeper than anything is."""
    deep = choice.choice([b"[", b'{"a":', b"[[],"])
    content = choice.choice(
        [b"{", deep * 50_000, b'{"input": ' + b"9" * 9000 + b"}", choice.randbytes(500), b'"\xff"']
    )
    return expect(await connection.send(as_json("/v1/embeddings", content)), 400, 413)


def as_json(path: str, content: bytes) -> bytes:
    """Returns a POST of bytes that are called JSON."""
    return (
        head(f"POST {path}", Content_Type="application/json", Content_Length=len(content)) + content
    )


async def no_http(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends what is not HTTP, or only almost."""
    sent = [
        choice.randbytes(300) + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/match HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 900_000 + b"\r\n\r\n",
        head("GET /v1/models")[:-2] + b"Host: evil.example\r\n\r\n",
        head("POST /v1/match", Transfer_Encoding="gzip, chunked") + b"0\r\n\r\n",
    ]
    return expect(await connection.send(choice.choice(sent)), 400, 431)


async def oversized(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends too much of something."""
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0"
    bodies: list[Any] = [
        {"input": "a" * 3_000_000},
        {"input": ["a"] * 1000},
        {"input": "a " * 9000, "truncate": choice.random() < 0.5},
        {"input": data_uri(bomb + choice.randbytes(100)), "modality": "image"},
        {"input": data_uri(image(torch.Generator().manual_seed(0), 2048)), "modality": "image"},
        {"images": [data_uri(bomb)] * 20, "texts": ["a"] * 20, "all_pairs": True},
    ]
    return await connection.send(request_bytes("/v1/embeddings", choice.choice(bodies[:5])))


async def slow(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends a request in small parts, and perhaps never ends."""
    request = request_bytes("/v1/embeddings", {"input": "two dogs"})
    writer = await connection.open()
    pieces = [request[start : start + 20] for start in range(0, len(request), 20)]
    for piece in pieces[: choice.choice([len(pieces), len(pieces) - 1])]:
        writer.write(piece)
        await asyncio.sleep(choice.random() * 0.3)
    return await connection.reply()


async def abandoned(connection: Connection, choice: random.Random) -> Reply | None:
    """Leaves after having sent all of a request or a part."""
    uris = [
        data_uri(image(torch.Generator().manual_seed(choice.randrange(99)), 256))
    ] * choice.randrange(1, 60)
    request = request_bytes("/v1/embeddings", {"input": uris, "modality": "image"})
    writer = await connection.open()
    writer.write(request[: choice.choice([50, 1000, len(request) // 2, len(request)])])
    await writer.drain()
    await asyncio.sleep(choice.random() * 0.05)
    return None


async def visit(connection: Connection, choice: random.Random) -> Reply | None:
    """Opens the page, or follows a link to it."""
    link = {
        "Sec_Fetch_Site": "cross-site",
        "Sec_Fetch_Mode": "navigate",
        "Sec_Fetch_Dest": "document",
    }
    return expect(await connection.send(head("GET /", **choice.choice([{}, link]))), 200, 404)


async def old_page(connection: Connection, choice: random.Random) -> Reply | None:
    """Asks for routes of Gradio, which would open any file and fetch any URL."""
    session = f"{choice.randrange(10**9)}"
    file = {
        "path": choice.choice(["/etc/hostname", "/dev/zero", "/usr/share/pixmaps/a.png"]),
        "orig_name": "x.svg",
    }
    sent = [
        request_bytes(
            "/gradio_api/queue/join", {"data": [file, "a"], "fn_index": 0, "session_hash": session}
        ),
        request_bytes("/gradio_api/upload", {}),
        *map(
            head,
            [
                "GET /gradio_api/file=/etc/hostname",
                "GET /gradio_api/file=https://example.org/a.png",
                "GET /file=/etc/hostname",
                f"GET /gradio_api/queue/data?session_hash={session}",
                "GET /gradio_api/info",
                "GET /config",
                "GET /static/../../etc/hostname",
                "GET /%2e%2e/etc/hostname",
                "GET /page.js/../../../../etc/hostname",
            ],
        ),
    ]
    return expect(await connection.send(choice.choice(sent)), 404)


_SOURCES = (
    *(
        "/etc/hostname",
        "/dev/zero",
        "file:///etc/hostname",
        "../a.png",
        "file=/etc/hostname",
        "a.png",
        "",
        "data:,",
    ),
    *(
        "https://example.org/a.png",
        "HTTP://LOCALHOST/a.png",
        "ftp://example.org/a.png",
        "//example.org/a.png",
    ),
    *(f"http://{'a' * 2**20}/a.png", f"file:///{'a' * 2**20}"),
    *(
        "data:image/png,a",
        "data:text/plain;base64,YQ==",
        "data:image/png;base64;x,YQ==",
        "data:image/png;base64,*",
    ),
)
_ODD_FILES = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/hostname) (r) file\n",
    b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/hostname"/></svg>',
    b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1", "a c red", "a"};',
    b"\x59\xa6\x6a\x95" + struct.pack(">7I", 9000, 9000, 24, 0, 1, 0, 0),  # Sun raster
    b"SIMPLE  =                    T",
    b"MSP 1.0",
)


async def odd_sources(connection: Connection, choice: random.Random) -> Reply | None:
    """Names images by path or URL, and sends files in formats that are not taken."""
    odd = f"data:image/{choice.choice(['png', 'svg+xml', 'eps'])};base64,"
    source = choice.choice(
        [*_SOURCES, *(odd + base64.b64encode(file).decode() for file in _ODD_FILES)]
    )
    bodies: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": source, "modality": "image"},
        "/v1/match": {"images": [source], "texts": "a"},
        "/v1/rerank": {"query": "a", "documents": [{"image": source}]},
        "/v1/fill-mask": {"images": source, "texts": "<mask>"},
    }
    path = choice.choice(list(bodies))
    return expect(await connection.send(request_bytes(path, bodies[path])), 400)


async def far_url(connection: Connection, choice: random.Random) -> Reply | None:
    """Has the server fetch from a host that is allowed, but is at this machine."""
    body = {"input": f"http://localhost:{DRIP_PORT}/{choice.random()}.png", "modality": "image"}
    return expect(await connection.send(request_bytes("/v1/embeddings", body)), 400)


DRIP_PORT = 9
"""Of the host that the server is told to allow; the usual one for discarding what is sent."""


async def many_pairs(connection: Connection, choice: random.Random) -> Reply | None:
    """Asks for millions of pairs in a few kilobytes."""
    many = ["a"] * choice.choice([3000, 4096, 10_000])
    return expect(
        await connection.send(
            request_bytes("/v1/match", {"images": many, "texts": many, "all_pairs": True})
        ),
        413,
    )


async def long_lists(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends longer lists than there may be, to every route that takes one."""
    many: list[Any] = [choice.choice(["a", {"text": "a"}, 1, [], {}])] * choice.choice(
        [5000, 100_000]
    )
    bodies: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": many},
        "/v1/match": {"images": many, "texts": many},
        "/v1/rerank": {"query": "a", "documents": many},
        "/v1/fill-mask": {"images": "a", "texts": many},
    }
    path = choice.choice(list(bodies))
    return expect(await connection.send(request_bytes(path, bodies[path])), 400, 413)


def heavy_bodies(size: int) -> Mapping[str, bytes]:
    """Returns bodies of at most some bytes that give a parser, or what comes after it, as much to do as they can."""
    image_like = b'{"modality":"image","input":"data:image/png;base64,'

    def filled(before: bytes, piece: bytes, after: bytes) -> bytes:
        return before + piece * ((size - len(before) - len(after)) // len(piece)) + after

    most = 2**23 - 64  # bytes that strings with escapes may have in all
    return {
        "tiny strings": filled(b'{"input":["a"', b',"a"', b"]}"),
        "numbers": filled(b'{"input":[1', b",1", b"]}"),
        "lists": filled(b'{"input":[[]', b",[]", b"]}"),
        "fields": b'{"input":"a"'
        + b"".join(b',"%d":0' % number for number in range(16_000))
        + b"}",
        "depth": filled(b"", b"[", b""),
        "digits": filled(b'{"input":', b"9", b"}"),
        "white space": filled(b'{"input":"a"', b" ", b"}"),
        "base64": filled(image_like, b"iVBO", b'"}'),
        "base64 in parts": b'{"modality":"image","input":["'
        + b'","'.join([b"data:image/png;base64," + b"iVBO" * (size // 4000)] * 900)
        + b'"]}',
        "long name": filled(b'{"', b"a", b'":1}'),
        "escapes": filled(b'{"input":"', b"\\u00e9", b'"}'),
        "fewer escapes": (b'{"input":"' + b"\\u00e9" * (min(size, most) // 6))[: size - 9] + b'"}',
        "not ASCII": filled(b'{"input":"', "😀".encode(), b'"}'),
        "less that is not ASCII": b'{"input":"'
        + "😀".encode() * (min(size, most) // 4 - 4)
        + b'"}',
        "long texts": b'{"truncate":true,"input":["'
        + b'","'.join([b"a b " * 4990] * (size // 20_000))
        + b'"]}',
    }


_HEAVY: dict[str, bytes] = {}


async def heavy_json(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends a body that would take long to parse."""
    if not _HEAVY:
        _HEAVY.update(heavy_bodies(2**21))
    body = _HEAVY[choice.choice(list(_HEAVY))]
    return expect(await connection.send(as_json("/v1/embeddings", body)), 200, 400, 413)


async def probed(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends bodies to where none is read."""
    path = choice.choice(["/health", "/ready"])
    method = choice.choice(["POST", "PUT", "DELETE", "GET", "HEAD"])
    length = (
        {"Content_Length": 2**21} if choice.random() < 0.7 else {"Transfer_Encoding": "chunked"}
    )
    writer = await connection.open()
    writer.write(head(f"{method} {path}", **length) + b"a" * 1000 * ("Content_Length" in length))
    return expect(
        await connection.reply(with_body=method != "HEAD"),
        400 if method in ("GET", "HEAD") else 405,
    )


async def silent(connection: Connection, choice: random.Random) -> Reply | None:
    """Opens connections, many of them, and sends nothing or half of a request. Meanwhile the server answers others."""
    connections = [Connection(connection.server) for _ in range(120)]
    try:
        for silent_connection in connections:
            (await silent_connection.open()).write(
                choice.choice([b"", b"G", b"POST /v1/match HTTP/1.1\r\nHost: localhost\r\n"])
            )
        await asyncio.sleep(5 * choice.random())
        reply = await connection.send(head("GET /health"))
        if reply.status != 200:
            raise HoleError(f"/health has status {reply.status} beside silent connections")
        return reply
    finally:
        for silent_connection in connections:
            silent_connection.close()


async def half_sent(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends half of the headers and waits until the connection is closed."""
    writer = await connection.open()
    writer.write(head("GET /health")[: choice.choice([1, 10, 30])])
    # it ends without one
    raise HoleError(f"half of a head is answered: {await connection.reply()}")


async def other_sites(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends what a page of another site makes a browser send."""
    path = choice.choice(
        [
            "GET /v1/models",
            "GET /metrics",
            "GET /health",
            "POST /v1/embeddings",
            "GET /openapi.json",
        ]
    )
    site = {"Sec_Fetch_Site": choice.choice(["cross-site", "same-site"])}
    modes = [
        {},
        {"Sec_Fetch_Mode": "no-cors"},
        {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"},
    ]
    headers = choice.choice(
        [site | choice.choice(modes), {"Origin": "https://evil.example"}, {"Origin": "null"}]
    )
    return expect(await connection.send(head(path, **headers)), 403)


def _png(width: int, height: int, depth: int, kind: int, channels: int) -> bytes:
    """Returns a PNG of one colour, made without the memory that it takes once it is decoded."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    packed = zlib.compressobj(9)
    row = bytes(1 + width * channels * depth // 8)
    pixels = b"".join([*(packed.compress(row) for _ in range(height)), packed.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def _nested_icon(inside: bytes) -> bytes:
    """Returns an icon that claims 16 x 16 pixels and holds a file with more."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside), 22) + inside


def _wide_gif() -> bytes:
    stream = io.BytesIO()
    Image.new("P", (1, 1)).save(stream, "GIF")
    content = bytearray(stream.getvalue())
    content[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(content)


_PICTURES = {
    "icon": (_nested_icon(_png(3000, 3000, 8, 2, 3)), (400,)),
    "wide GIF": (_wide_gif(), (400,)),
    "too large": (_png(2100, 2100, 8, 0, 1), (400,)),
    "16-bit grey": (_png(1990, 2000, 16, 0, 1), (200, 400)),
    "RGBA": (_png(1990, 2000, 8, 6, 4), (200, 400)),
}


async def odd_images(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends images that claim fewer pixels than they have, or take more memory than others of their size."""
    content, statuses = _PICTURES[choice.choice(list(_PICTURES))]
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    return expect(
        await connection.send(request_bytes("/v1/embeddings", {"input": uri, "modality": "image"})),
        *statuses,
    )


_FILTERS = (
    *(
        "length(repeat('a', 10000000000)) > 0",
        "width > 0 /* ' */ and now() > mtime",
        "width -- comment",
        "digest = 'a'",
    ),
    *(
        "width > 1; drop table x",
        "mtime > timestamp '99999-01-01'",
        "path like repeat('%', 99)",
        "width in ()",
        "'",
    ),
    *(
        "(" * 200 + "width" + ")" * 200,
        "width / 0 > 1",
        "array_has(captions, 3)",
        "path = 'a\x1b[2J' or",
        "captions = 'a'",
    ),
)


async def odd_filters(connection: Connection, choice: random.Random) -> Reply | None:
    """Searches with conditions that are none, or that would take long or tell of what is not theirs."""
    body = {"query": "a", "where": choice.choice(_FILTERS)}
    reply = expect(await connection.send(request_bytes("/v1/search", body)), 400)
    if any(word in reply.body for word in (b".rs", b"LanceError", b".cargo")):
        raise HoleError(f"the sources of a library are told of: {reply.body[:200]!r}")
    return reply


def _many_scans(side: int, count: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + count * last + content[-2:]


_SCANS = [
    (_many_scans(64, 500), (200, 400)),
    (_many_scans(1990, 60), (200, 400)),
    (_many_scans(1990, 2000), (400,)),
]


async def many_scans(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends a JPEG of many scans, each of which takes the time of an image."""
    content, statuses = choice.choice(_SCANS)
    body = {"input": data_uri(content), "modality": "image"}
    return expect(await connection.send(request_bytes("/v1/embeddings", body)), *statuses)


async def stalled(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends halves of large bodies and no more. Meanwhile the server reads a small one."""
    connections = [Connection(connection.server) for _ in range(10)]
    content = head("POST /v1/match", Content_Type="application/json", Content_Length=2**21) + bytes(
        2**20
    )
    try:
        for stalled_connection in connections:
            (await stalled_connection.open()).write(content)
        await asyncio.sleep(2 * choice.random())
        reply = expect(await connection.send(request_bytes("/v1/embeddings", {"input": "a"})), 200)
        if b"too many large requests" in reply.body:
            raise HoleError("a small body has no room beside large ones")
        return reply
    finally:
        for stalled_connection in connections:
            stalled_connection.close()


async def two_lengths(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends a request whose length is given twice, with another one in what would be left over."""
    second = choice.choice(["Content-Length: 5", "Transfer-Encoding: chunked"])
    lines = [
        "POST /v1/embeddings HTTP/1.1",
        "Host: localhost",
        "Content-Length: 60",
        second,
        "",
        "",
    ]
    writer = await connection.open()
    writer.write("\r\n".join(lines).encode() + b"0\r\n\r\n" + head("GET /v1/models"))
    return expect(await connection.reply(), 400)


async def endless(connection: Connection, choice: random.Random) -> Reply | None:
    """Goes on sending a body after it was refused, until it is cut off."""
    writer = await connection.open()
    writer.write(head("POST /v1/embeddings", Transfer_Encoding="chunked"))
    content = b"10000\r\n" + bytes(2**16) + b"\r\n"
    reply: Reply | None = None
    for _ in range(200):
        writer.write(content)
        await writer.drain()
    reply = expect(await connection.reply(), 413)
    await asyncio.sleep(choice.random())
    return reply


async def short_chunks(connection: Connection, choice: random.Random) -> Reply | None:
    """Sends what takes long to read for its length: chunks of one byte, or many short headers or trailers."""
    path = choice.choice(["POST /health", "POST /v1/embeddings"])
    chunked = head(path, Transfer_Encoding="chunked")
    many = b"a:b\r\n" * choice.choice([200, 50_000])
    sent = [
        chunked + b"1\r\na\r\n" * 43_000,
        chunked + b"0\r\n" + many + b"\r\n",
        chunked[:-2] + many + b"\r\n",
    ]
    return expect(await connection.send(choice.choice(sent)), 400, 405, 431)


async def burst(connection: Connection, choice: random.Random) -> Reply | None:
    """Asks for as much as is allowed, many times at once: the queue runs full."""
    request = request_bytes(
        "/v1/embeddings", {"input": ["two dogs in the snow"] * choice.randrange(50, 200)}
    )
    writer = await connection.open()
    writer.write(request * 4)
    replies = [await connection.reply() for _ in range(4)]
    return max(replies, key=lambda reply: reply.status)
