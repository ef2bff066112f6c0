"""The file that a killed run continues from: the same bits back, or a clear refusal."""

import logging
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.training.optim import build_optimizer
from bridgetower.training.state import FILE, MICRO_BATCHES, PROCESSES, TrainingState, load_state, save_state

STATE = TrainingState(step=3, best=1.5, best_step=2, metrics={"rsum": 1.25})
CONDITIONS = {PROCESSES: 2, MICRO_BATCHES: 3, "content of a": "12ab"}


def make(width: int = 3, rule: str = "adamw", seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
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


OTHERS = make(seed=1)


def saved(folder: Path) -> bytes:
    """Writes a state to `last.pt`, keeps it in `whole` and returns its bytes."""
    save_state(folder, *make(), STATE, CONDITIONS)
    return (folder / FILE).rename(folder / "whole").read_bytes()


def refused(folder: Path, content: bytes) -> str | None:
    """Returns the error of a state of other bytes; None where it gives what `saved` wrote."""
    (folder / FILE).write_bytes(content)
    model, optimizer = OTHERS
    try:
        state = load_state(folder, model, optimizer, CONDITIONS)
    except ValueError as error:
        assert str(error).startswith(str(folder / FILE))  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return str(error)
    expected, moments = make()
    assert state == STATE
    assert list(tensors(model.state_dict())) == list(tensors(expected.state_dict()))
    assert list(tensors(optimizer.state_dict())) == list(tensors(moments.state_dict()))
    return None


@pytest.mark.parametrize("rule", ["adamw", "hf_adamw"])
def test_the_same_bits_come_back(tmp_path: Path, rule: str) -> None:
    model, optimizer = make(rule=rule)
    save_state(tmp_path, model, optimizer, STATE, CONDITIONS)
    other, restored = make(rule=rule, seed=1)
    assert load_state(tmp_path, other, restored, CONDITIONS) == STATE
    assert list(tensors(other.state_dict())) == list(tensors(model.state_dict()))
    assert list(tensors(restored.state_dict())) == list(tensors(optimizer.state_dict()))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_without_a_state_a_run_starts_at_its_beginning(tmp_path: Path) -> None:
    assert load_state(tmp_path, *make(), CONDITIONS) == TrainingState(step=0, best=None, best_step=0, metrics={})


class TestRefusals:
    def test_cut_and_altered_files(self, tmp_path: Path) -> None:
        whole, source = saved(tmp_path), random.Random(0)
        damaged = [whole[: source.randrange(len(whole))] for _ in range(40)]
        for _ in range(120):
            altered = bytearray(whole)
            for _ in range(10):
                altered[source.randrange(len(whole))] = source.randrange(256)
            damaged.append(bytes(altered))
        for content in [*damaged, b"", b"hello", b"\x80\x02rubbish"]:
            refusal = refused(tmp_path, content)
            assert refusal
            assert refusal.endswith("start again in another folder")

    def test_every_flipped_bit_is_found_or_changes_nothing(self, tmp_path: Path) -> None:
        """One in every byte: of weights, moments, the pickle, the archive's directory and what fills it up."""
        whole, source = saved(tmp_path), random.Random(0)
        for place in range(len(whole)):
            altered = bytearray(whole)
            altered[place] ^= 1 << source.randrange(8)
            refusal = refused(tmp_path, bytes(altered))
            if place < len(whole) - len(b"crc32 12345678"):
                assert refusal
                assert "is damaged: its checksum is that of other bytes" in refusal

    def test_a_state_of_an_earlier_release_has_no_checksum(self, tmp_path: Path) -> None:
        saved(tmp_path)
        content = torch.load(tmp_path / "whole", weights_only=True)
        torch.save(content, tmp_path / "earlier")
        assert refused(tmp_path, (tmp_path / "earlier").read_bytes()) is None

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
            (
                {PROCESSES: 1},
                "number of processes was 2, now 1; put this back as it was or give allow_world_size_change",
            ),
            ({MICRO_BATCHES: 1}, "micro-batches of each was 3, now 1; put this back as it was, or start again"),
            ({"content of a": "99"}, "content of a was 12ab, now 99; put"),
            ({"content of b": "0"}, "content of b was None, now 0; put"),
            (
                {"content of a": "99", PROCESSES: 3},
                "content of a was 12ab, now 99; number of processes was 2, now 3; put",
            ),
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


class TestAnotherNumberOfProcesses:
    def test_goes_on_where_it_is_allowed_and_says_what_changes(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model, optimizer = make()
        save_state(tmp_path, model, optimizer, STATE, CONDITIONS)
        other, restored = make(seed=1)
        with caplog.at_level(logging.WARNING):
            now = CONDITIONS | {PROCESSES: 1, MICRO_BATCHES: 6}
            assert load_state(tmp_path, other, restored, now, allow_world_size_change=True) == STATE
        assert list(tensors(other.state_dict())) == list(tensors(model.state_dict()))
        (record,) = caplog.records
        message = record.getMessage()
        assert "micro-batches of each was 3, now 6; number of processes was 2, now 1" in message
        assert all(word in message for word in ("micro-batches", "negatives", "contrast", "dropout"))

    def test_other_data_are_refused_all_the_same(self, tmp_path: Path) -> None:
        save_state(tmp_path, *make(), STATE, CONDITIONS)
        now = CONDITIONS | {PROCESSES: 1, "content of a": "99"}
        with pytest.raises(ValueError, match="content of a was 12ab, now 99; number of processes was 2, now 1"):
            load_state(tmp_path, *make(), now, allow_world_size_change=True)

    def test_the_same_number_needs_no_warning(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        save_state(tmp_path, *make(), STATE, CONDITIONS)
        load_state(tmp_path, *make(), CONDITIONS, allow_world_size_change=True)
        assert not caplog.records
