"""What all processes of a run must have in common: arguments, data, and the state that they continue from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor, nn

from bridgetower.distributed import from_first, rank, require_same
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.training.optim import build_optimizer
from bridgetower.training.state import StateSaver, TrainingState, load_state, newest

WORLD = 2
CONDITIONS = {"number of processes": WORLD, "data": {}, "optimiser": "adamw"}

CONTENT = {
    1: [torch.arange(6).reshape(2, 3).T, ("a", 0.1, None)],
    "half": torch.tensor([0.1, -2.0]).bfloat16(),
    "true": torch.tensor(True),
    "none": torch.zeros(0, 4),
    "nested": {"é": [], "step": torch.tensor(3.0)},
}


def share() -> Any:
    return from_first(CONTENT if rank() == 0 else None), from_first(None), from_first(rank() == 0)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_every_process_gets_what_the_first_has() -> None:
    for content, nothing, true in run_on_ranks(WORLD, share):
        assert equal(content, CONTENT)
        assert (nothing, true) == (None, True)
    assert from_first(CONTENT) is CONTENT  # alone


VALUES = {"out": "runs/é", "optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}, "seed": 3}


def compare(changes: list[dict[str, Any]]) -> str:
    try:
        require_same(VALUES | changes[rank()])
    except ValueError as error:
        return str(error)
    return "the same"


def test_values_that_differ_are_named() -> None:
    end = "; start every process with the same options and data"
    assert run_on_ranks(WORLD, compare, [{}, {}]) == ["the same"] * WORLD
    message = "out is runs/é in process 0 and other in process 1; seed is 3 in process 0 and None in process 1" + end
    assert run_on_ranks(WORLD, compare, [{}, {"out": "other", "seed": None}]) == [message] * WORLD
    changes = [{"seed": 4, "content of a/b.parquet": "12"}, {"optimizer": {"lr": 0.2, "betas": (0.8, 0.99)}}]
    message = (
        "optimizer.lr is 0.1 in process 0 and 0.2 in process 1; optimizer.betas is (0.9, 0.99) in process 0 and "
        "(0.8, 0.99) in process 1; seed is 4 in process 0 and 3 in process 1; and 1 more differ"
    )
    assert run_on_ranks(WORLD, compare, changes) == [message + end] * WORLD
    require_same(VALUES)  # alone


def make(seed: int, rule: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after so many steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    names, parameters = zip(*model.named_parameters(), strict=True)
    group = {"params": list(parameters), "names": list(names), "lr": 0.1, "weight_decay": 0.1}
    optimizer = build_optimizer([group], OptimizerConfig(lr=0.1, rule=rule))  # type: ignore[arg-type]
    for _ in range(seed):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def resume(folders: list[Path], rule: str) -> Any:
    """Loads the state of a folder of this process's own into a model of its own."""
    model, optimizer = make(rank(), rule)
    state = load_state(folders[rank()], model, optimizer, CONDITIONS)
    return vars(state), model.state_dict(), optimizer.state_dict()["state"]


@pytest.mark.parametrize("rule", ["adamw", "hf_adamw"])
def test_the_state_is_that_of_the_first_process(tmp_path: Path, rule: str) -> None:
    """Whatever another node sees in its folder."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    StateSaver(folders[1], CONDITIONS).save(*make(2, rule), TrainingState(step=2))
    assert [state["step"] for state, *_ in run_on_ranks(WORLD, resume, folders, rule)] == [0, 0]
    assert newest(folders[0]) is None
    model, optimizer = make(3, rule)
    StateSaver(folders[0], CONDITIONS).save(model, optimizer, TrainingState(step=3, best=0.5))
    expected = {**vars(TrainingState(step=3, best=0.5))}, model.state_dict(), optimizer.state_dict()["state"]
    for elsewhere in (folders[1], tmp_path / "nothing"):
        for resumed in run_on_ranks(WORLD, resume, [folders[0], elsewhere], rule):
            assert equal(resumed, expected)
