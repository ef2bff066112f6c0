"""metrics.jsonl: what a run writes, and what a resumed one keeps of it."""

import json
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bridgetower.model.extensions import Extensions
from bridgetower.tasks.run_config import METRICS, read_metrics
from bridgetower.training.logs import RunLog
from bridgetower.training.state import TrainingState
from helpers.shapes import shapes_run_config

SPEED = ("seconds", "data_seconds", "pairs_per_second")


def open_log(out, first_step=0, *, log_every=1, progress=False):
    context = SimpleNamespace(
        config=shapes_run_config(out, log_every=log_every),
        max_steps=20,
        model=SimpleNamespace(extensions=Extensions()),
    )
    state = TrainingState(step=first_step, evaluated=first_step)
    return RunLog(context, out, state, report_to=["tensorboard"], progress=progress)


def write_steps(out, steps, *, log_every=1):
    with open_log(out, steps.start - 1, log_every=log_every) as log:
        for step in steps:
            log.step(
                step, {"loss": torch.tensor(float(step)), "mlm": torch.tensor(1.5)}, 1e-3 * step
            )
            if step % 5 == 0:
                log.write("validation", step, {"rsum": 10.0 * step})


def steps_of(out, kind):
    return [entry["step"] for entry in read_metrics(out, kind)]


class TestWriting:
    def test_lines(self, tmp_path):
        write_steps(tmp_path, range(1, 6))
        entries = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
        expected = [*(("train", step) for step in range(1, 6)), ("validation", 5)]
        assert [(entry["kind"], entry["step"]) for entry in entries] == expected
        assert entries[2].keys() == {"kind", "step", "time", "loss", "mlm", "lr", *SPEED}
        assert entries[2]["loss"] == 3.0
        assert entries[2]["lr"] == pytest.approx(3e-3)
        assert read_metrics(tmp_path, "validation")[0]["rsum"] == 50.0
        write_steps(tmp_path, range(1, 21), log_every=8)
        assert steps_of(tmp_path, "train") == [1, 8, 16, 20]

    def test_speed_is_that_of_the_clock_without_pauses(self, tmp_path, monkeypatch):
        """A step that only asks a device to work takes the time until its numbers are there."""
        now = [0.0]
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])

        class Late:
            def float(self):
                now[0] += 1.0
                return torch.tensor(2.0)

        def batches():
            for number in range(9):
                now[0] += 0.25
                yield number

        with open_log(tmp_path, 3, log_every=4) as log:
            loaded = log.loaded(batches())
            for step in range(4, 9):  # one step until the next line, then four
                next(loaded)
                now[0] += 0.5
                with log.pausing("saving"):
                    now[0] += 100.0
                log.step(step, {"loss": Late()}, 1e-3)
        speeds = [[entry[name] for name in SPEED] for entry in read_metrics(tmp_path, "train")]
        assert speeds == [[1.75, 0.25, 8 / 1.75], [4.0, 1.0, 8.0]]

    def test_other_processes_write_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr("bridgetower.training.logs.rank", lambda: 1)
        with open_log(tmp_path) as log:
            log.step(1, {"loss": torch.tensor(1.0)}, 1e-3)
            log.write("validation", 1, {"rsum": 1.0})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnhandledThreadExceptionWarning"
    )  # in the thread of TensorBoard
    def test_a_full_disk_is_named(self, small_disk):
        disk = small_disk(64)

        def write():
            with open_log(disk) as log, (disk / "filler").open("wb", buffering=0) as filler:
                with suppress(OSError):
                    while filler.write(b"x" * 4096):
                        pass
                log.step(1, {"loss": torch.tensor(1.0)}, 1e-3)

        with pytest.raises(
            OSError, match=rf"^{disk}/metrics\.jsonl could not be written \(No space left"
        ):
            write()

    def test_tensorboard_has_what_the_file_has(self, tmp_path):
        write_steps(tmp_path, range(1, 8))
        write_steps(tmp_path, range(6, 10))
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [point.step for point in events.Scalars("train/loss")] == steps_of(tmp_path, "train")
        assert [point.step for point in events.Scalars("validation/rsum")] == steps_of(
            tmp_path, "validation"
        )

    def test_the_bar_leaves_standard_output_alone(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
        with open_log(tmp_path, progress=True) as log:
            log.step(1, {"loss": torch.tensor(1.0)}, 1e-3)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "shapes" in captured.err


class TestResuming:
    def test_later_lines_are_dropped(self, tmp_path):
        write_steps(tmp_path, range(1, 11))
        write_steps(tmp_path, range(7, 9))
        assert steps_of(tmp_path, "train") == list(range(1, 9))
        assert steps_of(tmp_path, "validation") == [5]
        write_steps(tmp_path, range(1, 2))
        assert steps_of(tmp_path, "train") == [1]

    @pytest.mark.parametrize("length", [1, 10, -1])
    def test_a_half_written_last_line_is_dropped(self, tmp_path, length):
        write_steps(tmp_path, range(1, 4))
        path = tmp_path / METRICS
        path.write_text(path.read_text() + path.read_text().splitlines()[-1][:length])
        assert steps_of(tmp_path, "train") == [1, 2, 3]
        write_steps(tmp_path, range(4, 5))
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
