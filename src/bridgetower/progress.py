"""Progress bars on standard error; they show only on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
