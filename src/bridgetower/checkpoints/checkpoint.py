"""Checkpoints in memory, checks of their tensors, and fingerprints."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from bridgetower.checkpoints.keymap import TensorSource, import_tensors
from bridgetower.checkpoints.reranking import UNMEASURED, Reranking
from bridgetower.files import sha256_of
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import CLASS_COUNTS, FIXED_LABELS, ModelConfig, VisionConfig, look_up
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions, vision_tower
from bridgetower.model.layers import on_meta
from bridgetower.processor import Processor

_FINGERPRINT_LETTERS = 16
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in memory: config, weights, preprocessing and what validation found."""

    # A hub id has its commit, `id@commit`.
    source: str
    config: ModelConfig
    # Every parameter of `BridgeTower(config, extensions)`, under its name.
    tensors: dict[str, Tensor]
    # No computation reads these, but an export writes them: the text pooler, the official `ln_separate`.
    extra_tensors: dict[str, Tensor] = field(default_factory=dict)
    # Foreign names that were not read: buffers, tensors of CLIP's text encoder.
    dropped: tuple[str, ...] = ()
    # Its `max_length` is lowered to that of the text tower.
    processor: Processor | None = None
    extensions: Extensions = NO_EXTENSIONS
    # Class names by head, but for `FIXED_LABELS`.
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reranking: Reranking = UNMEASURED

    def __post_init__(self) -> None:
        # Each head has one name for each of its classes.
        heads = vars(self.config.heads)
        for head, names in self.labels.items():
            count = heads[head] if head in CLASS_COUNTS else 0
            # The config does not have the number of classes of a custom head.
            if head in self.config.heads.custom:
                count = len(names)
            num_different = len(set(names))
            if num_different != len(names) or len(names) != count:
                raise ValueError(
                    f"{self.source} has {num_different} different names among {len(names)} for the {count} classes "
                    f"of its {head} head; expected one for each, in the order of the classes"
                )

        # The processor makes no text that the text tower cannot take.
        processor = self.processor
        if processor is None:
            return
        rows = self.config.text.vocab_size
        if processor.tokenizer is not None and processor.vocab_size > rows:
            raise ValueError(
                f"{self.source} has a tokenizer with ids up to {processor.vocab_size - 1}, but text.vocab_size is "
                f"{rows}; give the tokenizer that the text tower was trained with"
            )
        max_length = min(processor.config.max_length, self.config.text.max_length)
        shorter = replace(processor.config, max_length=max_length)
        if shorter != processor.config:
            object.__setattr__(self, "processor", Processor(shorter, processor.tokenizer))

    def class_names(self, head: str) -> tuple[str, ...]:
        """Returns the class names of a head, or none if it predicts a number."""
        names = FIXED_LABELS.get(head) or self.labels.get(head)
        if names is not None:
            return names
        spec = look_up("head", head, self.extensions.head_specs)
        if spec.outputs_of(self.config.heads) == "number":
            return ()
        raise ValueError(
            f"{self.source} does not name the classes of its {head} head; for an official .ckpt with a vqa head "
            "pass answers, a file with a JSON list in the order in which the head was trained"
        )

    def model(self, *, copy: bool = True) -> BridgeTower:
        """Builds the model in evaluation mode. `copy=False` shares the memory of the tensors."""
        # transformers accepts another size; here the position embeddings would be interpolated.
        image_size = self.config.vision.image_size
        if self.processor and self.processor.config.image_size != image_size:
            raise ValueError(
                f"{self.source} prepares images of {self.processor.config.image_size} pixels, its model takes "
                f"{image_size}; set image_size"
            )
        with on_meta():
            model = BridgeTower(self.config, self.extensions)
        tensors = _cloned(self.tensors) if copy else self.tensors
        model.load_state_dict(tensors, strict=True, assign=True)
        # Clones do not keep a mapped file open.
        model.origin = replace(self, tensors={}, extra_tensors=_cloned(self.extra_tensors))
        return model.eval()

    def resized(self, image_size: int) -> Checkpoint:
        """Returns the checkpoint for square images of another size, with interpolated position embeddings."""
        config = self.config.override({"vision.image_size": image_size})
        tensors = self.tensors | resized_vision(self.tensors, config.vision, self.extensions)
        processor = self.processor
        if processor is not None:
            processor = processor.with_image_size(image_size)
        return replace(self, config=config, tensors=tensors, processor=processor)

    def with_token_types(self, count: int) -> Checkpoint:
        """Returns the checkpoint with at least `count` token types.

        New ones start as copies of the last one, as in the official code.
        """
        name = "token_type_embedding.weight"
        table = self.tensors[name]
        if len(table) >= count:
            return self
        copies = table[-1:].expand(count - len(table), -1)
        tensors = self.tensors | {name: torch.cat([table, copies])}
        config = self.config.override({"fusion.num_token_types": count})
        return replace(self, config=config, tensors=tensors)

    def without_itc(self) -> Checkpoint:
        """Returns the checkpoint without its contrastive head."""
        if self.config.heads.itc is None:
            raise ValueError(f"{self.source} has no contrastive head to drop; leave drop_itc out")
        config = self.config.override({"heads.itc": None})
        tensors = {name: self.tensors[name] for name in parameter_shapes(config, self.extensions)}
        return replace(self, config=config, tensors=tensors, reranking=UNMEASURED)


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def resized_vision(
    tensors: Mapping[str, Tensor], config: VisionConfig, extensions: Extensions = NO_EXTENSIONS
) -> dict[str, Tensor]:
    """Fits the tensors `vision.*` to the image size of a config."""
    prefix = "vision."
    tower_tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    with on_meta():
        tower = vision_tower(config, extensions)
    fitted = tower.fitted(tower_tensors)
    return {prefix + name: tensor for name, tensor in fitted.items()}


@lru_cache(maxsize=4)
def parameter_shapes(
    config: ModelConfig, extensions: Extensions = NO_EXTENSIONS
) -> Mapping[str, torch.Size]:
    """Returns the shape of every parameter of `BridgeTower(config, extensions)`, without allocating them."""
    with on_meta():
        parameters = BridgeTower(config, extensions).state_dict()
    return MappingProxyType({name: tensor.shape for name, tensor in parameters.items()})


def check_depth(source: str, config: ModelConfig, tensors: Collection[str]) -> None:
    """Raises ValueError if there are fewer tensors than layers, before a model of so many layers is described."""
    layers = config.vision.num_layers + config.text.num_layers + config.fusion.num_layers
    if len(tensors) < layers:
        raise ValueError(
            f"{source} has {len(tensors)} tensors for the {layers} layers of its config; copy it again"
        )


def extra_tensor_names(config: ModelConfig, extra_vision_layers: int = 0) -> list[str]:
    """Returns names, in our naming, that a source may have and that no computation of ours reads."""
    depth = config.vision.num_layers
    full_depth = depth + extra_vision_layers
    norms = [f"vision.separate_norms.{number}" for number in range(full_depth + 1)]
    modules = ["text.pooler.dense", *norms]
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    block = [name for name in parameter_shapes(config) if name.startswith("vision.layers.0.")]
    for number in range(depth, full_depth):
        names += [name.replace(".0.", f".{number}.", 1) for name in block]
    return names


def collect(
    source: str,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    table: Mapping[str, TensorSource],
    extra_table: Mapping[str, TensorSource],
    droppable: Iterable[str],
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    """Checks foreign tensors and imports them under our names."""
    extra_names = set[str]()
    present = dict[str, TensorSource]()
    for name, tensor_source in extra_table.items():
        if tensors.keys() >= set(tensor_source.names):
            present[name] = tensor_source
            extra_names.update(tensor_source.names)
    shapes = parameter_shapes(config)
    dropped = check_sources(source, shapes, tensors, table, droppable, extra_names)
    imported = import_tensors(table, tensors, dtype)
    check_finite(source, imported)
    return Checkpoint(
        source=source,
        config=config,
        tensors=imported,
        extra_tensors=import_tensors(present, tensors),
        dropped=dropped,
    )


def check_sources(
    source: str,
    shapes: Mapping[str, torch.Size],
    tensors: Mapping[str, Tensor],
    table: Mapping[str, TensorSource],
    droppable: Iterable[str],
    extra_names: Collection[str] = (),
) -> tuple[str, ...]:
    """Checks that foreign tensors are those that a table needs, and returns the names to drop."""
    # Names are needed, extra or droppable.
    needed = {name for tensor_source in table.values() for name in tensor_source.names}
    unused = tensors.keys() - needed - set(extra_names)
    dropped = {name for name in unused if any(re.fullmatch(pattern, name) for pattern in droppable)}
    _refuse(source, "lacks", needed - tensors.keys())
    _refuse(source, "has unknown", unused - dropped)

    # Tensors have the shapes of the model and hold floating-point numbers.
    misshapen = list[str]()
    mistyped = list[str]()
    for parameter, tensor_source in table.items():
        shape = tensor_source.foreign_shape(shapes[parameter])
        for name in tensor_source.names:
            tensor = tensors[name]
            if tensor.shape != shape:
                misshapen.append(f"{name} {list(tensor.shape)} (expected {list(shape)})")
            if tensor.dtype not in _FLOATS:
                kind = str(tensor.dtype).removeprefix("torch.")
                mistyped.append(f"{name} {kind} (expected floats of 16, 32 or 64 bits)")
    _refuse(source, "has wrongly shaped", misshapen)
    _refuse(source, "has wrongly typed", mistyped)
    return tuple(sorted(dropped))


def check_tensors(
    source: str,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    extensions: Extensions = NO_EXTENSIONS,
) -> None:
    """Raises ValueError, with a list, unless `tensors` are the parameters of `BridgeTower(config, extensions)`."""
    check_depth(source, config, tensors)
    shapes = parameter_shapes(config, extensions)
    table = {name: TensorSource((name,)) for name in shapes}
    check_sources(source, shapes, tensors, table, ())


def check_finite(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, with a list, if tensors have NaN or infinite values."""
    infinite = []
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        # The extremes take one pass and no second tensor, and NaN goes through both.
        extremes = torch.stack(tensor.aminmax())
        if not extremes.isfinite().all():
            infinite.append(name)
    _refuse(source, "has NaN or infinite values in", infinite)


def _refuse(source: str, problem: str, names: Collection[str]) -> None:
    if names:
        listed = ", ".join(sorted(names)[:10])
        ending = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise ValueError(f"{source} {problem} tensors: {listed}{ending}")


def fingerprint(config: ModelConfig, tensors: Mapping[str, Tensor], processor: Processor) -> str:
    """Returns a digest of a model: weights in bfloat16, settings that differ from their default, vocabulary."""
    content = {
        "tensors": _digests(tensors, torch.bfloat16),
        "model": dict(_changed_settings(config)),
        "processor": dict(_changed_settings(processor.config)),
        "vocabulary": None if processor.tokenizer is None else processor.tokenizer.get_vocab(),
    }
    return _json_digest(content)


def exact_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Returns a digest of tensors by name, which the smallest change of a value changes."""
    return _json_digest(_digests(tensors))


def _json_digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_LETTERS]


def code_content(
    objects: set[Any], files: Iterable[Path] = (), packages: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns digests and versions of the code of classes and functions, ready for JSON."""
    # Files of the code, with those of base classes.
    bases = {base for item in objects for base in getattr(item, "__mro__", (item,))} - {object}
    try:
        sources = {Path(inspect.getfile(base)) for base in bases}.union(files)
        code = sorted(sha256_of(file)[:_FINGERPRINT_LETTERS] for file in sources)
    except (TypeError, OSError):
        # Code without a file, such as a notebook's, is never the same as before.
        code = [uuid4().hex]

    # Of each package that the code is in, and of PyTorch.
    names = {"torch", *packages, *(item.__module__.partition(".")[0] for item in objects)}
    versions = {
        name: str(sys.modules[name].__version__)
        for name in sorted(names)
        if hasattr(sys.modules.get(name), "__version__")
    }
    return {"code": code, "versions": versions}


def _digests(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, str]:
    def digest(tensor: Tensor) -> str:
        numbers = tensor.detach().to(dtype).cpu().contiguous().reshape(-1)
        hashed = hashlib.sha256(repr(list(tensor.shape)).encode())
        hashed.update(numbers.view(torch.uint8).numpy().data)
        return hashed.hexdigest()

    # Digests and conversions let other threads run.
    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def _changed_settings(config: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the dotted names and values of fields that are not at their default."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from _changed_settings(value, f"{prefix}{item.name}.")
        elif value != item.default:
            yield prefix + item.name, value
