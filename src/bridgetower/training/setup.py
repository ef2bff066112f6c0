"""What a run trains, on which examples, and how it is judged: from its config and the spec of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from bridgetower.checkpoints import UNMEASURED, Checkpoint
from bridgetower.data.batch import BatchDataset
from bridgetower.data.examples import PreparedImages
from bridgetower.evaluation.config import EvaluationOptions
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec
from bridgetower.tasks.table import spec_of

TRAINED_ON = "validation_is_trained_on"
"""Metric of a run whose validation split is also trained on."""


@dataclass(frozen=True, kw_only=True)
class TaskSetup:
    """What is trained and how it is judged."""

    task: nn.Module  # its `progress` is set to the share of the run that is done
    examples: BatchDataset
    images: tuple[PreparedImages, ...] | None = None  # of the examples, and of those that are evaluated; None: no set
    digests: Mapping[str, str]  # of the files that are read, by path
    evaluate: Callable[[], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class TrainContext(TaskSetup):
    """Everything that the loop needs."""

    config: RunConfig
    model: BridgeTower
    save: Callable[[Path, Mapping[str, float]], None]  # a checkpoint with its metrics; every process has to call it
    max_steps: int
    describe: Callable[[Path], None] = lambda folder: None  # writes what makes a checkpoint of a folder with weights
    extensions: Extensions = NO_EXTENSIONS


def build_task(
    config: RunConfig, checkpoint: Checkpoint, model: BridgeTower, task: TaskSpec | None = None
) -> TaskSetup:
    spec = spec_of(config.task, task)
    processor = checkpoint.processor
    assert processor is not None  # starting_checkpoint refused it
    names = () if spec.head is None else checkpoint.class_names(spec.head)
    source = ExampleSource(
        data=config.data,
        splits=config.data.train_splits,
        processor=processor,
        task=config.task,
        names=names,
        heads=model.config.heads,
        use="train",
    )
    train, trained = spec.examples(source), spec.module(model, config.task)
    digests = train.images.digests()
    setup = TaskSetup(task=trained, examples=train, images=(train.images,), digests=digests, evaluate=dict)
    if config.evaluate_every is None:
        return setup
    validation = (config.data.validation_split,)
    source = replace(source, data=config.data.as_evaluated(), splits=validation, use="validate")
    held_out, known = spec.examples(source), config.data.trains_on_validation
    evaluation = Evaluation(
        **vars(source),
        model=model,
        module=lambda: trained,
        examples=held_out,
        settings=config.evaluation,
        reranking=UNMEASURED if known else None,
        options=EvaluationOptions(num_workers=config.data.num_workers),
    )
    own = model.extensions.metrics
    if config.select_by not in own and (reason := spec.unavailable(evaluation, config.select_by)) is not None:
        possible = [*(name for name in config.task.metrics if spec.unavailable(evaluation, name) is None), *own]
        raise ValueError(f"select_by is {config.select_by!r}, but {reason}; use one of {', '.join(possible)}")
    return replace(
        setup,
        images=(train.images, held_out.images),
        digests=digests | held_out.images.digests(),
        evaluate=lambda: spec.metrics(replace(evaluation)) | ({TRAINED_ON: 1.0} if known else {}),
    )
