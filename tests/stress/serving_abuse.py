"""Minutes of valid and of hostile requests: python tests/stress/serving_abuse.py --minutes 10.

The hostile ones are malformed, oversized, slow, abandoned, made up from the description of the API, or try to reach
what is not theirs (`malformed_requests.py`). It fails unless all of this holds: no answer has a status from 500 on but
503, every error has the API's form, no hostile request gets what it is after, every valid one is answered as the model
answers when it is called directly, `/health` is answered beside all of it, memory stays where it is, and the server
ends cleanly. Caches of kernels per shape are small there: they are full early, and what grows after that is a leak.

Before that, it sends the heaviest bodies that a server with the usual limits reads, three times, and says how long
`/health` took at most beside each: the median of the three, at most 0.2 s (`--delay`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from malformed_requests import (
    DRIP_PORT,
    BadThing,
    HoleError,
    as_json,
    bad_things,
    check_error,
    head,
    heavy_bodies,
)

from bridgetower.inference.predictor import Predictor, load
from bridgetower.search.build import build_index
from bridgetower.search.searcher import Searcher

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from serving_client import (
    Connection,
    Reply,
    Server,
    bridgetower_serve,
    data_uri,
    image,
    request_bytes,
    running,
    text,
    write_nano,
)

LIMITS = (
    "--max-body",
    "2",
    "--max-items",
    "200",
    "--queue",
    "256",
    "--timeout",
    "10",
    "--max-pixels",
    "4",
)
ALLOWED = ("--allow-host", f"localhost:{DRIP_PORT}")
GOOD = 24
BAD = 24  # clients
TOLERANCE = 1e-4
INDEXED = 40  # images
SMALL_CACHES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


@dataclass
class Found:
    """What happened.

    Attributes:
        statuses: Answers by what was sent and status.
        wrong: Valid requests whose answer was not the model's.
        holes: Hostile requests that got what they should not.
        memory: Bytes of the server, every second.
        sent: Requests that had been answered by then.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    holes: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Valid:
    """A request, and the numbers that it must be answered with."""

    request: bytes
    numbers: Callable[[Any], list[float]]
    expected: list[float]


def indexed(model: Predictor, folder: Path) -> Searcher:
    """Makes an index of some images, and returns what searches it."""
    generator = torch.Generator().manual_seed(2)
    folder.mkdir()
    for number in range(INDEXED):
        (folder / f"{number:02}.jpg").write_bytes(image(generator, 64))
        (folder / f"{number:02}.txt").write_text(text(generator))
    build_index(folder, folder.with_suffix(".lance"), model)
    return Searcher(folder.with_suffix(".lance"), model)


def valid_requests(model: Predictor, searcher: Searcher) -> list[Valid]:
    """Returns requests of every kind with what the predictor says itself."""
    generator = torch.Generator().manual_seed(1)
    texts = [text(generator, 3 + number % 9) for number in range(40)]
    files = [image(generator, 32 + 32 * (number % 4)) for number in range(40)]
    uris = [data_uri(file) for file in files]

    def vectors(answer: Any) -> list[float]:
        return [value for row in answer["data"] for value in row["embedding"]]

    made = []
    for n in range(40):
        rows = slice(n, n + 1 + n % 7)
        body: dict[str, Any] = {"input": texts[rows]}
        made.append(("/v1/embeddings", body, vectors, model.embed_texts(texts[rows])))
        body = {"input": uris[rows], "modality": "image"}
        made.append(("/v1/embeddings", body, vectors, model.embed_images(files[rows])))
        contents = [
            {"type": "image_url", "image_url": {"url": uris[n]}},
            {"type": "text", "text": texts[n]},
        ]
        body = {"messages": [{"role": "user", "content": contents}]}
        made.append(("/v1/embeddings", body, vectors, model.embed_pairs(files[n], texts[n])))
        body = {"images": uris[rows], "texts": texts[n], "all_pairs": True}
        scores = model.match(files[rows], [texts[n]], all_pairs=True)
        made.append(
            ("/v1/match", body, lambda answer: [row["score"] for row in answer["data"]], scores)
        )
        body = {"query": texts[n], "documents": uris[rows]}
        made.append(("/v1/rerank", body, _by_index, scores))
        masked = f"{texts[n]} <mask>"
        words = model.fill_mask(files[n], masked, top=3)[0]
        body = {"images": uris[n], "texts": masked, "top": 3}
        made.append(
            ("/v1/fill-mask", body, _words, torch.tensor([word.probability for word in words]))
        )
        hits = searcher.search(texts[n], top=5, rerank=8, where="width >= 8")
        body = {"query": texts[n], "top": 5, "rerank": 8, "where": {"width": {"gte": 8}}}
        expected_scores = torch.tensor([hit.score for hit in hits])
        made.append(
            (
                "/v1/search",
                body,
                lambda answer: [row["score"] for row in answer["data"]],
                expected_scores,
            )
        )
    return [
        Valid(request_bytes(path, body), numbers, expected.flatten().tolist())
        for path, body, numbers, expected in made
    ]


def _by_index(answer: Any) -> list[float]:
    rows = sorted(answer["results"], key=lambda row: row["index"])
    return [row["relevance_score"] for row in rows]


def _words(answer: Any) -> list[float]:
    return [word["probability"] for word in answer["data"][0]["masks"][0]]


async def good_client(
    server: Server, requests: list[Valid], findings: Found, until: float, seed: int
) -> None:
    """Sends valid requests, comes back when told to, and checks every answer."""
    choice = random.Random(seed)
    connection = Connection(server)
    while time.monotonic() < until:
        valid = choice.choice(requests)
        reply = await connection.send(valid.request)
        findings.statuses["valid", reply.status] += 1
        if reply.status in (429, 503):
            connection.close()  # which the server would do in a long wait
            await asyncio.sleep(choice.random() * float(reply.headers["retry-after"]))
        elif reply.status != 200 or _differs(valid, reply):
            findings.wrong.append(f"{reply.status} {reply.body[:200]!r}")
        await asyncio.sleep(choice.random() * 0.05)
    connection.close()


def _differs(valid: Valid, reply: Reply) -> bool:
    numbers = valid.numbers(reply.json())
    pairs = zip(numbers, valid.expected, strict=False)
    return len(numbers) != len(valid.expected) or any(
        abs(value - other) > TOLERANCE for value, other in pairs
    )


async def bad_client(
    server: Server, things: Mapping[str, BadThing], findings: Found, until: float, seed: int
) -> None:
    """Does one bad thing after the other."""
    choice = random.Random(seed)
    while time.monotonic() < until:
        name = choice.choice(list(things))
        connection = Connection(server)
        try:
            reply = await asyncio.wait_for(things[name](connection, choice), 30)
            if reply is not None:
                check_error(reply)
            findings.statuses[name, 0 if reply is None else reply.status] += 1
        except HoleError as hole:
            findings.holes.append(f"{name}: {hole}")
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            findings.statuses[name, 0] += 1  # cut off, as who behaves like this may be
        connection.close()
        await asyncio.sleep(choice.random() * 0.05)


async def abuse(server: Server, requests: list[Valid], seconds: float) -> Found:
    """Runs all clients and watches the memory."""
    things = bad_things(server)
    findings = Found()
    until = time.monotonic() + seconds

    async def watch() -> None:
        while time.monotonic() < until:
            findings.memory.append(server.memory())
            findings.sent.append(findings.statuses.total())
            probe = Connection(server)
            reply = await asyncio.wait_for(probe.send(head("GET /health")), 30)
            findings.statuses["health", reply.status] += 1
            probe.close()
            await asyncio.sleep(1)

    good = (good_client(server, requests, findings, until, seed) for seed in range(GOOD))
    bad = (bad_client(server, things, findings, until, GOOD + seed) for seed in range(BAD))
    await asyncio.gather(watch(), *good, *bad)
    return findings


async def delays(server: Server, seconds: float) -> dict[str, float]:
    """Returns the longest time that `/health` took, in milliseconds, while each of the heaviest bodies was read.

    Args:
        server: That is asked.
        seconds: For which it is asked, where a body is read sooner.
    """
    longest = {}
    for name, body in {"nothing": b"", **heavy_bodies(32 * 2**20)}.items():
        begin = time.monotonic()
        connection = Connection(server)
        sent = (
            asyncio.to_thread(send_whole, server, as_json("/v1/embeddings", body))
            for _ in range(2 if body else 0)
        )
        sending = [asyncio.ensure_future(request) for request in sent]
        times = []
        while not all(request.done() for request in sending) or time.monotonic() < begin + seconds:
            asked_at = time.perf_counter()
            await connection.send(head("GET /health"))
            times.append(1000 * (time.perf_counter() - asked_at))
            await asyncio.sleep(0.002)
        longest[name] = max(times)
    return longest


def send_whole(server: Server, request: bytes) -> None:
    """Sends a request without holding up this program's own event loop, and waits until the answer begins."""
    with (
        socket.create_connection((server.host, server.port)) as connection,
        suppress(ConnectionError),
    ):
        connection.sendall(request)
        connection.recv(1)


def verdict(findings: Found, slow: list[str], log: str, growth: float) -> dict[str, Any]:
    """Returns the figures, and what is wrong with them.

    Memory is compared from the third tenth of the time on, when everything has been used.
    """
    tenth = max(1, len(findings.memory) // 10)
    early = statistics.median(findings.memory[2 * tenth : 3 * tenth])
    late = statistics.median(findings.memory[-tenth:])
    failures = {
        key: number for key, number in findings.statuses.items() if key[1] >= 500 and key[1] != 503
    }
    problems = [f"/health took too long beside {name}" for name in slow]
    if failures:
        problems.append(f"answers that are failures of the server: {failures}")
    if findings.wrong:
        problems.append(
            f"{len(findings.wrong)} valid requests not answered as the model answers: {findings.wrong[:3]}"
        )
    if findings.holes:
        problems.append(
            f"{len(findings.holes)} hostile requests got what they should not: {sorted(set(findings.holes))[:10]}"
        )
    if set(findings.statuses) & {("health", status) for status in range(201, 600)}:
        problems.append("/health was not always answered")
    if late > growth * early:
        problems.append(f"memory grew from {early} to {late} bytes")
    if "Traceback" in log or " ERROR " in log:
        problems.append("the log has failures")
    if not log.rstrip().endswith("stopped"):
        problems.append("the server did not stop as it should")
    return {
        "valid_answered": findings.statuses["valid", 200],
        "valid_told_to_come_back": findings.statuses["valid", 429]
        + findings.statuses["valid", 503],
        "statuses": {
            f"{name} {status}": number
            for (name, status), number in sorted(findings.statuses.items())
        },
        "memory_mib": {
            "early": early / 2**20,
            "late": late / 2**20,
            "most": max(findings.memory) / 2**20,
        },
        "memory_by_minute": memory_by_minute(findings),
        "problems": problems,
    }


def memory_by_minute(findings: Found) -> list[dict[str, float]]:
    """Returns for every minute the requests until its end, the median memory, and what a thousand requests added."""
    rows: list[dict[str, float]] = []
    for start in range(0, len(findings.memory), 60):
        row = {
            "requests": findings.sent[start : start + 60][-1],
            "mib": statistics.median(findings.memory[start : start + 60]) / 2**20,
        }
        if rows:
            grown = row["mib"] - rows[-1]["mib"]
            sent = row["requests"] - rows[-1]["requests"]
            row["mib_per_1000"] = 1000 * grown / max(1, sent)
        rows.append(row)
    return rows


def main() -> None:
    """Runs, prints the findings and, with an option, writes them as JSON. The exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--delay", type=float, default=200.0, help="of /health in ms that is let pass"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the heaviest bodies")
    parser.add_argument(
        "--beside",
        type=float,
        default=1.0,
        help="seconds at least for which /health is asked there",
    )
    parser.add_argument(
        "--growth", type=float, default=1.05, help="of memory that is taken for none"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_nano(folder / "nano")
        log = folder / "log"
        searcher = indexed(load(model, device="cpu"), folder / "photos")
        requests = valid_requests(searcher.predictor, searcher)
        with running(folder / "usual", *bridgetower_serve(model)) as server:
            rounds = [asyncio.run(delays(server, options.beside)) for _ in range(options.rounds)]
        slowest = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
        slow = [name for name, longest in slowest.items() if longest > options.delay]
        index = ("--index", searcher.index.uri)
        with running(
            log, *bridgetower_serve(model, *index, *LIMITS, *ALLOWED), environment=SMALL_CACHES
        ) as server:
            findings = asyncio.run(abuse(server, requests, 60 * options.minutes))
        figures = {
            "minutes": options.minutes,
            "longest_health_ms": slowest,
            **verdict(findings, slow, log.read_text(), options.growth),
        }
    for row, number in figures["statuses"].items():
        print(f"{row:24}{number:9}")
    print(
        json.dumps({name: value for name, value in figures.items() if name != "statuses"}, indent=2)
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    raise SystemExit(1 if figures["problems"] else 0)


if __name__ == "__main__":
    main()
