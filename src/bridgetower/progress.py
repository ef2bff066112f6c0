"""Progress: bars on a terminal, or lines in the log."""

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


def step_bars(*, enabled: bool) -> rich_bars.Progress:
    """Returns bars of steps with a field `metrics`, whose first step is logged at once."""
    columns = rich_bars.MofNCompleteColumn(), rich_bars.TextColumn("{task.fields[metrics]}")
    return _Bars(*columns, enabled=enabled, logs_first=True)


def count_bars(*, enabled: bool) -> rich_bars.Progress:
    """Returns bars of things with their rate."""
    return _Bars(rich_bars.MofNCompleteColumn(), RateColumn(), enabled=enabled)


def counted(
    items: Iterable[T], description: str, *, enabled: bool, total: int | None = None
) -> Iterator[T]:
    """Yields the items under a bar with their rate. Default of `total`: the length of the items, if they have one."""
    with count_bars(enabled=enabled) as bars:
        yield from bars.track(items, total=total, description=description)


@contextmanager
def counting(
    description: str, *, total: int | None, enabled: bool
) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how many items were done and moves the bar."""
    with count_bars(enabled=enabled) as bars:
        yield partial(bars.advance, bars.add_task(description, total=total))


@contextmanager
def reading(path: Path, *, enabled: bool) -> Iterator[BinaryIO]:
    """Opens a file to read, under a bar of its bytes."""
    columns = rich_bars.DownloadColumn(), rich_bars.TransferSpeedColumn()
    with (
        _Bars(*columns, enabled=enabled) as bars,
        bars.open(path, "rb", description=f"reading {path.name}") as file,
    ):
        yield file


class _Bars(rich_bars.Progress):
    """Bars on a terminal, and elsewhere a line in the log for each unfinished task."""

    def __init__(
        self, *columns: rich_bars.ProgressColumn, enabled: bool, logs_first: bool = False
    ) -> None:
        console = Console(stderr=True)
        hidden = not (enabled and console.is_terminal)
        # Before rich 14.3 disabled bars still end with an empty line.
        console.quiet = hidden
        super().__init__(
            rich_bars.TextColumn("{task.description}"),
            rich_bars.BarColumn(),
            *columns,
            rich_bars.TimeElapsedColumn(),
            rich_bars.TimeRemainingColumn(),
            console=console,
            disable=hidden,
            speed_estimate_period=600 if hidden else 30,
            get_time=time.monotonic,
        )
        self._logs = enabled and hidden
        self._logged = -math.inf if logs_first else self.get_time()  # time of the last line

    def update(self, task_id: rich_bars.TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._log()

    def advance(self, task_id: rich_bars.TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._log()

    def _log(self) -> None:
        """Logs how far each task is, how fast it goes and how long it takes."""
        now = self.get_time()
        if not self._logs or now - self._logged < LOG_SECONDS:
            return
        for task in self.tasks:
            if not task.finished and task.completed:
                self._logged = now
                total = "" if task.total is None else f" of {task.total:,.0f}"
                columns = [f"{task.description}: {task.completed:,.0f}{total}"]
                if task.fields.get("metrics"):
                    columns.append(task.fields["metrics"])
                elif task.speed is not None:
                    columns.append(f"{task.speed:,.1f}/s")
                if task.time_remaining is not None:
                    columns.append(f"{task.time_remaining / 60:,.0f} min left")
                logger.info("%s", ", ".join(columns))
