"""Lends runs: one that nothing disturbed, and others that are stopped and continued."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fitting import KINDS, PLAIN, RowTask
from torch import nn

import asked
import bridgetower.training.run as run_module
import shapes
from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import HeadsConfig
from bridgetower.objectives.config import RankingConfig
from bridgetower.processor import Processor
from bridgetower.tasks.entries import Nlvr2Config, SnliVeConfig, VqaConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.run import train
from bridgetower.training.setup import TrainContext
from folders import same_weights
from tiny import off_defaults


class StoppedError(Exception):
    """What stops a run in the middle."""


@pytest.fixture(scope="session")
def config(tiny_dataset: Path) -> RunConfig:
    """A run of six steps that is evaluated and saved every other step."""
    return shapes.run_config(tiny_dataset, evaluate_every=2, checkpoint_every=2)


@pytest.fixture(scope="session")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A run that nothing disturbed, and its metrics."""
    out = tmp_path_factory.mktemp("run") / "run"
    return out, train(config, out, progress=False)


@pytest.fixture
def stop_at(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trains into a folder up to the forward pass of some step, does something there, and fails."""

    def stop(
        step: int,
        out: Path,
        act: Callable[[], None] = lambda: None,
        *,
        config: RunConfig = config,
        resume: bool = False,
        fail: bool = True,
    ) -> None:
        calls = []

        def hook(task: Any, inputs: Any) -> None:
            calls.append(1)
            if len(calls) == step:
                act()
                if fail:
                    raise StoppedError

        original = run_module.build_task

        def build_task(*arguments: Any) -> Any:
            work = original(*arguments)
            work.task.register_forward_pre_hook(hook)
            return work

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "build_task", build_task)
            with pytest.raises(StoppedError) if fail else nullcontext():
                train(config, out, resume=resume, progress=False)

    return stop


@pytest.fixture
def check_end(config: RunConfig, finished: tuple[Path, dict[str, float]]) -> Callable[[Path], None]:
    """Continues a run and checks that it ends with the bits of the one that nothing disturbed."""

    def check(out: Path) -> None:
        assert train(config, out, resume=True, progress=False) == finished[1]
        for checkpoint in ("last", "best"):
            assert same_weights(out / checkpoint, finished[0] / checkpoint)

    return check


@pytest.fixture
def build(tiny_dataset: Path, tiny_processor: Processor) -> Callable[..., TrainContext]:
    """Makes the parts of a run; without `task`, of the row task."""

    def make(
        task: Callable[[BridgeTower], nn.Module] = RowTask,
        *,
        evaluate: Callable[[], dict[str, float]] = lambda: {"rsum": 0.0},
        save: Callable[[Path, Mapping[str, float]], None] = lambda folder, metrics: None,
        augmentation: Any = "none",
        **changes: Any,
    ) -> TrainContext:
        config = shapes.run_config(tiny_dataset, **{"model": PLAIN} | changes)
        config = replace(config, data=replace(config.data, augmentation=augmentation))
        model = off_defaults(BridgeTower(config.model.override({"text.vocab_size": tiny_processor.vocab_size})))
        pairs = CaptionPairs(CaptionImages(config.data, "train", tiny_processor), config.task.masking)
        return TrainContext(
            config=config,
            task=task(model),
            model=model,
            examples=pairs,
            digests={"train.parquet": "12ab"},
            evaluate=evaluate,
            save=save,
            max_steps=config.max_steps or 0,
        )

    return make


@pytest.fixture(scope="session")
def runs(tiny_dataset: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """A short run of each kind, from the small checkpoint."""
    folder = tmp_path_factory.mktemp("sets")
    heads = {
        "ranking": HeadsConfig(mlm=False, rank=True),
        "vqa": HeadsConfig(mlm=False, itm=False, vqa=len(asked.ANSWERS)),
        "snli-ve": HeadsConfig(mlm=False, itm=False, snli_ve=True),
        "nlvr2": HeadsConfig(mlm=False, itm=False, nlvr2=True),
    }
    tasks = {
        "ranking": RankingConfig(false_texts=3),
        "vqa": VqaConfig(),
        "snli-ve": SnliVeConfig(),
        "nlvr2": Nlvr2Config(),
    }
    sets = {kind: asked.write_set(folder / kind, kind) for kind in asked.KINDS} | {"ranking": tiny_dataset}
    return {
        kind: shapes.run_config(
            sets[kind],
            task=tasks[kind],
            select_by=tasks[kind].metrics[0],
            evaluation=RetrievalConfig(),
            model=replace(
                shapes.MODEL,
                heads=heads[kind],
                fusion=replace(shapes.MODEL.fusion, num_token_types=3 if kind == "nlvr2" else 2),
            ),
            init=str(tiny_checkpoint),
            max_steps=3,
            micro_batch_size=4,
            checkpoint_every=1,
        )
        for kind in KINDS
    }
