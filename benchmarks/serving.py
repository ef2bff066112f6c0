"""Throughput and latency of the server with 1, 8 and 64 clients against one request at a time.

Three servers run at once and take turns, so that what else the machine does meets all of them: a plain one that handles
a request from start to end before the next (benchmarks/serving_plain.py), `bridgetower serve --max-batch 1`, and
`bridgetower serve`. The model is the nano model with random weights, or --model.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
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


def requests_of(kind: str) -> list[bytes]:
    """Returns requests of a kind, all different."""
    generator = torch.Generator().manual_seed(0)
    texts = [text(generator) for _ in range(DISTINCT)]
    uris = [data_uri(image(generator)) for _ in range(DISTINCT)]
    made = {
        "texts": [request_bytes("/v1/embeddings", {"input": one}) for one in texts],
        "images": [request_bytes("/v1/embeddings", {"input": uri, "modality": "image"}) for uri in uris],
        "matches": [
            request_bytes("/v1/match", {"images": uri, "texts": one}) for uri, one in zip(uris, texts, strict=True)
        ],
    }
    mixed = [one for trio in zip(*made.values(), strict=True) for one in trio]
    return {**made, "all three": mixed}[kind]


async def measure(server: Server, requests: Sequence[bytes], clients: int, seconds: float) -> tuple[float, list[float]]:
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


def compare(servers: dict[str, Server], kind: str, clients: int, seconds: float, rounds: int) -> list[dict[str, Any]]:
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


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a line for each way, and how many times the first one's throughput it has."""
    for row in rows:
        times = row["requests_per_second"] / rows[0]["requests_per_second"]
        about = f"{row['kind']:10} {row['clients']:3} clients  {row['way']:14}"
        print(
            f"{about}{row['requests_per_second']:7.0f}/s{row['p50_ms']:8.1f}{row['p99_ms']:8.1f} ms{times:6.2f} times"
        )


def main() -> None:
    """Measures, prints a table (median and 99th percentile of the latency) and, if asked to, writes a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="what to serve; default: the nano model with random weights")
    parser.add_argument("--kinds", nargs="+", default=["texts", "images", "matches", "all three"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each figure")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each server within these seconds")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model = options.model or write_nano(folder / "nano")
        ways = {
            "one at a time": ("benchmarks/serving_plain.py", str(model)),
            "--max-batch 1": bridgetower_serve(model, "--no-page", "--max-batch", "1"),
            "batches": bridgetower_serve(model, "--no-page"),
        }
        servers = {way: stack.enter_context(running(folder / f"{way}.log", *started)) for way, started in ways.items()}
        for kind, clients in itertools.product(options.kinds, options.clients):
            found = compare(servers, kind, clients, options.seconds, options.rounds)
            rows += found
            show(found)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
