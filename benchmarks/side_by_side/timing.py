"""Seconds of several ways to do one thing, taken in turn, on a machine that others may use too."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

OTHERS = 0.1  # of one core: a repetition in which other processes took more is repeated
TRIES = 4  # times as many repetitions as wanted, at most
SHORTEST = 1.0  # seconds of a repetition; quicker ways run several times in one


@dataclass(frozen=True)
class Timing:
    """Seconds of one way.

    Attributes:
        seconds: Median of the repetitions.
        disturbed: Whether other processes were busy in all of them.
    """

    seconds: float
    disturbed: bool = False


def alternate(
    ways: Mapping[str, Callable[[], object]], *, repetitions: int, warmup: int = 2
) -> dict[str, Timing]:
    """Times each way in turn, `repetitions` times over, after a warm-up of each.

    Alternating lets a machine that slows down slow all ways alike. A repetition during which other processes were busy
    is thrown away, unless there would be none. With no repetition, each way runs once, only to have been run.
    """
    if not repetitions:
        return {name: Timing(_run(way, 1)[0]) for name, way in ways.items()}
    times = {name: _times_to_run(way, warmup) for name, way in ways.items()}
    kept: dict[str, list[float]] = {name: [] for name in ways}
    lost: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TRIES * repetitions):
        for name, way in ways.items():
            if len(kept[name]) < repetitions:
                seconds, others = _run(way, times[name])
                (lost if others > OTHERS else kept)[name].append(seconds)
        if all(len(seconds) == repetitions for seconds in kept.values()):
            break
    return {
        name: Timing(statistics.median(kept[name] or lost[name]), disturbed=not kept[name])
        for name in ways
    }


def _times_to_run(way: Callable[[], object], warmup: int) -> int:
    seconds = [_run(way, 1)[0] for _ in range(max(1, warmup))]
    return max(1, round(SHORTEST / max(seconds[-1], 1e-6)))


def _run(way: Callable[[], object], times: int) -> tuple[float, float]:
    """Returns the seconds of one run, and how many cores other processes kept busy meanwhile."""
    gc.collect()
    gc.disable()
    busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    for _ in range(times):
        way()
    elapsed = time.perf_counter() - start
    others = (_busy_seconds() - busy) - (time.process_time() - own)
    gc.enable()
    return elapsed / times, max(
        0.0, others - 0.02
    ) / elapsed  # the kernel counts in steps of 0.01 s


def _busy_seconds() -> float:
    """Seconds that all processors have worked since the start of the machine; 0 where the kernel does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, soft_irq, steal = map(
        int, stat.read_text().split("\n")[0].split()[1:9]
    )
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
