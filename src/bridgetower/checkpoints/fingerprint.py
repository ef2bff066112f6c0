"""A short name for what a model's vectors depend on, so that vectors of different models are never compared."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from bridgetower.files import sha256_of
from bridgetower.model.config import ModelConfig
from bridgetower.processor import Processor

_LETTERS = 16


def fingerprint(config: ModelConfig, tensors: Mapping[str, Tensor], processor: Processor) -> str:
    """Returns a digest; weights count in bfloat16, and settings only if they are not at their default."""
    content = {
        "tensors": _digests(tensors, torch.bfloat16),
        "model": dict(_changed(config)),
        "processor": dict(_changed(processor.config)),
        "vocabulary": None if processor.tokenizer is None else processor.tokenizer.get_vocab(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_LETTERS]


def exact_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Returns a digest of tensors by name, which the smallest change of a value changes."""
    return hashlib.sha256(json.dumps(_digests(tensors), sort_keys=True).encode()).hexdigest()[:_LETTERS]


def code_content(parts: set[Any], files: Iterable[Path] = (), packages: Iterable[str] = ()) -> dict[str, Any]:
    """Returns what tells one version of some code from another, ready for JSON."""
    bases = {base for part in parts for base in getattr(part, "__mro__", (part,)) if base is not object}
    try:
        sources = {Path(inspect.getfile(base)) for base in bases}.union(files)
        code = sorted(sha256_of(file)[:_LETTERS] for file in sources)
    except (TypeError, OSError):
        code = [uuid4().hex]
    names = {"torch", *packages, *(part.__module__.partition(".")[0] for part in parts)}
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in sorted(names)}
    return {"code": code, "versions": {name: str(found) for name, found in versions.items() if found is not None}}


def _digests(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, str]:
    def digest(tensor: Tensor) -> str:
        found = hashlib.sha256(repr(list(tensor.shape)).encode())
        found.update(tensor.detach().to(dtype).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    with ThreadPoolExecutor() as pool:  # digests and conversions let other threads run
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def _changed(config: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _changed(value, f"{prefix}{field.name}.")
        elif value != field.default:
            yield prefix + field.name, value
