"""Progress: bars on standard error, which show only on a terminal, or lines in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

T = TypeVar("T")

LOG_SECONDS = 60.0
"""Between two lines of progress in the log."""

logger = logging.getLogger(__name__)


class RateColumn(ProgressColumn):
    """Things done per second."""

    def render(self, task: Task) -> Text:
        """Returns the rate of the last seconds."""
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s")


def step_bars(*, shown: bool) -> Progress:
    """Returns bars of steps with a field `metrics`."""
    return _bars(MofNCompleteColumn(), TextColumn("{task.fields[metrics]}"), shown=shown)


def count_bars(*, shown: bool) -> Progress:
    """Returns bars of things with their rate."""
    return _bars(MofNCompleteColumn(), RateColumn(), shown=shown)


def counted(items: Iterable[T], description: str, *, shown: bool, total: int | None = None) -> Iterator[T]:
    """Yields the items under a bar with their rate; their number is `total`, or their length if they have one."""
    with count_bars(shown=shown) as bars:
        yield from bars.track(items, total=total, description=description)


@contextmanager
def counting(description: str, *, total: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields what is called with each number of things that were done: a bar moves, or a line a minute is logged.

    Args:
        description: What is done.
        total: How many there are; None: not known.
        shown: Whether at all.
    """
    with count_bars(shown=shown) as bars:
        if shown and bars.disable:
            yield _Lines(description, total)
            return
        task = bars.add_task(description, total=total)
        yield lambda count: bars.advance(task, count)


class _Lines:
    """Logs a line a minute: how many things are done, how many a second, how long the rest takes at that rate."""

    def __init__(self, description: str, total: int | None) -> None:
        self._description, self._total, self._done = description, total, 0
        self._started = self._logged = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._logged < LOG_SECONDS:
            return
        self._logged, rate = now, self._done / (now - self._started)
        rest = "" if self._total is None else f" of {self._total:,}"
        left = "" if self._total is None else f", {(self._total - self._done) / rate / 60:,.0f} min left"
        logger.info("%s: %s%s, %.1f/s%s", self._description, f"{self._done:,}", rest, rate, left)


@contextmanager
def reading(path: Path, *, shown: bool) -> Iterator[BinaryIO]:
    """Opens a file to read, under a bar of its bytes."""
    with (
        _bars(DownloadColumn(), TransferSpeedColumn(), shown=shown) as bars,
        bars.open(path, "rb", description=f"reading {path.name}") as file,
    ):
        yield file


def _bars(*metrics: ProgressColumn, shown: bool) -> Progress:
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    console.quiet = hidden  # bars that are disabled still end with an empty line before rich 14.3
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *metrics,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=hidden,
    )
