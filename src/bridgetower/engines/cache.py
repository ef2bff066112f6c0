"""Exports of checkpoints that were not exported by their owner, kept for the next load."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch

from bridgetower.checkpoints import Checkpoint
from bridgetower.engines.config import Form
from bridgetower.engines.folder import VERSION, is_exported, write_exported
from bridgetower.files import locked, remove_leftovers

logger = logging.getLogger(__name__)


def cached_export(checkpoint: Checkpoint, cache: Path, form: Form, *, progress: bool = False) -> Path:
    """Returns the folder in `cache` with the parts of a checkpoint, exporting it if it is not there yet.

    Args:
        checkpoint: Of any source; what counts is its content.
        cache: Folder of exports.
        form: Of the parts.
        progress: Show a bar while exporting.

    Raises:
        FileNotFoundError: Packages are not installed.
        ValueError: The engine's outputs would differ from the model's.
    """
    folder = cache / f"{content_key(checkpoint)}-{form}"
    with locked(cache, wait=True):
        if not is_exported(folder, form):
            remove_leftovers(cache)
            logger.info("%s: exporting it for this engine, once, to %s", checkpoint.source, folder)
            write_exported(checkpoint, folder, form, progress=progress)
    return folder


def content_key(checkpoint: Checkpoint) -> str:
    """Returns a name that two checkpoints share if they hold the same config and the same weights."""
    digest = hashlib.sha256(json.dumps([VERSION, torch.__version__, checkpoint.config.to_dict()]).encode())
    for name in sorted(checkpoint.tensors):
        digest.update(name.encode())
        digest.update(checkpoint.tensors[name].float().contiguous().numpy().data)
    return digest.hexdigest()[:32]
