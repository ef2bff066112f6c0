"""What a training run consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bridgetower.data.pictures import Pictures
from bridgetower.data.sampling import Examples
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained and how it is judged.

    Attributes:
        task: Model and losses; its `progress` is set to the share of the run that is done.
        examples: What it is trained on.
        pictures: Those of the examples, and those that are evaluated; None where the set is not a prepared one.
        digests: Of the files that are read, by path.
        evaluate: Gives the figures of the validation split.
    """

    task: nn.Module
    examples: Examples
    pictures: tuple[Pictures, Pictures] | None = None
    digests: Mapping[str, str]
    evaluate: Callable[[], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Parts(Work):
    """Everything that the loop needs, built by `bridgetower.training.run`.

    Attributes:
        config: Decides the result.
        model: The model that the task trains.
        save: Writes the weights as a checkpoint to a folder.
        max_steps: Optimiser steps of the whole run.
    """

    config: RunConfig
    model: BridgeTower
    save: Callable[[Path], None]
    max_steps: int
