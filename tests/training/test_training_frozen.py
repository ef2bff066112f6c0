"""Frozen towers: the losses and gradients of towers that are asked each time, aligned projections, and the cache."""

import copy
import inspect
import json
import pickle
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import PIL
import pytest
import torch
from fitting import KEY, KINDS, passes_of, prepared, recomputed, tower_passes
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batches.batch import BatchKey
from bridgetower.data.sets.store import Table
from bridgetower.model.layers import autocast
from bridgetower.model.towers import VisionTransformer
from bridgetower.objectives.config import PretrainingConfig, RankingConfig
from bridgetower.tasks.run_config import read_metrics
from bridgetower.tasks.table import RECIPES
from bridgetower.training import frozen
from bridgetower.training.frozen import Alignment, View, align_projections
from bridgetower.training.run import train
from helpers.checkpoints import same_weights, save_text_family, save_timm_family
from helpers.models import same_tensors
from helpers.shapes import SHAPES_PHASES, shapes_run_config

CPU = torch.device("cpu")
ALL = ("pretraining", "contrastive", *KINDS)
EVERYTHING = PretrainingConfig(phases=(replace(SHAPES_PHASES[-1], until=1.0),))
CONTRASTIVE = PretrainingConfig(phases=(replace(SHAPES_PHASES[0], until=1.0),))


@pytest.fixture(scope="module")
def all_runs(runs, tiny_dataset, tiny_checkpoint):
    captions = shapes_run_config(
        tiny_dataset,
        init=str(tiny_checkpoint),
        task=EVERYTHING,
        data=replace(runs["ranking"].data, augmentation="affine", word_dropout=0.2),
        checkpoint_every=2,
    )
    configs = runs | {"pretraining": captions, "contrastive": replace(captions, task=CONTRASTIVE)}
    return {kind: replace(run, freeze_towers=True, frozen_views=3) for kind, run in configs.items()}


def frozen_step(run, batch):
    model = run.model
    model.zero_grad(set_to_none=True)
    run.task.train()
    model.vision.eval()
    model.text.eval()
    torch.manual_seed(7)
    losses = run.task(batch)
    losses.total.backward()
    gradients = {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }
    return {name: loss.detach() for name, loss in losses.terms.items()}, gradients


def versions(cache):
    return {path: Table(path).version for path in cache.glob("*/states.lance")}


def largest_distance(actual, expected):
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - expected[name]).abs().max()) for name in actual)


def evaluates_alike(run):
    run.model.eval()
    metrics = run.evaluate()
    assert run.images[1].read_features is not None
    run.images[1].read_features = None
    return metrics == pytest.approx(run.evaluate(), abs=1e-6)


@pytest.fixture(scope="module")
def stored_features(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


class TestSteps:
    @pytest.mark.parametrize(
        "case",
        [
            *(f"{kind} fp32" for kind in ALL),
            *(f"{kind} bf16" for kind in (*ALL[:2], "nlvr2")),
            "contrastive fp32 vectors",
        ],
    )
    def test_losses_and_gradients_are_those_of_towers_that_are_asked(
        self, all_runs, case, stored_features, monkeypatch
    ):
        kind, precision, *stored = case.split()
        if stored:
            monkeypatch.setattr(frozen, "_MAX_STATES", 0)
        run = prepared(replace(all_runs[kind], precision=precision), stored_features)
        batch = run.examples[KEY]
        # of each the vector alone is read
        assert (batch.image_states.ndim == 2) == (kind == "contrastive")
        expected_batch = recomputed(batch, run)
        exact = frozen_step(run, expected_batch)[1]
        with autocast(CPU, precision):
            losses, gradients = frozen_step(run, batch)
            expected = frozen_step(run, expected_batch)
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        # In bfloat16 towers round otherwise in batches of another size, so that the gradients of both are as far from
        # each other as from those in float32.
        limit = 1e-5 * largest if precision == "fp32" else 3 * largest_distance(expected[1], exact)
        assert largest_distance(losses, expected[0]) < (1e-5 if precision == "fp32" else 0.03)
        assert largest_distance(gradients, expected[1]) < limit
        assert largest > 0.05
        assert not any(name.startswith(("vision.", "text.")) for name in gradients)

    @pytest.mark.parametrize("kind", ["pretraining", "nlvr2"])
    @pytest.mark.parametrize("top", [1, 2])
    def test_layers_that_train_run_on_cached_states(self, all_runs, kind, top, stored_features):
        run = prepared(replace(all_runs[kind], train_top=top), stored_features)
        ran = set()
        batch = run.examples[KEY]
        for name, module in run.model.named_modules():
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
        losses, gradients = frozen_step(run, batch)
        numbers = {
            f"{tower}.layers.{number}" for tower in ("vision", "text") for number in range(2)
        }
        trained = {name for name in numbers if int(name[-1]) >= 2 - top}
        assert ran & numbers == trained
        assert {
            ".".join(name.split(".")[:3])
            for name in gradients
            if name.startswith(("vision", "text."))
        } == trained
        expected = frozen_step(run, recomputed(batch, run))
        assert largest_distance(losses, expected[0]) < 1e-5
        assert largest_distance(gradients, expected[1]) < 1e-5 * max(
            float(value.abs().max()) for value in gradients.values()
        )
        assert evaluates_alike(run)

    def test_half_precision_on_the_disk_loses_nothing_that_autocast_reads(
        self, all_runs, stored_features
    ):
        run = prepared(replace(all_runs["pretraining"], precision="bf16"), stored_features)
        examples = run.examples
        run.images[0].read_features = None
        view = View(run.images[0], 3, examples.seed)
        pixels = torch.stack([view(row) for row in range(32)])
        with autocast(CPU, "bf16"), torch.no_grad():  # in the batch in which it was computed
            expected = run.model.vision(pixels, run.model.config.vision_layers)
        for stored, recomputed_states in zip(
            examples.image_features.read(range(32)).unbind(1), expected, strict=True
        ):
            # to which autocast rounds what a projection reads
            assert torch.equal(stored, recomputed_states.bfloat16())

    def test_every_view_of_an_image_is_seen_with_every_text_and_evaluated_without(
        self, all_runs, stored_features
    ):
        run = prepared(all_runs["pretraining"], stored_features)
        batches = [run.examples[BatchKey((0,), seed)] for seed in range(60)]
        seen = {
            (float(batch.image_states.sum()), float(batch.masked_states.sum())) for batch in batches
        }
        assert [len({pair[side] for pair in seen}) for side in (0, 1)] == [3, 3]
        assert len(seen) == 9
        again = run.examples[BatchKey((0,), 5)]
        assert torch.equal(again.image_states, batches[5].image_states)
        batch = run.examples[KEY]  # control: losses tell views apart
        losses, _ = frozen_step(run, batch)
        views = [run.examples[replace(KEY, seed=seed)] for seed in range(4, 9)]
        other_losses = (
            frozen_step(run, replace(batch, image_states=view.image_states))[0] for view in views
        )
        assert max(largest_distance(losses, other) for other in other_losses) > 1e-3
        assert evaluates_alike(run)


@pytest.fixture(scope="module")
def whole_runs(all_runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("frozen") / "run"
    with tower_passes() as passes:
        metrics = train(
            all_runs["pretraining"], out, feature_cache=out.parent / "cache", progress=False
        )
    return out, metrics, passes


def changed_names(before, after):
    tensors_before = read_checkpoint(before).tensors
    other = read_checkpoint(after).tensors
    return {name for name in tensors_before if not torch.equal(tensors_before[name], other[name])}


class TestRun:
    def test_towers_stay_and_the_rest_learns(self, whole_runs, tiny_checkpoint):
        changed = {
            name.split(".")[0] for name in changed_names(tiny_checkpoint, whole_runs[0] / "last")
        }
        assert not changed & {"vision", "text"}
        assert {
            "image_projections",
            "text_projections",
            "fusion",
            "itm_head",
            "mlm_head",
            "itc_head",
        } <= changed

    def test_top_layers_learn_and_those_below_stay(self, all_runs, tiny_checkpoint, tmp_path):
        config = replace(all_runs["pretraining"], train_top=1, max_steps=3)
        cache = tmp_path / "cache"
        train(config, tmp_path / "run", feature_cache=cache, progress=False)
        changed = changed_names(tiny_checkpoint, tmp_path / "run" / "last")
        towers = {
            ".".join(name.split(".")[:3])
            for name in changed
            if name.startswith(("vision.", "text."))
        }
        assert towers == {"vision.layers.1", "text.layers.1"}
        written = versions(cache)
        # the same layers below
        again = replace(config, init=str(tmp_path / "run"), evaluate_every=None, max_steps=1)
        train(again, tmp_path / "again", feature_cache=cache, progress=False)
        assert versions(cache) == written

    def test_a_killed_writer_leaves_what_it_finished(self, whole_runs, all_runs, forked, tmp_path):
        out = tmp_path / "run"
        cache = tmp_path / "cache"
        config = all_runs["pretraining"]
        (tmp_path / "config.pickle").write_bytes(pickle.dumps((config, out, cache)))
        command = [forked / "python", "-c", KILLED, tmp_path / "config.pickle"]
        killed = subprocess.run(command, cwd=Path(__file__).parent)
        assert killed.returncode == -signal.SIGKILL
        assert [len(Table(path)) for path in cache.glob("*/states.lance")] == [32]  # of 81
        with tower_passes() as passes:
            assert train(config, out, feature_cache=cache, progress=False) == whole_runs[1]
        assert passes["vision"] == whole_runs[2]["vision"] - 1
        assert same_weights(out / "last", whole_runs[0] / "last")


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from bridgetower.data.batches import frozen
from bridgetower.data.sets import store
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


@pytest.fixture(scope="module")
def cached_runs(all_runs, tmp_path_factory):
    caches = tmp_path_factory.mktemp("caches")

    def copied(kind, to):
        if not (caches / kind).exists():
            prepared(all_runs[kind], caches / kind)
        return Path(shutil.copytree(caches / kind, to))

    return copied


class TestCache:
    @pytest.mark.parametrize(
        ("kind", "changes", "computed"),
        [
            (
                "vqa",
                {"seed": 1, "batch_size": 4, "micro_batch_size": 2, "data": {"max_length": 30}},
                set(),
            ),
            ("vqa", {"data": {"augmentation": "affine"}}, {"vision"}),
            ("vqa", {"data": {"background": (9, 9, 9)}}, {"vision"}),
            ("vqa", {"frozen_views": 2}, {"vision"}),
            ("vqa", {"precision": "bf16"}, {"vision", "text"}),
            ("pretraining", {"seed": 1}, {"vision", "text"}),
            ("pretraining", {"data": {"word_dropout": 0.5}}, {"text"}),
        ],
    )
    def test_settings(self, all_runs, cached_runs, kind, changes, computed, tmp_path):
        config = all_runs[kind]
        cache = cached_runs(kind, tmp_path / "cache")
        data = replace(config.data, **changes.get("data", {}))
        assert set(passes_of(replace(config, **changes | {"data": data}), cache)) == computed

    @pytest.mark.parametrize("tower", ["vision", "text"])
    def test_other_weights(self, all_runs, cached_runs, tmp_path, tiny_checkpoint, tower):
        cache = cached_runs("pretraining", tmp_path / "cache")
        changed = tmp_path / "changed"
        shutil.copytree(tiny_checkpoint, changed)
        tensors = load_file(changed / "model.safetensors")
        tensors[f"{tower}.layers.1.mlp.down.bias"] += 1e-6
        save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
        assert set(passes_of(replace(all_runs["pretraining"], init=str(changed)), cache)) == {tower}

    def test_other_layers_of_the_same_tower(self, tiny_dataset, tmp_path):
        config = shapes_run_config(tiny_dataset, freeze_towers=True)
        meter = replace(config, model=config.model.override({"fusion.bridge": None}))
        towers = [prepared(run, tmp_path).model.vision.state_dict() for run in (config, meter)]
        assert all(torch.equal(towers[1][name], value) for name, value in towers[0].items())
        layers = [
            json.loads(path.read_text())["layers"] for path in tmp_path.glob("*/content.json")
        ]
        assert sorted(layers) == [[1, 2]] * 3 + [[2]] * 3

    def test_everything_may_be_moved(
        self, all_runs, cached_runs, tmp_path, tiny_checkpoint, tiny_dataset
    ):
        config = all_runs["pretraining"]
        moved = cached_runs("pretraining", tmp_path / "moved")
        shutil.copytree(tiny_checkpoint, tmp_path / "model")
        shutil.copytree(tiny_dataset, tmp_path / "set")
        data = replace(config.data, folders=(str(tmp_path / "set"),))
        with tower_passes() as passes:
            run = prepared(replace(config, init=str(tmp_path / "model"), data=data), moved)
            batch = run.examples[KEY]
            losses, _ = frozen_step(run, batch)
        assert not passes
        assert largest_distance(losses, frozen_step(run, recomputed(batch, run))[0]) < 1e-5

    def test_of_two_at_once_one_computes(self, all_runs, tmp_path):
        config = all_runs["vqa"]
        alone = passes_of(config, tmp_path / "alone")
        with ProcessPoolExecutor(2, mp_context=get_context("forkserver")) as pool:
            both = list(pool.map(passes_of, [config] * 2, [tmp_path / "both"] * 2))
        assert both[0] + both[1] == alone
        assert len(list((tmp_path / "both").glob("*/states.lance"))) == 3

    def test_what_they_were_computed_from_is_written_down(self, all_runs, tmp_path):
        before = torch.backends.cuda.matmul.allow_tf32
        context = prepared(all_runs["vqa"], tmp_path)
        contents = [json.loads(path.read_text()) for path in tmp_path.glob("*/content.json")]
        assert len(contents) == 3
        pixels = [content["pixels"] for content in contents if "pixels" in content]
        digests = sorted([*context.digests.values(), *context.held_out.values()])
        assert sorted(digest for content in pixels for digest, _ in content["data"]) == digests
        tower = sha256(Path(inspect.getfile(VisionTransformer)).read_bytes()).hexdigest()[:16]
        assert all(tower in content["code"] for content in contents)
        assert all(
            content["versions"]["torch"] == torch.__version__ for content in [*contents, *pixels]
        )
        assert all(content["versions"]["PIL"] == PIL.__version__ for content in pixels)
        torch.backends.cuda.matmul.allow_tf32 = not before  # another precision
        prepared(all_runs["vqa"], tmp_path)
        torch.backends.cuda.matmul.allow_tf32 = before
        assert len(list(tmp_path.glob("*/content.json"))) == 6

    def test_another_version_of_a_library(
        self, tiny_dataset, tiny_checkpoint, tmp_path, monkeypatch
    ):
        for library in ("timm", "transformers"):
            pytest.importorskip(library)
        save_timm_family(tmp_path / "vision", "siglip")
        save_text_family(tmp_path / "text", "modernbert", vocab_size=310)
        shutil.copy(tiny_checkpoint / "tokenizer.json", tmp_path / "text")
        towers = {tower: str(tmp_path / tower) for tower in ("vision", "text")}
        nano = RECIPES["pretrain-nano"]
        config = shapes_run_config(
            tiny_dataset, recipe=nano.recipe, model=nano.model, freeze_towers=True, **towers
        )
        assert set(passes_of(config, tmp_path / "cache")) == {"vision", "text"}
        for library, tower in (("timm", "vision"), ("transformers", "text")):
            monkeypatch.setattr(sys.modules[library], "__version__", "99.0")
            assert set(passes_of(config, tmp_path / "cache")) == {tower}


def test_random_towers_are_warned_of(tiny_dataset, tmp_path, caplog):
    prepared(shapes_run_config(tiny_dataset, freeze_towers=True), tmp_path)
    assert "some of them start from random weights; give init" in caplog.text


@pytest.fixture
def aligning(all_runs):
    return replace(
        all_runs["pretraining"], data=all_runs["ranking"].data, frozen_views=2, align_first=5
    )


def aligned(task, batch):
    task.zero_grad(set_to_none=True)
    loss = task(batch)
    loss.backward()
    return loss.detach(), {
        name: value.grad for name, value in task.named_parameters() if value.grad is not None
    }


class TestAlignment:
    def test_is_that_of_towers_that_are_asked(self, aligning, stored_features):
        run = prepared(aligning, stored_features)
        run.model.eval()  # towers that are asked in training draw dropout
        task = Alignment(run.model)
        batch = run.examples[KEY]
        loss, actual = aligned(task, batch)
        expected = aligned(task, recomputed(batch, run))
        assert abs(float(loss - expected[0])) < 1e-6
        assert actual.keys() == expected[1].keys()
        assert all(torch.allclose(actual[name], expected[1][name], atol=1e-6) for name in actual)
        assert not any(
            ".vision." in name or ".text." in name or ".fusion." in name for name in actual
        )

    def test_padding_does_not_count(self, aligning, stored_features):
        run = prepared(aligning, stored_features)
        batch = run.examples[KEY]
        assert batch.attention_mask is not None
        padding = (batch.attention_mask == 0)[:, None, :, None].float()
        task = Alignment(run.model.eval())
        with torch.no_grad():
            texts = [batch.text_states + noise for noise in (0.0, padding, 1 - padding)]
            losses = [task(replace(batch, text_states=states)) for states in texts]
        assert torch.allclose(losses[0], losses[1], atol=1e-6)
        assert not torch.allclose(losses[0], losses[2], atol=1e-4)


class TestAligning:
    def test_only_the_projections_change_and_the_loss_falls(self, aligning, stored_features):
        run = prepared(replace(aligning, align_first=30), stored_features)
        model = run.model
        batch = run.examples[KEY]
        rates = list[float]()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            untrained = Alignment(model)(batch)
        hook = register_optimizer_step_pre_hook(
            lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
        )
        align_projections(run, progress=False)
        hook.remove()
        with torch.no_grad():
            assert Alignment(model)(batch) < untrained - 0.1
        changed = {
            name.split(".")[0]
            for name, value in model.state_dict().items()
            if not value.equal(before[name])
        }
        assert changed == {"image_projections", "text_projections"}
        assert all(value.grad is None for value in model.parameters())
        assert rates == pytest.approx([1e-2 * (1 - step / 30) for step in range(30)])

    @pytest.mark.parametrize("changes", [{"train_top": 1}, {"precision": "bf16"}])
    def test_draws_nothing(self, aligning, stored_features, changes):
        """Alignment draws nothing, and half precision leaves weights in single precision."""
        run = prepared(replace(aligning, **changes), stored_features)
        before = copy.deepcopy(run.model.state_dict())
        states = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            run.model.load_state_dict(before)
            align_projections(run, progress=False)
            assert run.model.training
            states.append(copy.deepcopy(run.model.state_dict()))
        assert same_tensors(*states)
        assert not same_tensors(states[0], before)
        assert {value.dtype for value in states[0].values()} == {torch.float32}

    def test_a_loss_that_is_not_finite_stops_it(self, aligning, stored_features):
        run = prepared(aligning, stored_features)
        with torch.no_grad():
            next(iter(run.model.image_projections.parameters())).fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="loss of aligning is nan at step 1"):
            align_projections(run, progress=False)


def test_stopped_and_continued_it_ends_with_the_same_bits(
    aligning, stop_at, tmp_path, stored_features
):
    config = replace(aligning, max_steps=3, checkpoint_every=1, evaluate_every=0)
    metrics = train(config, tmp_path / "whole", feature_cache=stored_features, progress=False)
    for step in (1, 3):  # before the first checkpoint, and after it
        out = tmp_path / str(step)
        stop_at(step, out, config=config)
        assert (
            train(config, out, resume=True, feature_cache=stored_features, progress=False)
            == metrics
        )
        assert same_weights(out / "last", tmp_path / "whole" / "last")
    # control: aligned projections begin elsewhere
    first = replace(config, align_first=0, max_steps=1)
    train(first, tmp_path / "not", feature_cache=stored_features, progress=False)
    losses = [read_metrics(tmp_path / name, "train")[0]["loss"] for name in ("whole", "not")]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align_first": -1}, "align_first is -1; expected at least 0"),
        (
            {"freeze_towers": False, "frozen_views": 1},
            "align_first is 5; expected 0 without freeze_towers",
        ),
        (
            {"task": RankingConfig()},
            "align_first compares images with captions; leave it out for ranking",
        ),
        (
            {"data": {"transform": "my.py:views"}},
            "data.transform my.py:views with frozen towers, .*; leave one out",
        ),
    ],
)
def test_refused(aligning, changes, message):
    if "data" in changes:
        changes = {"data": replace(aligning.data, **changes["data"])}
    with pytest.raises(ValueError, match=message):
        replace(aligning, **changes)
