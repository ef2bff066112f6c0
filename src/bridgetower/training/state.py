"""What a killed run continues from: weights, optimiser, step; written atomically."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from bridgetower.files import replacing

FILE = "last.pt"


@dataclass(kw_only=True)
class TrainingState:
    """Where a run is.

    Batches, masks, negatives and dropout are functions of the seed and the step, so no generator state is kept.

    Attributes:
        step: Optimiser steps done.
        best, best_step: Best validation figure so far, and when.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer, state: TrainingState) -> None:
    """Writes the state so that `load_state` gives the same bits; a full disk leaves the last one."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": asdict(state)}
    with replacing(folder / FILE) as temporary:
        torch.save(content, temporary)


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> TrainingState:
    """Restores weights and optimiser in place; a run without a state yet starts at step 0.

    Raises:
        ValueError: The state is of another model.
    """
    path = folder / FILE
    if not path.exists():
        return TrainingState()
    content = torch.load(path, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ValueError(f"{path} is not of this model ({str(error).splitlines()[0]}); use another --out") from error
    optimizer.load_state_dict(content["optimizer"])
    return TrainingState(**content["state"])
