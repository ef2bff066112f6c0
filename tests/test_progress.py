"""Progress: bars with a rate on a terminal, lines in the log elsewhere."""

import io

from rich.console import Console
from rich.progress import Progress

from bridgetower import progress
from bridgetower.progress import RateColumn, counted, counting, reading, step_bars


def test_counted_passes_items_on():
    assert list(counted(iter("abc"), "letters", enabled=True)) == ["a", "b", "c"]


def test_reading(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    with reading(tmp_path / "a.txt", enabled=False) as file:
        assert list(file) == [b"one\n", b"two\n"]


def test_rate_is_shown_per_second():
    clock = iter([0.0, *[float(second) for second in range(100)]])
    bars = Progress(RateColumn(), get_time=lambda: next(clock))
    task = bars.add_task("", total=10_000)
    assert RateColumn().render(bars.tasks[0]).plain == ""  # there is none yet
    for _ in range(3):
        bars.advance(task, 1200)
    assert RateColumn().render(bars.tasks[0]).plain == "1,200/s"


def test_shown_on_a_terminal_only(monkeypatch):
    def output(terminal):
        stream = io.StringIO()
        monkeypatch.setattr(
            progress, "Console", lambda **_: Console(file=stream, force_terminal=terminal, width=80)
        )
        list(counted(range(3), "letters", enabled=True))
        return stream.getvalue()

    assert "letters" in output(terminal=True)
    assert output(terminal=False) == ""


def test_lines_in_the_log_elsewhere(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    caplog.set_level("INFO", "bridgetower")
    with step_bars(enabled=True) as bars:
        first = bars.add_task("first", total=400, completed=100, metrics="")
        second = bars.add_task("second", total=10, metrics="")
        for step in range(1, 151):
            clock[0] += 1.0
            bars.update(first, completed=100 + step, metrics=f"loss {step}")
        bars.update(second, completed=10)
    assert [message.split(",")[0] for message in caplog.messages] == [
        f"first: {done} of 400" for done in (101, *range(121, 250, 20))
    ]
    assert caplog.messages[3] == "first: 161 of 400, loss 61, 4 min left"
    caplog.clear()
    with counting("images", total=None, enabled=True) as advance:
        for _ in range(3):
            clock[0] += 10.0
            advance(1000)
    assert caplog.messages == ["images: 2,000, 100.0/s"]
    with counting("images", total=None, enabled=False) as advance:
        clock[0] += 100.0
        advance(1)
    assert len(caplog.messages) == 1
