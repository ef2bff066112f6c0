"""How long `bridgetower --help` takes beside an interpreter that does nothing."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

from side_by_side.rows import Row
from side_by_side.setting import Setting
from side_by_side.timing import Clock

LIMIT = 0.3  # seconds


def startup_row(setting: Setting) -> Iterator[Row]:
    """Medians of fresh processes; the target is in seconds, so it is given as a ratio to the limit."""
    times = 1 if setting.quick else 9
    help_s = _seconds([sys.executable, "-m", "bridgetower", "--help"], times)
    yield Row(
        name=f"bridgetower --help, limit {LIMIT} s",
        ours="bridgetower --help",
        peer=f"the limit of {LIMIT} s",
        ours_s=help_s,
        peer_s=LIMIT,
        target=1.0,
        details={"python_pass_s": _seconds([sys.executable, "-c", "pass"], times)},
    )


def _seconds(command: list[str], times: int) -> float:
    def one() -> float:
        start = _now()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return _now() - start

    one()
    return statistics.median(one() for _ in range(times))


def _now() -> float:
    if Clock.name == "processor":
        spent = os.times()
        return spent.children_user + spent.children_system
    return Clock.now()
