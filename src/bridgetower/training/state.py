"""What a killed run continues from: weights, optimiser, step; written atomically."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.optim import Optimizer

from bridgetower.checkpoints.tensors import DAMAGE
from bridgetower.distributed import from_first, rank
from bridgetower.files import replacing

FILE = "last.pt"
_COMMENT = b"crc32 "
_COMMENT_BYTES = len(_COMMENT) + 8

PROCESSES, MICRO_BATCHES = "number of processes", "micro-batches of each"
"""Conditions that decide how a batch is cut."""

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainingState:
    """Where a run is.

    Batches, masks, negatives and dropout are functions of the seed and the step, so no generator state is kept.

    Attributes:
        step: Optimiser steps done.
        best, best_step: Best validation metric so far, and when.
        metrics: Of the last evaluation.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


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
        _append_checksum(temporary)


def load_state(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    conditions: Mapping[str, str | int],
    *,
    allow_world_size_change: bool = False,
) -> TrainingState:
    """Restores weights and optimiser in place; a run without a state yet starts at step 0.

    The first process reads the file, and all of them get what it found: the others need not see the folder.

    Args:
        folder: Of the run.
        model: Gets the weights.
        optimizer: Gets the moments.
        conditions: As `save_state` takes them.
        allow_world_size_change: Only warn where a batch is now cut in another way.

    Raises:
        ValueError: The file is damaged, of something else, of another model, or was written under other conditions.
    """
    path = folder / FILE
    content = from_first(_read(path) if rank() == 0 and path.exists() else None)
    if content is None:
        return TrainingState()
    _check_conditions(path, content["conditions"], conditions, allow_world_size_change=allow_world_size_change)
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        return TrainingState(**content["state"])
    except DAMAGE as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not of this model ({reason}); start again in another folder") from error


def _read(path: Path) -> Mapping[str, Any]:
    _check_checksum(path)
    try:
        # Not mapped: the optimiser keeps these tensors, and would keep the file on the disk after it was replaced.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        reason = type(error).__name__
        raise ValueError(f"{path} is damaged or no state of a run ({reason}); start again in another folder") from error
    parts = {"model", "optimizer", "state", "conditions"}
    if not isinstance(content, dict) or content.keys() != parts or not isinstance(content["conditions"], dict):
        raise ValueError(f"{path} is not the state of a run; start again in another folder")
    return content


def _append_checksum(path: Path) -> None:
    """Writes the CRC-32 of a file of `torch.save` into its end, as the comment of a zip archive.

    The archive has a CRC-32 of each record, but `torch.load` reads none of them, and they do not cover its directory.
    """
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment
        file.write(_COMMENT_BYTES.to_bytes(2, "little"))
        file.write(_COMMENT + _crc32(file, file.tell()))


def _check_checksum(path: Path) -> None:
    """Raises ValueError unless a file is what `_append_checksum` left; other files have no checksum."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END) - _COMMENT_BYTES
        file.seek(max(end, 0))
        comment = file.read()
        if comment.startswith(_COMMENT) and comment != _COMMENT + _crc32(file, end):
            raise ValueError(f"{path} is damaged: its checksum is that of other bytes; start again in another folder")


def _crc32(file: BinaryIO, end: int) -> bytes:
    """Returns the CRC-32 of what comes before a place in a file, where it is left, as hexadecimal digits."""
    crc, left = 0, end
    file.seek(0)
    while left:
        part = file.read(min(left, 2**20))
        crc, left = zlib.crc32(part, crc), left - len(part)
    return b"%08x" % crc


def _check_conditions(
    path: Path, before: Mapping[str, str | int], now: Mapping[str, str | int], *, allow_world_size_change: bool
) -> None:
    changed = {
        name: f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    }
    if changed and allow_world_size_change and changed.keys() <= {PROCESSES, MICRO_BATCHES}:
        if rank() == 0:
            logger.warning(
                "%s goes on to another result than that of an undisturbed run: %s. The pairs of a step stay the same; "
                "the micro-batches they are cut into, the negatives and contrast within these, and the draws of "
                "dropout do not",
                path,
                "; ".join(changed.values()),
            )
    elif changed:
        option = " or give allow_world_size_change=True" if PROCESSES in changed else ""
        raise ValueError(
            f"{path} would go on to another result: {'; '.join(changed.values())}; put this back as it was{option}, or "
            "start again in another folder"
        )
