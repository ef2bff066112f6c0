"""What a training run consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bridgetower.data.sampling import Examples
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.training.config import RunConfig

Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run consists of, built by `bridgetower.training.run`.

    Attributes:
        config: Decides the result.
        task: Model and losses; its `progress` is set to the share of the run that is done.
        model: The model that the task trains.
        examples: What it is trained on.
        digests: Of the files that the run reads, by path.
        evaluate: Gives the validation figures.
        save: Writes the weights as a checkpoint to a folder.
        max_steps: Optimiser steps of the whole run.
    """

    config: RunConfig
    task: nn.Module
    model: BridgeTower
    examples: Examples
    digests: Mapping[str, str]
    evaluate: Evaluate
    save: Callable[[Path], None]
    max_steps: int
