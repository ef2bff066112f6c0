"""Throughput and latency of the server, and what a greedy client costs the others: python benchmarks/serving.py.

`throughput`: 1, 8 and 64 clients against one request at a time. Three servers run at once and take turns, so that what
else the machine does meets all of them: a plain one that handles a request from start to end before the next
(benchmarks/serving_plain.py), `bridgetower serve --max-batch 1`, and `bridgetower serve`.

`greedy`: ten clients with addresses of their own (Linux). Nine send a text five times a second; one sends as much as it
can, from another process. Times of the nine's texts are divided by the median time of one client's texts alone, before
and after. All processes share the machine's cores, with equal priority, so that the longest times are not the server's
alone; the load average of the machine stands beside them.

The model is the nano model with random weights, or --model.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from serving_client import (
    Connection,
    Server,
    bridgetower_serve,
    data_uri,
    image,
    request_bytes,
    running,
    text,
    write_nano,
)

DISTINCT = 64  # requests of each kind
NUM_OTHERS = 9  # clients beside the greedy one
PAUSE = 0.2  # seconds on average between two texts of one of them
GREEDY = "127.0.0.2"
PARTS = ("throughput", "greedy")


def requests_of(kind: str) -> list[bytes]:
    """Returns requests of a kind, all different."""
    generator = torch.Generator().manual_seed(0)
    texts = [text(generator) for _ in range(DISTINCT)]
    uris = [data_uri(image(generator)) for _ in range(DISTINCT)]
    made = {
        "texts": [request_bytes("/v1/embeddings", {"input": one}) for one in texts],
        "images": [
            request_bytes("/v1/embeddings", {"input": uri, "modality": "image"}) for uri in uris
        ],
        "matches": [
            request_bytes("/v1/match", {"images": uri, "texts": one})
            for uri, one in zip(uris, texts, strict=True)
        ],
    }
    mixed = [one for trio in zip(*made.values(), strict=True) for one in trio]
    return {**made, "all three": mixed}[kind]


async def measure(
    server: Server, requests: Sequence[bytes], clients: int, seconds: float
) -> tuple[float, list[float]]:
    """Lets clients ask for some seconds, each again as soon as it is answered; returns seconds and latencies."""
    latencies: list[float] = []
    turn, connections = itertools.cycle(requests), [Connection(server) for _ in range(clients)]
    await asyncio.gather(*(connection.send(next(turn)) for connection in connections))
    began = time.perf_counter()

    async def client(connection: Connection) -> None:
        while time.perf_counter() - began < seconds:
            start = time.perf_counter()
            reply = await connection.send(next(turn))
            assert reply.status == 200, reply
            latencies.append(time.perf_counter() - start)
        connection.close()

    await asyncio.gather(*map(client, connections))
    return time.perf_counter() - began, latencies


def compare(
    servers: dict[str, Server], kind: str, clients: int, seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """Measures both ways in turn."""
    requests = requests_of(kind)
    times: dict[str, float] = dict.fromkeys(servers, 0.0)
    latencies: dict[str, list[float]] = {way: [] for way in servers}
    for server in servers.values():
        asyncio.run(measure(server, requests, clients, 0.3))
    for _ in range(rounds):
        for way, server in servers.items():
            taken, found = asyncio.run(measure(server, requests, clients, seconds / rounds))
            times[way] += taken
            latencies[way] += found
    rows = []
    for way, found in latencies.items():
        cuts = statistics.quantiles(found, n=100)
        rate = len(found) / times[way]
        row = {"kind": kind, "clients": clients, "way": way, "requests_per_second": rate}
        rows.append({**row, "p50_ms": 1e3 * cuts[49], "p99_ms": 1e3 * cuts[98]})
    return rows


def greedy_requests() -> dict[str, tuple[int, list[bytes]]]:
    """Returns the ways to be greedy: how many connections send which requests again and again."""
    generator = torch.Generator().manual_seed(1)
    small = [data_uri(image(generator)) for _ in range(32)]
    large = data_uri(image(generator, 4096))
    texts = [text(generator) for _ in range(1024)]
    masked = " ".join(["<mask>"] * 48)
    explained = {"image": small[0], "text": texts[0], "method": "gradcam"}
    pairs = {"images": small, "texts": texts[:32], "all_pairs": True}
    filled = {"images": small, "texts": [masked] * 32, "top": 50}
    return {
        "300 explanations": (300, [request_bytes("/v1/explain", explained)]),
        "2 x 1,024 pairs": (2, [request_bytes("/v1/match", pairs)]),
        "600 connections": (
            600,
            [request_bytes("/v1/embeddings", {"input": one}) for one in texts],
        ),
        "large images": (
            32,
            [request_bytes("/v1/embeddings", {"input": large, "modality": "image"})],
        ),
        "long fill-mask": (8, [request_bytes("/v1/fill-mask", filled)]),
        "2 x 1,024 texts": (2, [request_bytes("/v1/embeddings", {"input": texts})]),
    }


def be_greedy(server: Server, num_connections: int, requests: Sequence[bytes]) -> None:
    """Sends requests without end; what is refused is sent again after a moment."""
    turn = itertools.cycle(requests)

    async def client() -> None:
        connection = Connection(server, GREEDY)
        while True:
            try:
                reply = await connection.send(next(turn))
            except (OSError, asyncio.IncompleteReadError):  # closed after an error
                connection.close()
                await asyncio.sleep(0.1)
                continue
            if reply.status != 200:
                await asyncio.sleep(0.1)

    async def all_clients() -> None:
        await asyncio.gather(*(client() for _ in range(num_connections)))

    asyncio.run(all_clients())


async def text_times(server: Server, clients: int, seconds: float) -> tuple[list[float], int]:
    """Lets clients send a text now and then; returns the times of the answers, and how many were refused."""
    requests = itertools.cycle(requests_of("texts"))
    choice = random.Random(0)
    times: list[float] = []
    num_refused = 0

    async def client(number: int) -> None:
        nonlocal num_refused
        connection = Connection(server, f"127.0.0.{number + 3}")
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            await asyncio.sleep(choice.uniform(0, 2 * PAUSE))
            start = time.perf_counter()
            reply = await connection.send(next(requests))
            times.append(time.perf_counter() - start)
            num_refused += reply.status != 200
        connection.close()

    await asyncio.gather(*map(client, range(clients)))
    return times, num_refused


def measure_greedy(folder: Path, model: Path, seconds: float) -> list[dict[str, Any]]:
    """Measures texts of one client alone, then of nine beside each greedy one; prints a line for each."""
    rows: list[dict[str, Any]] = []
    print(
        f"{'texts beside':18}{'sent':>6}{'refused':>9}{'median':>9}{'95 %':>9}{'longest':>9} ms   times alone"
    )
    for way, load in greedy_requests().items():
        with running(folder / "greedy.log", *bridgetower_serve(model, "--no-page")) as server:
            asyncio.run(text_times(server, NUM_OTHERS, 2.0))  # warms it
            alone, _ = asyncio.run(text_times(server, 1, seconds / 2))
            greedy = multiprocessing.get_context("fork").Process(
                target=be_greedy, args=(server, *load), daemon=True
            )
            greedy.start()
            time.sleep(2.0)  # until its work is queued
            times, num_refused = asyncio.run(text_times(server, NUM_OTHERS, seconds))
            greedy.kill()
            greedy.join()
            time.sleep(2.0)  # until the server has seen that it left
            alone += asyncio.run(text_times(server, 1, seconds / 2))[0]
        load_average = os.getloadavg()[0]
        cuts = statistics.quantiles(times, n=20)
        alone_ms = 1e3 * statistics.median(alone)
        row = {
            "way": way,
            "texts": len(times),
            "refused": num_refused,
            "alone_ms": alone_ms,
            "load_average": load_average,
        }
        for name, value in {
            "median": statistics.median(times),
            "p95": cuts[18],
            "longest": max(times),
        }.items():
            row[f"{name}_ms"] = 1e3 * value
            row[f"{name}_times"] = 1e3 * value / alone_ms
        rows.append(row)
        names = ("median", "p95", "longest")
        shown = "".join(f"{row[f'{name}_ms']:9.1f}" for name in names)
        ratios = " / ".join(f"{row[f'{name}_times']:.1f}" for name in names)
        print(
            f"{way:18}{len(times):6}{num_refused:9}{shown}      {ratios} of {alone_ms:.1f} ms, load {load_average:.0f}",
            flush=True,
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a line for each way, and how many times the first one's throughput it has."""
    for row in rows:
        times = row["requests_per_second"] / rows[0]["requests_per_second"]
        about = f"{row['kind']:10} {row['clients']:3} clients  {row['way']:14}"
        print(
            f"{about}{row['requests_per_second']:7.0f}/s{row['p50_ms']:8.1f}{row['p99_ms']:8.1f} ms{times:6.2f} times"
        )


def main() -> None:
    """Measures, prints tables (throughput with the median and 99th percentile) and, if asked to, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    parser.add_argument(
        "--model", type=Path, help="what to serve; default: the nano model with random weights"
    )
    parser.add_argument("--kinds", nargs="+", default=["texts", "images", "matches", "all three"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each figure")
    parser.add_argument(
        "--rounds", type=int, default=2, help="turns of each server within these seconds"
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or write_nano(folder / "nano")
        if "throughput" in options.parts:
            found["throughput"] = measure_throughput(folder, model, options)
        if "greedy" in options.parts:
            found["greedy"] = measure_greedy(folder, model, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


def measure_throughput(
    folder: Path, model: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measures all kinds and numbers of clients, and prints a line for each way."""
    rows: list[dict[str, Any]] = []
    ways = {
        "one at a time": ("benchmarks/serving_plain.py", str(model)),
        "--max-batch 1": bridgetower_serve(model, "--no-page", "--max-batch", "1"),
        "batches": bridgetower_serve(model, "--no-page"),
    }
    with ExitStack() as stack:
        servers = {
            way: stack.enter_context(running(folder / f"{way}.log", *started))
            for way, started in ways.items()
        }
        for kind, clients in itertools.product(options.kinds, options.clients):
            found = compare(servers, kind, clients, options.seconds, options.rounds)
            rows += found
            show(found)
    return rows


if __name__ == "__main__":
    main()
