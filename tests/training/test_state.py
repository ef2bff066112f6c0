"""The file that a killed run continues from: the same bits back, or a clear refusal."""

import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bridgetower.training.config import OptimizerConfig
from bridgetower.training.optim import build_optimizer
from bridgetower.training.state import FILE, TrainingState, load_state, save_state

STATE = TrainingState(step=3, best=1.5, best_step=2, figures={"rsum": 1.25})
CONDITIONS = {"processes": 2, "content of a": "12ab"}


def make(width: int = 3, rule: str = "plain", seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model after two steps."""
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    config = OptimizerConfig(lr=0.1, rule=rule)  # type: ignore[arg-type]
    groups = [{"params": [model.weight], "names": ["weight"], "lr": 0.1, "weight_decay": 0.1}]
    groups.append({"params": [model.bias], "names": ["bias"], "lr": 0.2, "weight_decay": 0.0})
    optimizer = build_optimizer(groups, config)
    for _ in range(2):
        model(torch.randn(4, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def tensors(value: object) -> Iterator[object]:
    """Every leaf of nested containers."""
    if isinstance(value, dict):
        for key in value:
            yield key
            yield from tensors(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    else:
        yield value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("rule", ["plain", "official"])
def test_the_same_bits_come_back(tmp_path: Path, rule: str) -> None:
    model, optimizer = make(rule=rule)
    save_state(tmp_path, model, optimizer, STATE, CONDITIONS)
    other, restored = make(rule=rule, seed=1)
    assert load_state(tmp_path, other, restored, CONDITIONS) == STATE
    assert list(tensors(other.state_dict())) == list(tensors(model.state_dict()))
    assert list(tensors(restored.state_dict())) == list(tensors(optimizer.state_dict()))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_without_a_state_a_run_starts_at_its_beginning(tmp_path: Path) -> None:
    assert load_state(tmp_path, *make(), CONDITIONS) == TrainingState(step=0, best=None, best_step=0, figures={})


class TestRefusals:
    def test_cut_and_altered_files(self, tmp_path: Path) -> None:
        model, optimizer = make()
        save_state(tmp_path, model, optimizer, STATE, CONDITIONS)
        path = tmp_path / FILE
        whole, source, refusals = path.read_bytes(), random.Random(0), []
        damaged = [whole[: source.randrange(len(whole))] for _ in range(40)]
        for _ in range(120):
            altered = bytearray(whole)
            for _ in range(10):
                altered[source.randrange(len(whole))] = source.randrange(256)
            damaged.append(bytes(altered))
        for content in [*damaged, b"", b"hello", b"\x80\x02rubbish"]:
            path.write_bytes(content)
            try:
                load_state(tmp_path, *make(), CONDITIONS)  # altered numbers cannot be told from good ones
            except ValueError as error:
                refusals.append(str(error))
        assert len(refusals) > 80
        for refusal in refusals:
            assert refusal.startswith(str(path))
            assert refusal.endswith("start again in another folder")
            assert "\n" not in refusal

    def test_code_is_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, ...]:
                return (Path.touch, (tmp_path / "was-here",))

        (tmp_path / FILE).write_bytes(pickle.dumps(Evil(), protocol=2))
        with pytest.raises(ValueError, match=r"last\.pt is damaged or no state of a run"):
            load_state(tmp_path, *make(), CONDITIONS)
        assert not (tmp_path / "was-here").exists()

    @pytest.mark.parametrize(
        "content", [3, [1], {"model": {}}, {"model": {}, "optimizer": {}, "state": {}, "conditions": 3}]
    )
    def test_other_content(self, tmp_path: Path, content: object) -> None:
        torch.save(content, tmp_path / FILE)
        with pytest.raises(ValueError, match="is not the state of a run"):
            load_state(tmp_path, *make(), CONDITIONS)

    def test_another_model(self, tmp_path: Path) -> None:
        save_state(tmp_path, *make(), STATE, CONDITIONS)
        with pytest.raises(ValueError, match=r"last\.pt is not of this model"):
            load_state(tmp_path, *make(width=4), CONDITIONS)

    def test_another_optimiser(self, tmp_path: Path) -> None:
        save_state(tmp_path, *make(), STATE, CONDITIONS)
        model, _ = make()
        single = torch.optim.AdamW(model.parameters())
        with pytest.raises(ValueError, match=r"last\.pt is not of this model"):
            load_state(tmp_path, model, single, CONDITIONS)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"processes": 1}, "processes was 2, now 1; put"),
            ({"content of a": "99"}, "content of a was 12ab, now 99; put"),
            ({"content of b": "0"}, "content of b was None, now 0; put"),
            ({"content of a": "99", "processes": 3}, "content of a was 12ab, now 99; processes was 2, now 3; put"),
        ],
    )
    def test_other_conditions(self, tmp_path: Path, changes: dict[str, str | int], message: str) -> None:
        save_state(tmp_path, *make(), STATE, CONDITIONS)
        with pytest.raises(ValueError, match=rf"last\.pt would go on to another result: {message}"):
            load_state(tmp_path, *make(width=4), CONDITIONS | changes)  # said before the model that may follow from it

    def test_another_version(self, tmp_path: Path) -> None:
        model, optimizer = make()
        save_state(tmp_path, model, optimizer, STATE, CONDITIONS)
        content = torch.load(tmp_path / FILE, weights_only=True)
        torch.save(content | {"state": {"step": 1, "epoch": 2}}, tmp_path / FILE)
        with pytest.raises(ValueError, match=r"not of this model .*epoch"):
            load_state(tmp_path, model, optimizer, CONDITIONS)
