"""Lends runs: one that nothing disturbed, and others that are stopped and continued."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
from fitting import KINDS, PLAIN, RowTask

import bridgetower.training.run as run_module
from bridgetower.data.batches.captions import CaptionImages, CaptionPairs
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import HeadsConfig
from bridgetower.objectives.config import RankingConfig
from bridgetower.tasks.entries import Nlvr2Config, SnliVeConfig, VqaConfig
from bridgetower.training.run import train
from bridgetower.training.setup import TrainContext
from helpers.checkpoints import same_weights
from helpers.models import off_defaults
from helpers.sets import ANSWERS, ENTRY_KINDS, write_entry_set
from helpers.shapes import SHAPES_MODEL, shapes_run_config


class StoppedError(Exception):
    """What stops a run in the middle."""


@pytest.fixture(scope="session")
def config(tiny_dataset):
    return shapes_run_config(tiny_dataset, evaluate_every=2, checkpoint_every=2)


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return out, train(config, out, progress=False)


@pytest.fixture
def stop_at(config, monkeypatch):
    def stop(step, out, act=lambda: None, *, config=config, resume=False, fail=True):
        calls = []

        def hook(task, inputs):
            calls.append(1)
            if len(calls) == step:
                act()
                if fail:
                    raise StoppedError

        original = run_module.build_task

        def build_task(*arguments):
            work = original(*arguments)
            work.task.register_forward_pre_hook(hook)
            return work

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "build_task", build_task)
            with pytest.raises(StoppedError) if fail else nullcontext():
                train(config, out, resume=resume, progress=False)

    return stop


@pytest.fixture
def check_end(config, finished):
    def check(out):
        assert train(config, out, resume=True, progress=False) == finished[1]
        for checkpoint in ("last", "best"):
            assert same_weights(out / checkpoint, finished[0] / checkpoint)

    return check


@pytest.fixture
def build(tiny_dataset, tiny_processor, monkeypatch):
    """Makes the context of a run, by default of the row task, whose checkpoints are not written."""

    def make(
        task=RowTask,
        *,
        evaluate=lambda: {"rsum": 0.0},
        save=lambda context, folder, metrics: None,
        augmentation="none",
        **changes,
    ):
        config = shapes_run_config(tiny_dataset, **{"model": PLAIN} | changes)
        config = replace(config, data=replace(config.data, augmentation=augmentation))
        model = off_defaults(
            BridgeTower(config.model.override({"text.vocab_size": tiny_processor.vocab_size}))
        )
        pairs = CaptionPairs(
            CaptionImages(config.data, "train", tiny_processor), config.task.masking
        )
        monkeypatch.setattr("bridgetower.training.trainer.save_checkpoint", save)
        fields = {
            "config": config,
            "model": model,
            "task": task(model),
            "examples": pairs,
            "evaluate": evaluate,
        }
        return TrainContext(**fields, digests={"train.parquet": "12ab"})

    return make


@pytest.fixture(scope="session")
def runs(tiny_dataset, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    heads = {
        "ranking": {"rank": True},
        "vqa": {"vqa": len(ANSWERS)},
        "snli-ve": {"snli_ve": True},
    }
    tasks = {"ranking": RankingConfig(false_texts=3), "vqa": VqaConfig(), "snli-ve": SnliVeConfig()}
    sets = {kind: write_entry_set(folder / kind, kind) for kind in ENTRY_KINDS} | {
        "ranking": tiny_dataset
    }
    return {
        kind: shapes_run_config(
            sets[kind],
            task=tasks.get(kind, Nlvr2Config()),
            select_by=tasks.get(kind, Nlvr2Config()).metrics[0],
            evaluation=RetrievalConfig(),
            model=replace(
                SHAPES_MODEL,
                heads=HeadsConfig(
                    mlm=False, itm=kind == "ranking", **heads.get(kind, {"nlvr2": True})
                ),
                fusion=replace(SHAPES_MODEL.fusion, num_token_types=3 if kind == "nlvr2" else 2),
            ),
            init=str(tiny_checkpoint),
            max_steps=2,
            micro_batch_size=4,
            checkpoint_every=1,
        )
        for kind in KINDS
    }
