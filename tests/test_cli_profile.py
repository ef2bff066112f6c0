"""What a model costs: JSON for scripts, a table for readers, METER beside BridgeTower."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridgetower import cli
from bridgetower.analysis.profile import flops_by_part, parameters_by_part
from bridgetower.checkpoints import read_checkpoint
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.layers import on_meta
from bridgetower.model.presets import LARGE, NANO, meter

QUICK = ("--repeats", "1")


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_preset_and_meter(run: Callable[..., list[Any]]) -> None:
    (row,) = run("profile", "--preset", "nano", "--text-length", 9, "--threads", 1, *QUICK)
    assert (row["model"], row["image_size"], row["text_length"]) == ("nano", 60, 9)
    for name, config in (("bridgetower", NANO), ("meter", meter(NANO))):
        network, cost = BridgeTower(config).eval(), row["costs"][name]
        assert cost["parameters"] == parameters_by_part(network)
        assert cost["flops"] == flops_by_part(network, 9)
        assert cost["milliseconds"].keys() == cost["flops"].keys()
    extra = sum(row["costs"]["bridgetower"]["parameters"].values()) - sum(row["costs"]["meter"]["parameters"].values())
    assert extra > 0


def test_a_model_at_another_image_size(run: Callable[..., list[Any]], tiny_checkpoint: Path) -> None:
    config = read_checkpoint(tiny_checkpoint).config
    size = 2 * config.vision.image_size
    (row,) = run("profile", "--model", tiny_checkpoint, "--image-size", size, *QUICK)
    assert row["image_size"] == size
    expected = flops_by_part(BridgeTower(config.override({"vision.image_size": size})).eval(), 16)
    assert row["costs"]["bridgetower"]["flops"] == expected


def test_a_preset_and_a_model(refused: Callable[..., str]) -> None:
    assert "give one of them" in refused("profile", "--preset", "nano", "--model", "somewhere")


def test_a_table_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    cli.main(["profile", "--preset", "nano", *QUICK])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("nano: 60 px, 16 tokens", "image tower", "total", "meter", "GFLOP"))


@pytest.mark.parametrize("processes", [1, 8])
def test_the_memory_of_a_training(run: Callable[..., list[Any]], processes: int) -> None:
    (row,) = run("profile", "--preset", "large", "--processes", processes)
    assert (row["model"], row["processes"]) == ("large", processes)
    with on_meta():
        total = 4 * sum(weight.numel() for weight in BridgeTower(LARGE).parameters())
    ddp, fsdp = row["memory"]["ddp"], row["memory"]["fsdp"]
    assert ddp == {"weights": total, "gradients": total, "optimiser": 2 * total}
    assert fsdp["weights"] == pytest.approx(total / processes, rel=0.01)
    assert fsdp["whole"] == 0 if processes == 1 else total / 10 < fsdp["whole"] < total / 2


def test_the_memory_of_a_training_as_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main(["profile", "--preset", "nano", "--processes", "2"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("nano", "ddp", "fsdp", "optimiser", "total"))


@pytest.mark.parametrize("option", ["threads", "text-length"])
def test_none_of_what_it_takes(refused: Callable[..., str], option: str) -> None:
    message = refused("profile", "--preset", "nano", f"--{option}", 0)
    assert f"{option} is 0; expected at least 1" in message


def test_no_processes(refused: Callable[..., str]) -> None:
    assert "processes is 0; expected at least 1" in refused("profile", "--preset", "nano", "--processes", 0)
