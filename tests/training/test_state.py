"""What a killed run continues from: the same bits back, or a clear refusal."""

import json
import pickle
import random
import shutil
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import nn

from bridgetower.checkpoints.tensors import STATE_JSON
from bridgetower.files import NotWrittenError
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.training import state as state_module
from bridgetower.training.optim import build_optimizer
from bridgetower.training.state import (
    DATA,
    HELD_OUT,
    OPTIMIZER,
    StateSaver,
    TrainingState,
    load_state,
    newest,
)
from helpers.checkpoints import STATE_FOLDER, saved_state
from helpers.models import same_tensors

STATE = TrainingState(step=3, best=1.5, metrics={"rsum": 1.25})
PROCESSES = "number of processes"
MICRO_BATCHES = "micro-batches of each"
CONDITIONS = {
    PROCESSES: 2,
    MICRO_BATCHES: 3,
    OPTIMIZER: "AdamW",
    DATA: {"a (train)": "12ab", "b (train)": "34cd"},
    HELD_OUT: {"a (test)": "12ab"},
}
ADVICE = "remove this folder to continue from the state before, or start again in another folder"
TENSORS = "process-00000.safetensors"


def linear_and_optimizer(width=3, rule="adamw", seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    config = OptimizerConfig(lr=0.1, rule=rule)
    groups = [{"params": [model.weight], "names": ["weight"], "lr": 0.1, "weight_decay": 0.1}]
    groups.append({"params": [model.bias], "names": ["bias"], "lr": 0.2, "weight_decay": 0.0})
    made = model, build_optimizer(groups, config)
    for _ in range(2):
        step_optimizer(*made)
    return made


def step_optimizer(model, optimizer):
    model(torch.randn(4, model.in_features)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def same_state(first, second):
    moments = [list(optimizer.state_dict()["state"].values()) for _, optimizer in (first, second)]
    weights = same_tensors(first[0].state_dict(), second[0].state_dict())
    return weights and all(same_tensors(*pair) for pair in zip(*moments, strict=True))


def save(out, made, state=STATE, *, asynchronous=False):
    with StateSaver(out, CONDITIONS, asynchronous=asynchronous) as saver:
        saver.save(*made, state)
    folder = newest(out)
    assert folder is not None
    return folder


def names_of_state(out):
    return sorted(path.name for path in (out / STATE_FOLDER).iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("rule", ["adamw", "hf_adamw"])
def test_the_same_bits_come_back(tmp_path, rule, asynchronous):
    made = linear_and_optimizer(rule=rule)
    other = linear_and_optimizer(rule=rule, seed=1)
    assert not same_state(made, other)
    save(tmp_path, made, asynchronous=asynchronous)
    assert load_state(tmp_path, *other, CONDITIONS) == STATE
    assert same_state(made, other)
    assert names_of_state(tmp_path) == ["step-00000003"]
    for run_state in (made, other):
        torch.manual_seed(5)
        step_optimizer(*run_state)
    assert same_state(made, other)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_two_are_kept(tmp_path, asynchronous):
    assert load_state(tmp_path, *linear_and_optimizer(), CONDITIONS) == TrainingState()
    with StateSaver(tmp_path, CONDITIONS, asynchronous=asynchronous) as saver:
        for number in range(1, 5):
            saver.save(*linear_and_optimizer(), TrainingState(step=number))
    assert names_of_state(tmp_path) == ["step-00000003", "step-00000004"]
    assert saved_state(tmp_path).step == 4


def test_what_is_saved_in_the_background_is_what_was_there(tmp_path, monkeypatch):
    changed = Event()
    write = state_module.write_safetensors
    monkeypatch.setattr(
        state_module, "write_safetensors", lambda *arguments: (changed.wait(60), write(*arguments))
    )
    model, optimizer = linear_and_optimizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    later = TrainingState(step=3, evaluated=3, best=2.5, metrics={"rsum": 2.5})
    with StateSaver(tmp_path, CONDITIONS, asynchronous=True) as saver:
        saver.save(model, optimizer, STATE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        changed.set()
        saver.amend(later)
    other = linear_and_optimizer(seed=1)
    assert load_state(tmp_path, *other, CONDITIONS) == later
    assert same_tensors(other[0].state_dict(), before)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_that_cannot_be_written_leaves_the_one_of_before(
    tmp_path, monkeypatch, asynchronous
):
    save(tmp_path, linear_and_optimizer())

    def full(path, tensors):
        raise NotWrittenError(path, "No space left on device", 28)

    monkeypatch.setattr("bridgetower.training.state.write_safetensors", full)
    with pytest.raises(
        OSError, match=r"step-00000004 could not be written \(No space left on device\); make room"
    ):
        save(tmp_path, linear_and_optimizer(), TrainingState(step=4), asynchronous=asynchronous)
    assert names_of_state(tmp_path) == ["step-00000003"]


def refusal(out, made):
    model, optimizer = linear_and_optimizer(seed=1)
    try:
        state = load_state(out, model, optimizer, CONDITIONS)
    except ValueError as error:
        assert str(error).startswith(str(newest(out)))  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return str(error)
    assert state == STATE
    assert same_state((model, optimizer), made)
    return None


class TestRefusals:
    @pytest.mark.parametrize("file", [STATE_JSON, TENSORS])
    def test_cut_and_altered_files(self, tmp_path, file):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "was-here",))

        made = linear_and_optimizer()
        source = random.Random(0)
        path = save(tmp_path, made) / file
        whole = path.read_bytes()
        damaged = [whole[: source.randrange(len(whole) - 1)] for _ in range(20)]
        for _ in range(40):
            altered = bytearray(whole)
            for _ in range(10):
                altered[source.randrange(len(whole))] = source.randrange(256)
            damaged.append(bytes(altered))
        for changed in [*damaged, b"", b"hello", pickle.dumps(Evil(), protocol=2)]:
            path.write_bytes(changed)
            assert str(refusal(tmp_path, made)).endswith(ADVICE)
        path.unlink()
        assert ADVICE in str(refusal(tmp_path, made))
        assert not (tmp_path / "was-here").exists()

    @pytest.mark.parametrize("file", [STATE_JSON, TENSORS])
    def test_a_flipped_bit_is_found_or_changes_nothing(self, tmp_path, file):
        """One in every seventh byte: of weights, moments, names and what is said about them."""
        made = linear_and_optimizer()
        source = random.Random(0)
        num_refused = 0
        path = save(tmp_path, made) / file
        whole = path.read_bytes()
        for position in range(0, len(whole), 7):
            altered = bytearray(whole)
            altered[position] ^= 1 << source.randrange(8)
            path.write_bytes(altered)
            num_refused += refusal(tmp_path, made) is not None
        # space between words of JSON is free
        assert num_refused > 0.9 * len(whole[::7].translate(None, b" \n"))

    def test_the_state_before_is_taken_when_the_last_one_is_removed(self, tmp_path):
        made = linear_and_optimizer()
        save(tmp_path, made)
        last = save(tmp_path, linear_and_optimizer(seed=2), TrainingState(step=4))
        (last / TENSORS).write_bytes(b"")
        assert ADVICE in str(refusal(tmp_path, made))
        shutil.rmtree(last)
        assert refusal(tmp_path, made) is None

    @pytest.mark.parametrize("content", [[1], {}, {"state": {"step": 1}}])
    def test_other_content_or_another_model(self, tmp_path, content):
        folder = save(tmp_path, linear_and_optimizer())
        with pytest.raises(
            ValueError, match=r"not of this model \(model\.weight was \[2, 3\], now \[2, 4\]\)"
        ):
            load_state(tmp_path, *linear_and_optimizer(width=4), CONDITIONS)
        (folder / STATE_JSON).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is damaged or no state of a run"):
            load_state(tmp_path, *linear_and_optimizer(), CONDITIONS)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {DATA: {"a (train)": "12ab", "b (train)": "99"}},
                r"content of b \(train\) was 34cd, now 99",
            ),
            (
                {DATA: {"a (train)": "34cd", "b (train)": "12ab"}},
                r"content of a \(train\) was 12ab, now 34cd, content of b \(train\) was 34cd, now 12ab",
            ),
            ({DATA: {"a (train)": "12ab"}, HELD_OUT: {}}, "2 files, now 1"),
            ({HELD_OUT: {"a (test)": "99"}}, r"content of a \(test\) was 12ab, now 99"),
            (
                {DATA: {"a (train)": "12ab", "/moved/b (train, test)": "34cd"}},
                r"b \(train\) was trained on, now /moved/b \(train, test\)",
            ),
        ],
    )
    def test_other_data(self, tmp_path, changes, message):
        save(tmp_path, linear_and_optimizer())
        with pytest.raises(
            ValueError,
            match=rf"step-00000003 is of other data: {message}; put them back as they were",
        ):
            # said before what may follow from it
            load_state(tmp_path, *linear_and_optimizer(width=4), CONDITIONS | changes)


class TestChanges:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {PROCESSES: 1, MICRO_BATCHES: 6},
                f"{PROCESSES} was 2, now 1; {MICRO_BATCHES} was 3, now 6",
            ),
            (
                {DATA: {"/moved/a (train)": "12ab", "/moved/b (train)": "34cd"}},
                None,
            ),  # the same data elsewhere
            ({HELD_OUT: {}}, None),  # without an evaluation
            ({HELD_OUT: {"a (validation)": "12ab"}}, None),
        ],
    )
    def test_of_the_batch_and_the_place_of_the_data(self, tmp_path, caplog, changes, message):
        made = linear_and_optimizer()
        other = linear_and_optimizer(seed=1)
        save(tmp_path, made)
        assert load_state(tmp_path, *other, CONDITIONS | changes) == STATE
        assert same_state(other, made)
        assert [message in line for line in caplog.messages] == ([True] if message else [])

    def test_another_optimiser_starts_without_moments(self, tmp_path, caplog):
        (model, _), (other, optimizer) = made, _ = (
            linear_and_optimizer(),
            linear_and_optimizer(rule="hf_adamw", seed=1),
        )
        save(tmp_path, made)
        load_state(tmp_path, other, optimizer, CONDITIONS | {OPTIMIZER: "HfAdamW"})
        assert same_tensors(model.state_dict(), other.state_dict())
        assert not optimizer.state
        assert "optimiser was AdamW, now HfAdamW" in caplog.text
        step_optimizer(other, optimizer)

    def test_what_is_not_optimised_any_more_is_left_behind(self, tmp_path):
        made = linear_and_optimizer()
        (model, _) = linear_and_optimizer(seed=1)
        save(tmp_path, made)
        single = torch.optim.AdamW([{"params": [model.weight], "names": ["weight"]}])
        load_state(tmp_path, model, single, CONDITIONS)
        moments = made[1].state[made[0].weight]
        assert same_tensors(dict(single.state[model.weight]), dict(moments))
        assert len(single.state) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_file_of_a_state_is_synced(tmp_path, synced, asynchronous):
    folder = save(tmp_path, linear_and_optimizer(), STATE, asynchronous=asynchronous)
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path, names in synced if names is None} == files
    assert [path for path, names in synced if names and folder.name in names] == [folder.parent]
