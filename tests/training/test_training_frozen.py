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
from freezing import prepared, recomputed, tower_passes
from safetensors.torch import load_file, save_file
from torch import Tensor

import shapes
from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batch import BatchKey, CachedFeatures
from bridgetower.data.frozen import CachedViews
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.towers import VisionTransformer
from bridgetower.objectives.config import PretrainingConfig
from bridgetower.objectives.encoding import encode_image, encode_text
from bridgetower.rows import RowCache
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.table import RECIPES
from bridgetower.training.frozen import _Towers
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
        limit = 1e-5 * largest if precision == "fp32" else 3 * distance(expected[1], exact)
        assert distance(losses, expected[0]) < (1e-5 if precision == "fp32" else 0.03)
        assert distance(gradients, expected[1]) < limit
        assert largest > 0.05
        assert not any(name.startswith(("vision.", "text.")) for name in gradients)

    @pytest.mark.parametrize("kind", ["pretraining", *KINDS])
    def test_a_batch_that_does_not_fit_names_one_that_does(
        self, all_runs: dict[str, RunConfig], kind: str, tmp_path: Path
    ) -> None:
        _, work, examples = prepared(all_runs[kind], tmp_path)

        def run(part: Any) -> None:
            if len(part) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            work.task(part).total.backward()

        advice = does_not_fit(examples[BatchKey((0, 3, 1, 2, 4, 5, 6, 7), 3)], run)
        assert str(advice).endswith("one of 2 does: use --micro-batch-size 2")

    @pytest.mark.parametrize("kind", ["pretraining", "nlvr2"])
    @pytest.mark.parametrize("top", [1, 2])
    def test_layers_that_train_run_on_cached_states(
        self, all_runs: dict[str, RunConfig], kind: str, top: int, tmp_path: Path
    ) -> None:
        config = replace(all_runs[kind], train_top=top)
        model, work, examples = prepared(config, tmp_path)
        batch = examples[BatchKey(tuple(range(6)), 3)]
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
        written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/rows-*")}
        prepared(replace(config, max_steps=2), tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/rows-*")} == written

    def test_half_precision_on_the_disk_loses_nothing_that_autocast_reads(
        self, all_runs: dict[str, RunConfig], tmp_path: Path
    ) -> None:
        model, work, examples = prepared(replace(all_runs["pretraining"], precision="bf16"), tmp_path)
        frozen = work.images[0].frozen
        assert frozen is not None
        batch: Any = examples[BatchKey(tuple(range(6)), 3)]
        first = replace(batch, pixel_values=CachedViews(frozen.files, range(32), num_views=3))
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
        other = CachedViews(views.files, views.firsts, num_views=3, rows=[first + 2 for first in views.firsts])
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
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/rows-*")}
        again = replace(config, init=str(tmp_path / "run"), max_steps=1)  # the same layers below
        train(again, tmp_path / "again", feature_cache=tmp_path / "cache", progress=False)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/rows-*")} == written

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
        (half,) = cache.glob("*/.rows-00000.safetensors.*")  # in the folder of the second of three files
        assert len(list(cache.glob("*/rows-*"))) == 1
        with tower_passes() as passes:
            assert train(config, out, feature_cache=cache, progress=False) == whole[1]
        assert not half.exists()
        assert passes["vision"] == whole[2]["vision"] - 3 * 27 // 32 - 1  # of all views of the training images
        assert same_weights(out / "last", whole[0] / "last")


KILLED = """
import pickle, signal, sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd().parent))
import kills
from bridgetower.tasks.table import RECIPES
from bridgetower.training.run import train
config, out, cache = pickle.loads(Path(sys.argv[1]).read_bytes())
kills.before(kills.renamed("*/rows-00000.safetensors"), 2, lambda: kills.send(signal.SIGKILL))
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

    def test_other_layers_of_the_same_tower(self, all_runs: dict[str, RunConfig], tmp_path: Path) -> None:
        model, _, _ = prepared(all_runs["vqa"], tmp_path)
        towers = _Towers(model, RowCache(tmp_path, 0), 0, shown=False)
        one, other = (
            towers._content(model.vision, model.config.vision, layers, torch.float32) for layers in ((1, 2), (2, 3))
        )
        assert one != other

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
            batch = examples[BatchKey(tuple(range(6)), 3)]
            losses, _ = step(model, work, batch)
        assert not passes
        assert distance(losses, step(model, work, recomputed(batch, work, examples))[0]) < 1e-5

    def test_of_two_at_once_one_computes(self, all_runs: dict[str, RunConfig], tmp_path: Path) -> None:
        config = replace(all_runs["vqa"], data=replace(all_runs["vqa"].data, num_workers=1))
        with tower_passes() as alone:
            prepared(config, tmp_path / "alone")
        with ProcessPoolExecutor(2, mp_context=get_context("forkserver")) as pool:
            both = list(pool.map(passes_of, [config] * 2, [tmp_path / "both"] * 2))
        assert both[0] + both[1] == alone
        assert len(list((tmp_path / "both").glob("*/rows-*"))) == 3

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


class TestVectors:
    def test_they_are_those_of_whole_batches_and_are_computed_once(
        self, all_runs: dict[str, RunConfig], tmp_path: Path
    ) -> None:
        model, _, examples = prepared(all_runs["pretraining"], tmp_path)
        batch: Any = examples[BatchKey(tuple(range(6)), 3)]
        text, image = batch.input_ids, batch.pixel_values
        for _ in range(2):
            vectors = (
                encode_image(model, image, outputs="cls").cls,
                encode_text(model, text, batch.attention_mask, outputs="cls").cls,
            )
            whole = encode_image(model, image).cls, encode_text(model, text, batch.attention_mask).cls
            assert all((one - other).abs().max() < 1e-5 for one, other in zip(vectors, whole, strict=True))
        assert set(image.files.vectors) == set(image.rows)
        assert set(text.files.vectors) == set(text.rows)

        def never(features: CachedFeatures) -> Tensor:
            raise AssertionError("computed again")

        assert torch.equal(image.vectors(never), vectors[0])


def test_random_towers_are_warned_of(tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared(shapes.run_config(tiny_dataset, freeze_towers=True), tmp_path)
    assert "some of them start from random weights; give init" in caplog.text
