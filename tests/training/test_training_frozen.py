"""Frozen towers: the same losses and gradients as towers that are asked each time, from files that survive kills."""

import inspect
import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from fitting import KINDS
from freezing import KEY, prepared, recomputed, tower_passes
from safetensors.torch import load_file, save_file
from torch import Tensor

import shapes
from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batch import BatchKey
from bridgetower.data.store import Table
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.towers import VisionTransformer
from bridgetower.objectives.config import PretrainingConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.table import RECIPES
from bridgetower.training.frozen import _View
from bridgetower.training.run import train
from bridgetower.training.setup import TaskSetup
from bridgetower.training.step import does_not_fit
from families import save_text, save_timm
from folders import same_weights

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


def versions(cache: Path) -> dict[Path, int]:
    """The version of each table of a cache, which another commit changes."""
    return {path: Table(path).version for path in cache.glob("*/states.lance")}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for tests of what is read from it."""
    return tmp_path_factory.mktemp("features")


class TestSteps:
    @pytest.mark.parametrize("kind", ["pretraining", *KINDS])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_losses_and_gradients_are_those_of_towers_that_are_asked(
        self, all_runs: dict[str, RunConfig], kind: str, precision: Any, features: Path
    ) -> None:
        model, work, examples = prepared(replace(all_runs[kind], precision=precision), features)
        batch = examples[KEY]
        asked = recomputed(batch, work, examples)
        exact = step(model, work, asked)[1]
        with autocast(precision):
            losses, gradients = step(model, work, batch)
            expected = step(model, work, asked)
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        # In bfloat16 towers round otherwise in batches of another size, so that the gradients of both are as far from
        # each other as from those in float32.
        limit = 1e-5 * largest if precision == "fp32" else 3 * distance(expected[1], exact)
        assert distance(losses, expected[0]) < (1e-5 if precision == "fp32" else 0.03)
        assert distance(gradients, expected[1]) < limit
        assert largest > 0.05
        assert not any(name.startswith(("vision.", "text.")) for name in gradients)

    @pytest.mark.parametrize("kind", ["pretraining", *KINDS])
    def test_a_batch_that_does_not_fit_names_one_that_does(
        self, all_runs: dict[str, RunConfig], kind: str, features: Path
    ) -> None:
        _, work, examples = prepared(all_runs[kind], features)

        def run(part: Any) -> None:
            if len(part) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            work.task(part).total.backward()

        advice = does_not_fit(examples[BatchKey((0, 3, 1, 2, 4, 5, 6, 7), 3)], run)
        assert str(advice).endswith("one of 2 does: use --micro-batch-size 2")

    @pytest.mark.parametrize("kind", ["pretraining", "nlvr2"])
    @pytest.mark.parametrize("top", [1, 2])
    def test_layers_that_train_run_on_cached_states(
        self, all_runs: dict[str, RunConfig], kind: str, top: int, features: Path
    ) -> None:
        config = replace(all_runs[kind], train_top=top)
        model, work, examples = prepared(config, features)
        batch = examples[KEY]
        run: set[str] = set()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name: run.add(name))
        losses, gradients = step(model, work, batch)
        numbers = {f"{part}.layers.{number}" for part in ("vision", "text") for number in range(2)}
        trained = {name for name in numbers if int(name[-1]) >= 2 - top}
        assert run & numbers == trained
        assert {".".join(name.split(".")[:3]) for name in gradients if name.startswith(("vision", "text."))} == trained
        expected = step(model, work, recomputed(batch, work, examples))
        assert distance(losses, expected[0]) < 1e-5
        assert distance(gradients, expected[1]) < 1e-5 * max(float(value.abs().max()) for value in gradients.values())
        model.eval()
        metrics = work.evaluate()
        work.images[1].frozen = None
        assert metrics == pytest.approx(work.evaluate(), abs=1e-6)
        written = versions(features)
        prepared(replace(config, max_steps=2), features)
        assert versions(features) == written

    def test_half_precision_on_the_disk_loses_nothing_that_autocast_reads(
        self, all_runs: dict[str, RunConfig], features: Path
    ) -> None:
        model, work, examples = prepared(replace(all_runs["pretraining"], precision="bf16"), features)
        work.images[0].frozen = None
        view = _View(work.images[0], 3, examples.seed)
        pixels = torch.stack([view(row) for row in range(32)])
        with autocast("bf16"), torch.no_grad():  # in the batch in which it was computed
            expected = model.vision(pixels, model.config.vision_layers)
        for stored, asked in zip(examples.images.read(range(32)).unbind(1), expected, strict=True):
            assert torch.equal(stored, asked.bfloat16())  # to which autocast rounds what a projection reads

    def test_control_other_views_differ(self, all_runs: dict[str, RunConfig], features: Path) -> None:
        model, work, examples = prepared(all_runs["pretraining"], features)
        batch: Any = examples[KEY]
        losses, _ = step(model, work, batch)
        others = (replace(batch, image_states=examples[replace(KEY, seed=seed)].image_states) for seed in range(4, 9))
        assert max(distance(losses, step(model, work, other)[0]) for other in others) > 1e-3

    def test_every_view_of_an_image_is_seen_with_every_text(
        self, all_runs: dict[str, RunConfig], features: Path
    ) -> None:
        _, _, examples = prepared(all_runs["pretraining"], features)
        batches: list[Any] = [examples[BatchKey((0,), seed)] for seed in range(60)]
        seen = {(float(batch.image_states.sum()), float(batch.masked_states.sum())) for batch in batches}
        assert [len({each[place] for each in seen}) for place in (0, 1)] == [3, 3]
        assert len(seen) == 9
        again: Any = examples[BatchKey((0,), 5)]
        assert torch.equal(again.image_states, batches[5].image_states)

    def test_what_is_evaluated_is_the_same(self, all_runs: dict[str, RunConfig], features: Path) -> None:
        config = all_runs["pretraining"]
        model, work, _ = prepared(config, features)
        model.eval()
        metrics = work.evaluate()
        assert work.images[1].frozen is not None
        work.images[1].frozen = None
        assert metrics == pytest.approx(work.evaluate(), abs=1e-6)


@pytest.fixture(scope="module")
def whole(
    all_runs: dict[str, RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float], Counter[str]]:
    """A run that nothing disturbed, with its cache beside it, its metrics and how often its towers ran."""
    out = tmp_path_factory.mktemp("frozen") / "run"
    with tower_passes() as passes:
        metrics = train(all_runs["pretraining"], out, feature_cache=out.parent / "cache", progress=False)
    return out, metrics, passes


class TestRun:
    def test_towers_stay_and_the_rest_learns(self, whole: tuple[Path, Any, Any], tiny_checkpoint: Path) -> None:
        before, after = (read_checkpoint(path).tensors for path in (tiny_checkpoint, whole[0] / "last"))
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert not changed & {"vision", "text"}
        assert {"image_projections", "text_projections", "fusion", "itm_head", "mlm_head", "itc_head"} <= changed

    def test_top_layers_learn_and_those_below_stay(
        self, all_runs: dict[str, RunConfig], tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        config = replace(all_runs["pretraining"], train_top=1)
        train(config, tmp_path / "run", feature_cache=tmp_path / "cache", progress=False)
        before, after = (read_checkpoint(path).tensors for path in (tiny_checkpoint, tmp_path / "run" / "last"))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        towers = {".".join(name.split(".")[:3]) for name in changed if name.startswith(("vision.", "text."))}
        assert towers == {"vision.layers.1", "text.layers.1"}
        written = versions(tmp_path / "cache")
        again = replace(config, init=str(tmp_path / "run"), max_steps=1)  # the same layers below
        train(again, tmp_path / "again", feature_cache=tmp_path / "cache", progress=False)
        assert versions(tmp_path / "cache") == written

    def test_stopped_and_continued_it_ends_with_the_same_bits(
        self,
        whole: tuple[Path, dict[str, float], Any],
        all_runs: dict[str, RunConfig],
        stop_at: Callable[..., None],
        tmp_path: Path,
    ) -> None:
        out = tmp_path / "run"
        stop_at(4, out, config=all_runs["pretraining"])
        cache = tmp_path / "elsewhere"
        assert train(all_runs["pretraining"], out, resume=True, feature_cache=cache, progress=False) == whole[1]
        assert same_weights(out / "last", whole[0] / "last")

    def test_a_killed_writer_leaves_what_it_finished(
        self,
        whole: tuple[Path, dict[str, float], Counter[str]],
        all_runs: dict[str, RunConfig],
        forked: Path,
        tmp_path: Path,
    ) -> None:
        out, cache, config = tmp_path / "run", tmp_path / "cache", all_runs["pretraining"]
        (tmp_path / "config.pickle").write_bytes(pickle.dumps((config, out, cache)))
        command = [forked / "python", "-c", KILLED, tmp_path / "config.pickle"]
        killed = subprocess.run(command, cwd=Path(__file__).parent)
        assert killed.returncode == -signal.SIGKILL
        half = [len(Table(path)) for path in cache.glob("*/states.lance")]
        assert half == [32]  # of 81
        with tower_passes() as passes:
            assert train(config, out, feature_cache=cache, progress=False) == whole[1]
        assert passes["vision"] == whole[2]["vision"] - 1
        assert same_weights(out / "last", whole[0] / "last")


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from bridgetower.data import frozen, store
from bridgetower.tasks.table import RECIPES
from bridgetower.training.frozen import _View
from bridgetower.training.run import train
config, out, cache = pickle.loads(Path(sys.argv[1]).read_bytes())
frozen._COMMIT_BYTES = 32 * 4 * 5 * 2 * 8  # bytes of a batch of views
append, commits = store.Table.append, []
def killed(table, rows):
    append(table, rows) if not commits else os.kill(os.getpid(), signal.SIGKILL)
    commits.append(len(rows))
store.Table.append = killed
train(config, out, feature_cache=cache, progress=False)
"""


class TestCache:
    """Which runs share what towers gave: `passes` counts runs of the image and of the text tower."""

    @pytest.mark.parametrize(
        ("kind", "changes", "computed"),
        [
            ("vqa", {}, set()),
            ("vqa", {"seed": 1, "batch_size": 4, "micro_batch_size": 2}, set()),
            ("vqa", {"data": {"num_workers": 1, "max_length": 30}}, set()),
            ("vqa", {"data": {"augmentation": "affine"}}, {"vision"}),
            ("vqa", {"data": {"background": (9, 9, 9)}}, {"vision"}),
            ("vqa", {"frozen_views": 2}, {"vision"}),
            ("vqa", {"precision": "bf16"}, {"vision", "text"}),
            ("pretraining", {"seed": 1}, {"vision", "text"}),
            ("pretraining", {"data": {"word_dropout": 0.5}}, {"text"}),
        ],
    )
    def test_settings(
        self, all_runs: dict[str, RunConfig], kind: str, changes: dict[str, Any], computed: set[str], tmp_path: Path
    ) -> None:
        config = all_runs[kind]
        prepared(config, tmp_path)
        data = replace(config.data, **changes.get("data", {}))
        with tower_passes() as passes:
            prepared(replace(config, **changes | {"data": data}), tmp_path)
        assert set(passes) == computed

    @pytest.mark.parametrize("part", ["vision", "text"])
    def test_other_weights(
        self, all_runs: dict[str, RunConfig], tmp_path: Path, tiny_checkpoint: Path, part: str
    ) -> None:
        config, changed = all_runs["pretraining"], tmp_path / "changed"
        prepared(config, tmp_path / "cache")
        shutil.copytree(tiny_checkpoint, changed)
        tensors = load_file(changed / "model.safetensors")
        tensors[f"{part}.layers.1.mlp.down.bias"] += 1e-6
        save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
        with tower_passes() as passes:
            prepared(replace(config, init=str(changed)), tmp_path / "cache")
        assert set(passes) == {part}

    def test_other_layers_of_the_same_tower(self, tiny_dataset: Path, tmp_path: Path) -> None:
        config = shapes.run_config(tiny_dataset, freeze_towers=True)
        meter = replace(config, model=config.model.override({"fusion.bridge": None}))
        towers = [prepared(run, tmp_path)[0].state_dict() for run in (config, meter)]
        assert all(
            torch.equal(towers[1][name], value) for name, value in towers[0].items() if name.startswith("vision")
        )
        layers = [json.loads(path.read_text())["layers"] for path in tmp_path.glob("*/content.json")]
        assert sorted(layers) == [[1, 2]] * 3 + [[2]] * 3

    def test_everything_may_be_moved(
        self, all_runs: dict[str, RunConfig], tmp_path: Path, tiny_checkpoint: Path, tiny_dataset: Path
    ) -> None:
        config = all_runs["pretraining"]
        prepared(config, tmp_path / "cache")
        shutil.copytree(tiny_checkpoint, tmp_path / "model")
        shutil.copytree(tiny_dataset, tmp_path / "set")
        (tmp_path / "cache").rename(tmp_path / "moved")
        moved = replace(
            config, init=str(tmp_path / "model"), data=replace(config.data, folders=(str(tmp_path / "set"),))
        )
        with tower_passes() as passes:
            model, work, examples = prepared(moved, tmp_path / "moved")
            batch = examples[KEY]
            losses, _ = step(model, work, batch)
        assert not passes
        assert distance(losses, step(model, work, recomputed(batch, work, examples))[0]) < 1e-5

    def test_of_two_at_once_one_computes(self, all_runs: dict[str, RunConfig], tmp_path: Path) -> None:
        config = all_runs["vqa"]
        with tower_passes() as alone:
            prepared(config, tmp_path / "alone")
        with ProcessPoolExecutor(2, mp_context=get_context("forkserver")) as pool:
            both = list(pool.map(passes_of, [config] * 2, [tmp_path / "both"] * 2))
        assert both[0] + both[1] == alone
        assert len(list((tmp_path / "both").glob("*/states.lance"))) == 3

    def test_what_they_were_computed_from_is_written_down(self, all_runs: dict[str, RunConfig], tmp_path: Path) -> None:
        _, work, _ = prepared(all_runs["vqa"], tmp_path)
        contents = [json.loads(path.read_text()) for path in tmp_path.glob("*/content.json")]
        assert len(contents) == 3
        pixels = [content["pixels"] for content in contents if "pixels" in content]
        assert sorted(digest for content in pixels for digest, _ in content["data"]) == sorted(work.digests.values())
        tower = sha256(Path(inspect.getfile(VisionTransformer)).read_bytes()).hexdigest()[:16]
        assert all(tower in content["code"] for content in contents)
        assert all(content["versions"]["torch"] == torch.__version__ for content in [*contents, *pixels])
        assert all(content["versions"]["PIL"] == PIL.__version__ for content in pixels)

    def test_another_precision(self, all_runs: dict[str, RunConfig], tmp_path: Path) -> None:
        for rounded, count in ((True, 3), (False, 6)):
            torch.backends.cuda.matmul.allow_tf32 = rounded
            prepared(all_runs["vqa"], tmp_path)
            assert len(list(tmp_path.glob("*/content.json"))) == count

    def test_another_version_of_a_library(
        self, tiny_dataset: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for library in ("timm", "transformers"):
            pytest.importorskip(library)
        save_timm(tmp_path / "vision", "siglip")
        save_text(tmp_path / "text", "modernbert", vocab_size=310)
        shutil.copy(tiny_checkpoint / "tokenizer.json", tmp_path / "text")
        towers = {part: str(tmp_path / part) for part in ("vision", "text")}
        nano = RECIPES["pretrain-nano"]
        config = shapes.run_config(tiny_dataset, recipe=nano.recipe, model=nano.model, freeze_towers=True, **towers)
        assert set(passes_of(config, tmp_path / "cache")) == {"vision", "text"}
        assert not passes_of(config, tmp_path / "cache")
        for library, part in (("timm", "vision"), ("transformers", "text")):
            monkeypatch.setattr(sys.modules[library], "__version__", "99.0")
            assert set(passes_of(config, tmp_path / "cache")) == {part}


def passes_of(config: RunConfig, cache: Path) -> Counter[str]:
    """How often towers run in a run up to its examples."""
    with tower_passes() as passes:
        prepared(config, cache)
    return passes


def test_random_towers_are_warned_of(tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared(shapes.run_config(tiny_dataset, freeze_towers=True), tmp_path)
    assert "some of them start from random weights; give init" in caplog.text
