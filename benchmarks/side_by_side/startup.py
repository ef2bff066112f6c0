"""How long it takes until something works: imports, loading, first vectors, commands; each in processes of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from memory import save_model
from serving_client import bridgetower_serve, running

from bridgetower.files import new_folder
from bridgetower.model.presets import BASE, NANO
from side_by_side.rows import Row
from side_by_side.setting import Setting

LIMIT = 0.3  # seconds
QUERY = "a smiling face"
STAGES = """
import json, sys, time
seconds = {}
def done(stage):
    global last
    seconds[stage], last = time.perf_counter() - last, time.perf_counter()
def taken():
    return {name: int(value) for name, value in (line.split(": ") for line in open("/proc/self/io"))}
last = time.perf_counter()
import bridgetower
done("import bridgetower")
import torch
done("import torch")
from bridgetower import load
done("from bridgetower import load, after torch")
before, last = taken(), time.perf_counter()
model = load(sys.argv[1], device="cpu")
done("load")
model.embed_texts(["word1 word2 word3"])
done("first vector of a text")
model.embed_images(torch.zeros(480, 640, 3, dtype=torch.uint8))
done("first vector of an image")
print(json.dumps([seconds, {name: value - before[name] for name, value in taken().items()}]))
"""


def startup_rows(setting: Setting) -> Iterator[Row]:
    """Medians of fresh processes, whose modules are compiled and whose files are in the system's cache."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    times = 1 if setting.quick else 5
    python, model = [sys.executable, "-m", "bridgetower"], setting.cache / f"{setting.name}-for-use"
    if not model.exists():
        with new_folder(model) as temporary:
            save_model(
                (NANO if setting.quick else BASE).override({"heads.itc": "tower"}), temporary
            )
    help_s = _median(times, lambda: _seconds([*python, "--help"]))
    yield Row(
        name=f"bridgetower --help, limit {LIMIT} s",
        peer="the limit",
        ours_s=help_s,
        peer_s=LIMIT,
        target=1.0,
    )
    yield Row(
        name="python -c pass",
        ours_s=_median(times, lambda: _seconds([sys.executable, "-c", "pass"])),
    )
    runs = [_stages(model) for _ in range(times + 1)][1:]
    for stage in runs[0][0]:
        yield Row(
            name=stage,
            ours=setting.name,
            ours_s=statistics.median(seconds[stage] for seconds, _ in runs),
        )
    yield _weights_row(model)
    yield Row(
        name="serve, until it is ready",
        ours=setting.name,
        ours_s=_median(times, lambda: _serving(model)),
    )
    if Path("bridgetower-demo").exists():
        search = _median(times, lambda: _seconds([*python, "search", "demo", QUERY]))
        yield Row(name="bridgetower search demo, in the demo's index", ours_s=search)
    else:
        print(
            "no search was timed: there is no bridgetower-demo here; run `make demo`",
            file=sys.stderr,
        )


def _weights_row(model: Path) -> Row:
    """How many times the weights, in no cache before, are read: off the disk or by calls, whichever is more."""
    weights = model / "model.safetensors"
    with weights.open("rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    taken = _stages(model)[1]
    share = max(taken["read_bytes"], taken["rchar"]) / weights.stat().st_size
    details = {name: taken[name] for name in ("read_bytes", "rchar")}
    name = "bytes read until the first vectors, of the weights'"
    return Row(name=name, peer="once", ours_s=share, peer_s=1.0, unit="times", details=details)


def _stages(model: Path) -> tuple[dict[str, float], dict[str, int]]:
    command = [sys.executable, "-c", STAGES, str(model)]
    seconds, taken = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return seconds, taken


def _serving(model: Path) -> float:
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as name,
        running(Path(name) / "log", *bridgetower_serve(model)),
    ):
        return time.perf_counter() - start


def _median(times: int, one: Callable[[], float]) -> float:
    one()
    return statistics.median(one() for _ in range(times))


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
