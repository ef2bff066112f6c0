"""Batches of one set each, in runs with and without frozen towers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fitting import run
from freezing import prepared

import shapes
from bridgetower.data.batch import Batch, BatchDataset, BatchKey
from bridgetower.data.config import DataConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.setup import TrainContext, build_task
from bridgetower.training.start import starting_checkpoint


class Recorded:
    """Examples, and the numbers of those that were read."""

    def __init__(self, examples: BatchDataset, *, hidden: bool = False) -> None:
        self.examples, self.seen = examples, list[tuple[int, ...]]()
        if not hidden:
            self.set_numbers = examples.set_numbers  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: BatchKey) -> Batch:
        self.seen.append(key.examples)
        return self.examples[key]


@pytest.fixture
def config(tiny_dataset: Path) -> RunConfig:
    folders = (str(tiny_dataset),) * 2
    return shapes.run_config(
        tiny_dataset, data=DataConfig(folders=folders, max_length=24, one_set_per_batch=True), evaluate_every=0
    )


def context(config: RunConfig, cache: Path, **options: Any) -> TrainContext:
    """A run, whose examples are recorded."""
    if config.freeze_towers:
        model, setup, examples = prepared(config, cache)
    else:
        checkpoint = starting_checkpoint(config)
        model = checkpoint.model().train()
        setup = build_task(config, checkpoint, model)
        examples = setup.examples  # type: ignore[assignment]
    values = vars(setup) | {"examples": Recorded(examples, **options), "evaluate": lambda: {"rsum": 0.0}}
    return TrainContext(**values, config=config, model=model, save=lambda folder, metrics: None, max_steps=6)


@pytest.mark.parametrize("frozen", [False, True])
def test_examples_of_a_batch_are_of_one_set(config: RunConfig, tmp_path: Path, frozen: bool) -> None:
    batches: dict[bool, list[set[bool]]] = {}
    for one in (True, False):
        data = replace(config.data, one_set_per_batch=one)
        parts = context(replace(config, data=data, freeze_towers=frozen), tmp_path / "cache")
        run(parts, tmp_path / str(one))
        examples: Any = parts.examples
        first = examples.set_numbers == 0
        batches[one] = [{bool(first[example]) for example in seen} for seen in examples.seen]
    assert all(len(sets) == 1 for sets in batches[True])
    assert len(set.union(*batches[True])) == 2
    assert any(len(sets) == 2 for sets in batches[False])  # control


def test_examples_that_do_not_tell_their_images_are_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the examples of pretraining have no set_numbers"):
        run(context(config, tmp_path, hidden=True), tmp_path / "run")
