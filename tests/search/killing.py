"""Builds an index in forked processes that are killed at random moments, completes it, and reports what happened.

Called as `python killing.py MODEL PHOTOS FOLDER`; PHOTOS are changed before every attempt. The heavy imports happen
once, here; every attempt is a process of its own that builds the index, as if it had been started from a shell. One
that is through waits to be killed.
"""

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from bridgetower.predictor import load
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index
from kills import before, send, within

NUM_KILLS = 16
NUM_CHANGED = 10  # images, before each attempt
OFTEN = IndexConfig(batch_size=1, commit_seconds=0, num_workers=0)  # a commit per image


def in_a_process(work: Callable[[], object]) -> int:
    """Starts a process that does some work; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def end(process: int) -> int:
    """Waits for the end; returns the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def change(photos: Path, source: random.Random) -> None:
    """Paints some images anew, takes one away and brings a new one."""
    there = sorted(photos.glob("*.png"))
    for path in source.sample(there, NUM_CHANGED):
        Image.new("RGB", (24, 24), tuple(source.randbytes(3))).save(path)
    source.choice(there).unlink()
    Image.new("RGB", (24, 24), tuple(source.randbytes(3))).save(photos / f"new{source.random()}.png")


def killed_before_a_picture(build: Callable[[], object], photos: Path, number: int) -> int:
    """Lets a process die right before it opens an image, counted from 1; returns how it ended."""

    def work() -> None:
        before(within(photos, ("open",)), number, lambda: send(signal.SIGKILL))
        build()

    return end(in_a_process(work))


def killed_after_writes(build: Callable[[], object], out: Path, number: int) -> int:
    """Kills a process as soon as so many files were added to the index; returns how it ended."""

    def work() -> None:
        build()
        signal.pause()

    seen = set(out.rglob("*"))
    process = in_a_process(work)
    while len(set(out.rglob("*")) - seen) < number:
        pass
    os.kill(process, signal.SIGKILL)
    return end(process)


def rows(out: Path, report: Path) -> dict[str, Any] | None:
    """What another process finds in an index; None if it cannot be opened, empty if there is none yet."""

    def read() -> None:
        found: list[dict[str, Any]] = []
        if Index.exists(out):
            assert len(Index(out)) == len(set(Index(out).paths()))  # no image twice
            found = lancedb.connect(out.parent).open_table(out.stem).to_arrow().to_pylist()
        report.write_text(json.dumps({row.pop("path"): row for row in found}, default=str))

    return None if end(in_a_process(read)) else json.loads(report.read_text())


def main(model: Path, photos: Path, folder: Path) -> dict[str, Any]:
    """Runs everything and returns what happened."""
    source, predictor = random.Random(0), load(model, device="cpu")
    killed, whole, report = folder / "killed.lance", folder / "whole.lance", folder / "rows.json"

    def build(out: Path) -> None:
        build_index(photos, out, predictor, OFTEN)

    first = end(in_a_process(lambda: build(folder / "first.lance")))
    kills = []
    for number in range(NUM_KILLS):
        if number % 2:
            ended = killed_after_writes(lambda: build(killed), killed, number)
        else:
            ended = killed_before_a_picture(lambda: build(killed), photos, source.randint(1, 3 * NUM_CHANGED))
        found = rows(killed, report)
        kills.append({"ended": ended, "rows": None if found is None else len(found)})
        change(photos, source)
    left = rows(killed, report)
    completed = end(in_a_process(lambda: build(killed)))
    fresh = end(in_a_process(lambda: build(whole)))
    return {
        "first": first,
        "kills": kills,
        "completed": completed,
        "fresh": fresh,
        "equal": rows(killed, report) == rows(whole, report),
        "left_equal": left == rows(whole, report),
        "rows": len(rows(whole, report) or {}),
    }


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:]))))  # noqa: T201
