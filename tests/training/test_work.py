"""Every kind of task is trained, evaluated, and continued with the same bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import shapes
from bridgetower.model.config import HeadsConfig
from bridgetower.tasks.config import RankingConfig
from bridgetower.training.config import RunConfig
from bridgetower.training.run import train
from folders import same_weights

KINDS = ("ranking",)


@pytest.fixture
def runs(tiny_dataset: Path, tiny_checkpoint: Path) -> dict[str, RunConfig]:
    """A short run of each kind, from the small checkpoint."""
    ranking = shapes.run_config(
        tiny_dataset,
        task=RankingConfig(false_texts=3),
        model=replace(shapes.MODEL, heads=HeadsConfig(mlm=False, rank=True)),
    )
    return {
        name: replace(run, init=str(tiny_checkpoint), max_steps=3, micro_batch_size=4, checkpoint_every=1)
        for name, run in {"ranking": ranking}.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_is_continued_with_the_same_bits(
    kind: str, runs: dict[str, RunConfig], tmp_path: Path, stop_at: Callable[..., None]
) -> None:
    figures = train(runs[kind], tmp_path / "whole", progress=False)
    assert runs[kind].select_by in figures
    stop_at(4, tmp_path / "stopped", config=runs[kind])  # in the second of three steps of two micro-batches
    assert train(runs[kind], tmp_path / "stopped", resume=True, progress=False) == figures
    assert same_weights(tmp_path / "stopped" / "last", tmp_path / "whole" / "last")


def test_ranking_gives_one_stage_figures(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    figures = train(runs["ranking"], tmp_path / "run", progress=False)
    assert {"rsum", "one_stage_rsum", "chance_rsum"} <= figures.keys()
