"""Progress bars: they count and show a rate on a terminal, and nothing elsewhere."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from bridgetower import progress
from bridgetower.progress import RateColumn, counted, reading


def test_counted_passes_items_on() -> None:
    assert list(counted(iter("abc"), "letters", shown=True)) == ["a", "b", "c"]


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    with reading(tmp_path / "a.txt", shown=False) as file:
        assert list(file) == [b"one\n", b"two\n"]


def test_rate_is_shown_per_second() -> None:
    clock = iter([0.0, *[float(second) for second in range(100)]])
    bars = Progress(RateColumn(), get_time=lambda: next(clock))
    task = bars.add_task("", total=10_000)
    for _ in range(3):
        bars.advance(task, 1200)
    assert RateColumn().render(bars.tasks[0]).plain == "1,200/s"


def test_rate_is_not_shown_before_there_is_one() -> None:
    bars = Progress(RateColumn())
    bars.add_task("", total=3)
    assert RateColumn().render(bars.tasks[0]).plain == ""


def test_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def output(terminal: bool) -> str:
        stream = io.StringIO()
        monkeypatch.setattr(progress, "Console", lambda **_: Console(file=stream, force_terminal=terminal, width=80))
        list(counted(range(3), "letters", shown=True))
        return stream.getvalue()

    assert "letters" in output(terminal=True)
    assert output(terminal=False) == ""
