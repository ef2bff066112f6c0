"""What a step reads of a run, without data, evaluation or files."""

from typing import Any

from torch import nn

from bridgetower.data.captions import CaptionPairs
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.setup import TrainContext


def of_steps(task: nn.Module, config: RunConfig) -> TrainContext:
    """The context of a task for `run_step` with batches of one's own."""
    model: Any = task.model
    return TrainContext(
        config=config,
        task=task,
        model=model,
        examples=CaptionPairs.__new__(CaptionPairs),
        digests={},
        evaluate=dict,
        save=lambda folder, metrics: None,
        max_steps=10,
    )
