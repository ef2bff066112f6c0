"""Projections are aligned, they alone, with the gradients of towers that are asked, and the same again after a kill."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from freezing import KEY, prepared, recomputed
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import shapes
import tiny
from bridgetower.checkpoints import read_checkpoint
from bridgetower.objectives.config import PretrainingConfig, RankingConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.alignment import Alignment, align_projections
from bridgetower.training.run import train
from folders import same_weights


@pytest.fixture
def config(tiny_dataset: Path, tiny_checkpoint: Path) -> RunConfig:
    return shapes.run_config(
        tiny_dataset,
        init=str(tiny_checkpoint),
        task=PretrainingConfig(phases=(replace(shapes.PHASES[-1], until=1.0),)),
        freeze_towers=True,
        frozen_views=2,
        align_first=5,
        checkpoint_every=2,
    )


def gradients(task: Alignment, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and what it says of every parameter."""
    task.zero_grad(set_to_none=True)
    loss = task(batch)
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in task.named_parameters() if value.grad is not None}


class TestLoss:
    def test_is_that_of_towers_that_are_asked(self, config: RunConfig, tmp_path: Path) -> None:
        model, work, examples = prepared(config, tmp_path)
        model.eval()  # towers that are asked in training draw dropout
        task, batch = Alignment(model), examples[KEY]
        loss, found = gradients(task, batch)
        expected = gradients(task, recomputed(batch, work, examples))
        assert abs(float(loss - expected[0])) < 1e-6
        assert found.keys() == expected[1].keys()
        assert all(torch.allclose(found[name], expected[1][name], atol=1e-6) for name in found)
        assert {id(value) for value in task.trained()} <= {id(value) for name, value in task.named_parameters()}
        assert not any(".vision." in name or ".text." in name or ".fusion." in name for name in found)

    def test_padding_does_not_count(self, config: RunConfig, tmp_path: Path) -> None:
        model, _, examples = prepared(config, tmp_path)
        batch: Any = examples[KEY]
        assert batch.attention_mask is not None
        padding = (batch.attention_mask == 0)[:, None, :, None].float()
        task = Alignment(model.eval())
        with torch.no_grad():
            plain = task(batch)
            assert torch.allclose(plain, task(replace(batch, text_states=batch.text_states + padding)), atol=1e-6)
            assert not torch.allclose(
                plain, task(replace(batch, text_states=batch.text_states + 1 - padding)), atol=1e-4
            )


class TestAligning:
    def test_only_the_projections_change_and_the_loss_falls(self, config: RunConfig, tmp_path: Path) -> None:
        model, _, examples = prepared(config, tmp_path)
        before, batch = {name: value.clone() for name, value in model.state_dict().items()}, examples[KEY]
        with torch.no_grad():
            untrained = Alignment(model)(batch)
        align_projections(replace(config, align_first=30), model, examples, progress=False)
        with torch.no_grad():
            assert Alignment(model)(batch) < untrained - 0.1
        changed = {name.split(".")[0] for name, value in model.state_dict().items() if not value.equal(before[name])}
        assert changed == {"image_projections", "text_projections"}
        assert all(value.grad is None for value in model.parameters())

    def test_the_learning_rate_falls_to_nothing(self, config: RunConfig, tmp_path: Path) -> None:
        model, _, examples = prepared(config, tmp_path)
        rates: list[float] = []
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        align_projections(replace(config, align_first=4), model, examples, progress=False)
        hook.remove()
        assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])

    def test_draws_nothing(self, config: RunConfig, tmp_path: Path) -> None:
        """Layers that train later run here, too."""
        config = replace(config, train_top=1)
        model, _, examples = prepared(config, tmp_path)
        before, found = copy.deepcopy(model.state_dict()), []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model.load_state_dict(before)
            align_projections(config, model, examples, progress=False)
            assert model.training
            found.append(copy.deepcopy(model.state_dict()))
        assert tiny.equal(*found)
        assert not tiny.equal(found[0], before)

    def test_in_half_precision(self, config: RunConfig, tmp_path: Path) -> None:
        config = replace(config, precision="bf16")
        model, _, examples = prepared(config, tmp_path)
        before = model.image_projections[0].weight.clone()
        align_projections(config, model, examples, progress=False)
        assert model.image_projections[0].weight.dtype == torch.float32
        assert not model.image_projections[0].weight.equal(before)

    def test_a_loss_that_is_not_finite_stops_it(self, config: RunConfig, tmp_path: Path) -> None:
        model, _, examples = prepared(config, tmp_path)
        with torch.no_grad():
            next(iter(model.image_projections.parameters())).fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="loss of aligning is nan at step 1"):
            align_projections(config, model, examples, progress=False)


class TestRun:
    def test_begins_with_aligned_projections(self, config: RunConfig, tmp_path: Path) -> None:
        train(config, tmp_path / "aligned", progress=False)
        train(replace(config, align_first=0), tmp_path / "not", progress=False)
        losses = [
            json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
            for name in ("aligned", "not")
        ]
        assert losses[0] != losses[1]

    @pytest.mark.parametrize("step", [1, 4])  # before the first checkpoint, and after it
    def test_stopped_and_continued_it_ends_with_the_same_bits(
        self, config: RunConfig, stop_at: Callable[..., None], tmp_path: Path, step: int
    ) -> None:
        metrics = train(config, tmp_path / "whole", progress=False)
        stop_at(step, tmp_path / "run", config=config)
        assert train(config, tmp_path / "run", resume=True, progress=False) == metrics
        assert same_weights(tmp_path / "run" / "last", tmp_path / "whole" / "last")
        towers = [read_checkpoint(path).tensors for path in (Path(str(config.init)), tmp_path / "run" / "last")]
        assert all(towers[0][name].equal(towers[1][name]) for name in towers[0] if name.startswith("vision."))


class TestConfig:
    @pytest.mark.parametrize("changes", [{"align_first": -1}, {"freeze_towers": False, "frozen_views": 1}])
    def test_needs_frozen_towers(self, config: RunConfig, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"align_first is -?\d; expected (at least 0|0 without freeze_towers)"):
            replace(config, **changes)

    def test_frozen_towers_take_no_transform(self, config: RunConfig) -> None:
        with pytest.raises(ValueError, match=r"data.transform my.py:views with frozen towers, .*; leave one out"):
            replace(config, data=replace(config.data, transform="my.py:views"))

    def test_needs_captions(self, config: RunConfig) -> None:
        with pytest.raises(ValueError, match="align_first compares images with captions; leave it out for ranking"):
            replace(config, task=RankingConfig())
