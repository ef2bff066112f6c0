"""Progress: bars on standard error, which show only on a terminal, or lines in the log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rich import progress as rich_bars
from rich.console import Console
from rich.text import Text

T = TypeVar("T")

LOG_SECONDS = 20.0  # between two lines of progress in the log

logger = logging.getLogger(__name__)


class RateColumn(rich_bars.ProgressColumn):
    """Things done per second."""

    def render(self, task: rich_bars.Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s")


def step_bars(*, shown: bool) -> rich_bars.Progress:
    """Returns bars of steps with a field `metrics`, whose first step is logged at once."""
    columns = rich_bars.MofNCompleteColumn(), rich_bars.TextColumn("{task.fields[metrics]}")
    return _Bars(*columns, shown=shown, logs_first=True)


def count_bars(*, shown: bool) -> rich_bars.Progress:
    """Returns bars of things with their rate."""
    return _Bars(rich_bars.MofNCompleteColumn(), RateColumn(), shown=shown)


def counted(
    items: Iterable[T], description: str, *, shown: bool, total: int | None = None
) -> Iterator[T]:
    """Yields the items under a bar with their rate; their number is `total`, or their length if they have one."""
    with count_bars(shown=shown) as bars:
        yield from bars.track(items, total=total, description=description)


@contextmanager
def counting(
    description: str, *, total: int | None, shown: bool
) -> Iterator[Callable[[int], None]]:
    """Yields what is called with each number of things that were done: a bar moves, or lines are logged."""
    with count_bars(shown=shown) as bars:
        yield partial(bars.advance, bars.add_task(description, total=total))


@contextmanager
def reading(path: Path, *, shown: bool) -> Iterator[BinaryIO]:
    """Opens a file to read, under a bar of its bytes."""
    columns = rich_bars.DownloadColumn(), rich_bars.TransferSpeedColumn()
    with (
        _Bars(*columns, shown=shown) as bars,
        bars.open(path, "rb", description=f"reading {path.name}") as file,
    ):
        yield file


class _Bars(rich_bars.Progress):
    """Bars on a terminal; elsewhere lines for each that is not done: how far, how fast, how long it takes."""

    def __init__(
        self, *columns: rich_bars.ProgressColumn, shown: bool, logs_first: bool = False
    ) -> None:
        console = Console(stderr=True)
        hidden = not (shown and console.is_terminal)
        # bars that are disabled still end with an empty line before rich 14.3
        console.quiet = hidden
        period = 600 if hidden else 30  # of which the rate is taken
        settings: Any = {"speed_estimate_period": period, "get_time": time.monotonic}
        texts = rich_bars.TextColumn("{task.description}"), rich_bars.BarColumn()
        times = rich_bars.TimeElapsedColumn(), rich_bars.TimeRemainingColumn()
        super().__init__(*texts, *columns, *times, console=console, disable=hidden, **settings)
        self._logs = shown and hidden
        self._logged = -math.inf if logs_first else self.get_time()  # time of the last line

    def update(self, task_id: rich_bars.TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._log()

    def advance(self, task_id: rich_bars.TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._log()

    def _log(self) -> None:
        now = self.get_time()
        if not self._logs or now - self._logged < LOG_SECONDS:
            return
        for task in self.tasks:
            if not task.finished and task.completed:
                self._logged = now
                rate = task.fields.get("metrics") or (
                    "" if task.speed is None else f"{task.speed:,.1f}/s"
                )
                rest = "" if task.total is None else f" of {task.total:,.0f}"
                left = (
                    ""
                    if task.time_remaining is None
                    else f"{task.time_remaining / 60:,.0f} min left"
                )
                parts = (f"{task.description}: {task.completed:,.0f}{rest}", rate, left)
                logger.info("%s", ", ".join(filter(None, parts)))
