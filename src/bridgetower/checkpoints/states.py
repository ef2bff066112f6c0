"""What a folder in `states/` of a run has: its `state.json`, and the weights in the files of its processes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridgetower.checkpoints.tensors import read_safetensors
from bridgetower.files import json_text, read_json, write_json

ABOUT = "state.json"
LAYOUT = "tensors"
"""The field of `state.json` that says of each tensor what it is and where its parts are."""


def write_about(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `state.json`, with a checksum."""
    write_json(folder / ABOUT, {**content, "crc32": _checksum(content)})


def read_about(folder: Path) -> dict[str, Any]:
    """Returns what was written beside the tensors of a state, and their layout."""
    content = read_json(folder / ABOUT)
    if content.pop("crc32", None) != _checksum(content):
        raise ValueError(f"{ABOUT} is not what was written")
    return content


def share_file(folder: Path, process: int) -> Path:
    """Where a process writes its share of the tensors."""
    return folder / f"process-{process:05d}.safetensors"


def state_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the weights of the model in a state, put together from the shares of all processes."""
    try:
        layout = read_about(folder)[LAYOUT]
        shares: dict[int, Mapping[str, Tensor]] = {}
        weights = {}
        for name, about in layout.items():
            if name.startswith("model."):
                whole = torch.empty(about["shape"], dtype=getattr(torch, about["dtype"]))
                for process, offsets, sizes in about["parts"]:
                    if process not in shares:
                        shares[process] = read_safetensors(share_file(folder, process))
                    part = whole
                    for axis, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
                        part = part.narrow(axis, start, length)
                    part.copy_(shares[process][name])
                weights[name.removeprefix("model.")] = whole
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} is damaged or no state of a run ({error}); use another one") from error
    return weights


def _checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json_text(content).encode()):08x}"
