"""benchmarks/costs.py: what a model costs, METER beside it, and the memory of its training."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgetower.checkpoints import read_checkpoint
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.layers import on_meta
from bridgetower.model.presets import LARGE, NANO, meter
from bridgetower_demo.costs import flops_by_part, parameters_by_part

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the script and returns what it printed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("costs")

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["costs.py", "--repeats", "1", *map(str, arguments)])
        benchmark.main()
        return capsys.readouterr().out

    return run


def test_a_preset_and_meter(costs: Callable[..., str]) -> None:
    row: dict[str, Any] = json.loads(costs("--preset", "nano", "--text-length", 9, "--json"))
    assert (row["model"], row["image_size"], row["text_length"]) == ("nano", 60, 9)
    for name, config in (("bridgetower", NANO), ("meter", meter(NANO))):
        network, cost = BridgeTower(config).eval(), row["costs"][name]
        assert cost["parameters"] == parameters_by_part(network)
        assert cost["flops"] == flops_by_part(network, 9)
        assert cost["milliseconds"].keys() == cost["flops"].keys()


def test_a_model_at_another_image_size(costs: Callable[..., str], tiny_checkpoint: Path) -> None:
    config = read_checkpoint(tiny_checkpoint).config
    size = 2 * config.vision.image_size
    row = json.loads(costs("--model", tiny_checkpoint, "--image-size", size, "--json"))
    expected = flops_by_part(BridgeTower(config.override({"vision.image_size": size})).eval(), 16)
    assert row["costs"]["bridgetower"]["flops"] == expected


def test_a_table(costs: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = costs("--preset", "nano")
    assert all(word in shown for word in ("nano: 60 px, 16 tokens", "image tower", "total", "meter", "GFLOP"))


@pytest.mark.parametrize("processes", [1, 8])
def test_the_memory_of_a_training(costs: Callable[..., str], processes: int) -> None:
    memory = json.loads(costs("--preset", "large", "--processes", processes, "--json"))["memory"]
    with on_meta():
        total = 4 * sum(weight.numel() for weight in BridgeTower(LARGE).parameters())
    assert memory["ddp"] == {"weights": total, "gradients": total, "optimiser": 2 * total}
    assert memory["fsdp"]["weights"] == pytest.approx(total / processes, rel=0.01)
    whole = memory["fsdp"]["whole"]
    assert whole == 0 if processes == 1 else total / 10 < whole < total / 2
