"""What a killed run continues from: weights, optimiser, step; written atomically."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bridgetower.files import replacing

FILE = "last.pt"

# What `torch.load` and `load_state_dict` raise on damaged content, found by cutting and altering files.
_DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError)


@dataclass(kw_only=True)
class TrainingState:
    """Where a run is.

    Batches, masks, negatives and dropout are functions of the seed and the step, so no generator state is kept.

    Attributes:
        step: Optimiser steps done.
        best, best_step: Best validation figure so far, and when.
        figures: Of the last evaluation.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    figures: dict[str, float] = field(default_factory=dict)


def save_state(
    folder: Path, model: nn.Module, optimizer: Optimizer, state: TrainingState, conditions: Mapping[str, str | int]
) -> None:
    """Writes the state so that `load_state` gives the same bits.

    Args:
        folder: Of the run.
        model: Its weights are kept.
        optimizer: Its moments are kept.
        state: Where the run is.
        conditions: What decides the result beside the config, by name; a run is continued under the same only.

    Raises:
        OSError: It could not be written, on a full disk for example; the state of before is still there.
    """
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": asdict(state),
        "conditions": dict(conditions),
    }
    with replacing(folder / FILE, (RuntimeError,)) as temporary:  # torch's writer hides the system's error
        torch.save(content, temporary)


def load_state(
    folder: Path, model: nn.Module, optimizer: Optimizer, conditions: Mapping[str, str | int]
) -> TrainingState:
    """Restores weights and optimiser in place; a run without a state yet starts at step 0.

    Raises:
        ValueError: The file is damaged, of something else, of another model, or was written under other conditions.
    """
    path = folder / FILE
    if not path.exists():
        return TrainingState()
    content = _read(path)
    _check_conditions(path, content["conditions"], conditions)
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        return TrainingState(**content["state"])
    except _DAMAGE as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not of this model ({reason}); start again in another folder") from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        # Not mapped: the optimiser keeps these tensors, and would keep the file on the disk after it was replaced.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        reason = type(error).__name__
        raise ValueError(f"{path} is damaged or no state of a run ({reason}); start again in another folder") from error
    parts = {"model", "optimizer", "state", "conditions"}
    if not isinstance(content, dict) or content.keys() != parts or not isinstance(content["conditions"], dict):
        raise ValueError(f"{path} is not the state of a run; start again in another folder")
    return content


def _check_conditions(path: Path, before: Mapping[str, str | int], now: Mapping[str, str | int]) -> None:
    changed = [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path} would go on to another result: {'; '.join(changed)}; put this back as it was, or start again in "
            "another folder"
        )
