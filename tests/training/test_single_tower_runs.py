"""CIFAR on the image tower and GLUE on the text tower: trained, evaluated, continued, and what they refuse."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import originals
import shapes
from bridgetower.checkpoints import read_checkpoint
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import HeadsConfig
from bridgetower.objectives.config import TaskConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.single_tower import CifarConfig, GlueConfig
from bridgetower.training.run import train
from folders import same_weights

KINDS = ("cifar", "cola", "sts-b", "mnli")


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """A short run of each kind, from the small checkpoint."""
    folder = tmp_path_factory.mktemp("originals")
    originals.write_cifar10(folder)
    glue = originals.write_glue(folder / "glue")
    tasks: dict[str, TaskConfig] = {"cifar": CifarConfig(), **{name: GlueConfig(name=name) for name in KINDS[1:]}}
    outputs = {"cola": 2, "sts-b": 1, "mnli": 3}
    return {
        kind: shapes.run_config(
            folder if kind == "cifar" else glue,
            task=task,
            select_by=task.metrics[0],
            evaluation=RetrievalConfig(),
            model=replace(
                shapes.MODEL,
                heads=HeadsConfig(mlm=False, itm=False, image=10 if kind == "cifar" else 0, text=outputs.get(kind, 0)),
            ),
            init=str(tiny_checkpoint),
            max_steps=3,
            micro_batch_size=4,
            checkpoint_every=1,
        )
        for kind, task in tasks.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_is_continued_with_the_same_bits(
    kind: str, runs: dict[str, RunConfig], tmp_path: Path, stop_at: Callable[..., None]
) -> None:
    metrics = train(runs[kind], tmp_path / "whole", progress=False)
    assert metrics.keys() == set(runs[kind].task.metrics)
    stop_at(4, tmp_path / "stopped", config=runs[kind])
    assert train(runs[kind], tmp_path / "stopped", resume=True, progress=False) == metrics
    assert same_weights(tmp_path / "stopped" / "last", tmp_path / "whole" / "last")


def test_only_the_tower_that_is_read_learns_and_names_travel(
    runs: dict[str, RunConfig], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    before = read_checkpoint(tiny_checkpoint).tensors
    classes = ("entailment", "neutral", "contradiction")
    expected: dict[str, Any] = {"cifar": {"image": originals.CIFAR10}, "mnli": {"text": classes}, "sts-b": {}}
    for kind, labels in expected.items():
        train(replace(runs[kind], max_steps=2), tmp_path / kind, progress=False)
        after = read_checkpoint(tmp_path / kind)
        changed = {name for name in before if name in after.tensors and not before[name].equal(after.tensors[name])}
        assert changed
        assert all(name.startswith("vision." if kind == "cifar" else "text.") for name in changed)
        assert after.labels == labels


def test_from_nothing(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    assert "accuracy" in train(replace(runs["mnli"], init=None, max_steps=1), tmp_path / "mnli", progress=False)
    with pytest.raises(ValueError, match="CIFAR has no texts to train a tokenizer on; give init, text or tokenizer"):
        train(replace(runs["cifar"], init=None), tmp_path / "cifar", progress=False)


class TestRefusals:
    def test_several_folders_and_another_number_of_classes(self, runs: dict[str, RunConfig], tmp_path: Path) -> None:
        config = replace(runs["cola"], data=replace(runs["cola"].data, folders=("a", "b")))
        with pytest.raises(ValueError, match="2 data folders; glue reads one: give the folder of its files"):
            train(config, tmp_path / "run", progress=False)
        config = replace(runs["mnli"], task=GlueConfig(name="sst-2"))
        with pytest.raises(ValueError, match=r"glue has 2 answers or classes here, but model\.heads\.text is 3"):
            train(config, tmp_path / "run", progress=False)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"data": {"flip": True}}, "data.random_crop, flip or rand_augment"),
            ({"data": {"augmentation": "affine"}}, "data.augmentation"),
            ({"data": {"cache": True}}, "data.cache"),
            ({"freeze_towers": True}, "freeze_towers"),
        ],
    )
    def test_what_would_be_ignored(self, runs: dict[str, RunConfig], changes: dict[str, Any], named: str) -> None:
        config = runs["cifar"]
        values = {name: replace(config.data, **value) if name == "data" else value for name, value in changes.items()}
        with pytest.raises(ValueError, match=f"{named} would be ignored by cifar; leave it out"):
            replace(config, **values)
