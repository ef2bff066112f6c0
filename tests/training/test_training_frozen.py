"""Frozen towers: the same losses and gradients as towers that are asked each time, from files that survive kills."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import KINDS
from freezing import prepared, recomputed
from safetensors.torch import load_file, save_file
from torch import Tensor

import shapes
from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batch import BatchKey
from bridgetower.data.frozen import CachedViews
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.config import PretrainingConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.frozen import FOLDER
from bridgetower.training.run import train
from bridgetower.training.setup import TaskSetup
from folders import same_weights, snapshot

EVERYTHING = PretrainingConfig(phases=(replace(shapes.PHASES[-1], until=1.0),))


@pytest.fixture(scope="module")
def all_runs(runs: dict[str, RunConfig], tiny_dataset: Path, tiny_checkpoint: Path) -> dict[str, RunConfig]:
    """A run of each kind with frozen towers."""
    captions = shapes.run_config(
        tiny_dataset,
        init=str(tiny_checkpoint),
        task=EVERYTHING,
        data=replace(runs["ranking"].data, augmentation="affine", word_dropout=0.2),
        checkpoint_every=2,
    )
    return {
        kind: replace(run, freeze_towers=True, frozen_views=3)
        for kind, run in (runs | {"pretraining": captions}).items()
    }


def step(model: BridgeTower, work: TaskSetup, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients with the dropout of the fusion encoder and with towers that draw none."""
    model.zero_grad(set_to_none=True)
    work.task.train()
    model.vision.eval()
    model.text.eval()
    torch.manual_seed(7)
    losses = work.task(batch)
    losses.total.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: loss.detach() for name, loss in losses.parts.items()}, gradients


def autocast(precision: str) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class TestSteps:
    @pytest.mark.parametrize("kind", ["pretraining", *KINDS])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_losses_and_gradients_are_those_of_towers_that_are_asked(
        self, all_runs: dict[str, RunConfig], kind: str, precision: Any, tmp_path: Path
    ) -> None:
        model, work, examples = prepared(replace(all_runs[kind], precision=precision), tmp_path)
        batch = examples[BatchKey(tuple(range(6)), 3)]
        asked = recomputed(batch, work, examples)
        exact = step(model, work, asked)[1]
        with autocast(precision):
            losses, gradients = step(model, work, batch)
            expected = step(model, work, asked)
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        # In bfloat16 towers round otherwise in batches of another size, so that the gradients of both are as far from
        # each other as from those in float32.
        limit = 1e-5 * largest if precision == "fp32" else 2 * distance(expected[1], exact)
        assert distance(losses, expected[0]) < (1e-5 if precision == "fp32" else 0.03)
        assert distance(gradients, expected[1]) < limit
        assert largest > 0.05
        assert not any(name.startswith(("vision.", "text.")) for name in gradients)

    def test_half_precision_on_the_disk_loses_nothing_that_autocast_reads(
        self, all_runs: dict[str, RunConfig], tmp_path: Path
    ) -> None:
        model, work, examples = prepared(replace(all_runs["pretraining"], precision="bf16"), tmp_path)
        frozen = work.images[0].frozen
        assert frozen is not None
        batch: Any = examples[BatchKey(tuple(range(6)), 3)]
        first = replace(batch, pixel_values=CachedViews(frozen.files, range(32), stride=1, num_views=3))
        pixels = recomputed(first, work, examples).pixel_values
        with autocast("bf16"), torch.no_grad():
            expected = model.vision(pixels, model.config.vision_layers)  # in the batch in which it was computed
        for stored, asked in zip(first.pixel_values.layers(), expected, strict=True):
            assert torch.equal(stored, asked.bfloat16())  # to which autocast rounds what a projection reads

    def test_control_other_views_differ(self, all_runs: dict[str, RunConfig], tmp_path: Path) -> None:
        model, work, examples = prepared(all_runs["pretraining"], tmp_path)
        batch: Any = examples[BatchKey(tuple(range(6)), 3)]
        losses, _ = step(model, work, batch)
        views = batch.pixel_values
        other = CachedViews(
            views.files, views.firsts, stride=1, num_views=3, rows=[first + 2 for first in views.firsts]
        )
        assert distance(losses, step(model, work, replace(batch, pixel_values=other))[0]) > 1e-3

    def test_every_view_of_a_picture_is_seen_with_every_text(
        self, all_runs: dict[str, RunConfig], tmp_path: Path
    ) -> None:
        _, _, examples = prepared(all_runs["pretraining"], tmp_path)
        batches: list[Any] = [examples[BatchKey((0,), seed)] for seed in range(60)]
        seen = {(batch.pixel_values.rows, batch.masked_input_ids.rows) for batch in batches}
        assert len(seen) == 3 * len({texts for _, texts in seen})
        assert len({texts for _, texts in seen}) == 3
        again: Any = examples[BatchKey((0,), 5)]
        assert again.pixel_values.rows == batches[5].pixel_values.rows

    def test_what_is_evaluated_is_the_same(self, all_runs: dict[str, RunConfig], tmp_path: Path) -> None:
        config = all_runs["pretraining"]
        model, work, _ = prepared(config, tmp_path)
        model.eval()
        metrics = work.evaluate()
        assert work.images[1].frozen is not None
        work.images[1].frozen = None
        assert metrics == pytest.approx(work.evaluate(), abs=1e-6)


@pytest.fixture(scope="module")
def whole(all_runs: dict[str, RunConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A run that nothing disturbed, and its metrics."""
    out = tmp_path_factory.mktemp("frozen") / "run"
    return out, train(all_runs["pretraining"], out, progress=False)


class TestRun:
    def test_towers_stay_and_the_rest_learns(self, whole: tuple[Path, dict[str, float]], tiny_checkpoint: Path) -> None:
        before, after = (read_checkpoint(path).tensors for path in (tiny_checkpoint, whole[0] / "last"))
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert not changed & {"vision", "text"}
        assert {"image_projections", "text_projections", "fusion", "itm_head", "mlm_head", "itc_head"} <= changed

    def test_stopped_and_continued_it_ends_with_the_same_bits(
        self,
        whole: tuple[Path, dict[str, float]],
        all_runs: dict[str, RunConfig],
        stop_at: Callable[..., None],
        tmp_path: Path,
    ) -> None:
        out = tmp_path / "run"
        stop_at(4, out, config=all_runs["pretraining"])
        written = snapshot(out / FOLDER)
        assert train(all_runs["pretraining"], out, resume=True, progress=False) == whole[1]
        assert snapshot(out / FOLDER) == written
        assert same_weights(out / "last", whole[0] / "last")


class TestFiles:
    def test_only_what_is_missing_is_computed_again(self, all_runs: dict[str, RunConfig], tmp_path: Path) -> None:
        config = all_runs["nlvr2"]
        prepared(config, tmp_path)
        files = sorted((tmp_path / FOLDER).glob("*.safetensors"))
        assert [path.name for path in files] == [
            f"{name}-00000.safetensors" for name in ("train-images", "train-texts", "validation-images")
        ]
        for lost in files:
            content, before = lost.read_bytes(), snapshot(tmp_path / FOLDER)
            lost.unlink()
            (lost.parent / f".{lost.name}.partial-x.safetensors").write_bytes(b"half")
            prepared(config, tmp_path)
            assert lost.read_bytes() == content
            assert snapshot(tmp_path / FOLDER).keys() == before.keys()

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"frozen_views": 2}, "views.number"),
            ({"seed": 1}, "views.seed"),
            ({"precision": "bf16"}, "views.precision"),
            ({"data": {"word_dropout": 0.5}}, "settings.data.word_dropout"),
        ],
    )
    def test_other_settings_are_refused(
        self, all_runs: dict[str, RunConfig], tmp_path: Path, changes: dict[str, Any], named: str
    ) -> None:
        config = all_runs["pretraining"]
        prepared(config, tmp_path)
        if "data" in changes:
            changes = {"data": replace(config.data, **changes["data"])}
        with pytest.raises(ValueError, match=f"computed with other values of {named}; put them back"):
            prepared(replace(config, **changes), tmp_path)

    def test_other_towers_are_refused(
        self, all_runs: dict[str, RunConfig], tmp_path: Path, tiny_checkpoint: Path
    ) -> None:
        config = all_runs["pretraining"]
        prepared(config, tmp_path / "run")
        changed = tmp_path / "changed"
        changed.mkdir()
        for path in tiny_checkpoint.iterdir():
            (changed / path.name).write_bytes(path.read_bytes())
        tensors = load_file(changed / "model.safetensors")
        tensors["text.layers.1.mlp.down.bias"] += 1e-6
        save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="computed with other values of towers; put"):
            prepared(replace(config, init=str(changed)), tmp_path / "run")

    def test_a_small_disk_is_noticed_before_anything_is_computed(
        self, all_runs: dict[str, RunConfig], small_disk: Callable[[int], Path]
    ) -> None:
        disk = small_disk(64)
        with pytest.raises(OSError, match=r"tower outputs train-images take .* GiB, but the disk of .* has"):
            prepared(replace(all_runs["pretraining"], frozen_views=50), disk / "run")
        assert [path.name for path in (disk / "run" / FOLDER).iterdir()] == ["content.json"]

    def test_what_they_were_computed_from_is_written_down(self, all_runs: dict[str, RunConfig], tmp_path: Path) -> None:
        config = all_runs["vqa"]
        _, work, _ = prepared(config, tmp_path)
        content = json.loads((tmp_path / FOLDER / "content.json").read_text())
        assert content["data"] == dict(work.digests)
        assert content["views"] == {"number": 3, "seed": config.seed, "precision": "fp32"}


def test_random_towers_are_warned_of(tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared(shapes.run_config(tiny_dataset, freeze_towers=True), tmp_path)
    assert "some of them start from random weights; give init" in caplog.text
