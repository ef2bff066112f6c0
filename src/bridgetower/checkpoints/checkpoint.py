"""A checkpoint in memory: config, tensors under our names, what came along, and fingerprints of all that."""

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

from bridgetower.checkpoints.keymap import Source, import_tensors
from bridgetower.checkpoints.reranking import UNMEASURED, Reranking
from bridgetower.files import sha256_of
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import CLASS_COUNTS, FIXED_LABELS, ModelConfig, VisionConfig, look_up
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions, vision_tower
from bridgetower.model.layers import on_meta
from bridgetower.processor import Processor

_LETTERS = 16  # of a fingerprint
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file or folder holds."""

    source: str  # a hub id carries its commit, `id@commit`
    config: ModelConfig
    # every parameter of `BridgeTower(config, extensions)`, under its name
    tensors: dict[str, Tensor]
    # What no computation reads but a conversion back must write (the text pooler, the official `ln_separate`).
    extra_tensors: dict[str, Tensor] = field(default_factory=dict)
    dropped: tuple[
        str, ...
    ] = ()  # foreign names that were left behind: buffers, left-overs of CLIP's text side
    # a larger `max_length` than the text tower takes is lowered to that
    processor: Processor | None = None
    extensions: Extensions = NO_EXTENSIONS
    # names of classes by head, but `FIXED_LABELS`
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reranking: Reranking = UNMEASURED

    def __post_init__(self) -> None:
        heads = vars(self.config.heads)
        for head, names in self.labels.items():
            count = heads[head] if head in CLASS_COUNTS else 0
            if head in self.config.heads.custom:  # only the head has their number
                count = len(names)
            if len(set(names)) != len(names) or len(names) != count:
                raise ValueError(
                    f"{self.source} has {len(set(names))} different names among {len(names)} for the {count} classes "
                    f"of its {head} head; expected one for each, in the order of the classes"
                )
        if (processor := self.processor) is None:
            return
        rows, longest = self.config.text.vocab_size, self.config.text.max_length
        if processor.tokenizer is not None and processor.vocab_size > rows:
            raise ValueError(
                f"{self.source} has a tokenizer with ids up to {processor.vocab_size - 1}, but text.vocab_size is "
                f"{rows}; give the tokenizer that the text tower was trained with"
            )
        if processor.config.max_length > longest:
            within = Processor(replace(processor.config, max_length=longest), processor.tokenizer)
            object.__setattr__(self, "processor", within)

    def class_names(self, head: str) -> tuple[str, ...]:
        """The names of the classes of a head; none if it predicts a number."""
        names = FIXED_LABELS.get(head) or self.labels.get(head)
        spec = look_up("head", head, self.extensions.head_specs)
        if names is None and spec.outputs_of(self.config.heads) == "number":
            return ()
        if names is None:
            raise ValueError(
                f"{self.source} does not name the classes of its {head} head; for an official .ckpt with a vqa head "
                "pass answers, a file with a JSON list in the order in which the head was trained"
            )
        return names

    def model(self, *, copy: bool = True) -> BridgeTower:
        """Builds the model, in evaluation mode."""
        size, made = (
            self.config.vision.image_size,
            self.processor and self.processor.config.image_size,
        )
        # as transformers does; here the position embeddings would be interpolated
        if made not in (
            None,
            size,
        ):
            raise ValueError(
                f"{self.source} prepares images of {made} pixels, its model takes {size}; set image_size"
            )
        with on_meta():
            model = BridgeTower(self.config, self.extensions)
        tensors = (
            {name: tensor.clone() for name, tensor in self.tensors.items()}
            if copy
            else self.tensors
        )
        model.load_state_dict(tensors, strict=True, assign=True)
        # not to hold on to a mapped file
        extra = {name: tensor.clone() for name, tensor in self.extra_tensors.items()}
        model.origin = replace(self, tensors={}, extra_tensors=extra)
        return model.eval()

    def resized(self, image_size: int) -> Checkpoint:
        """Returns the checkpoint for square images of another size: position embeddings are interpolated."""
        config = self.config.override({"vision.image_size": image_size})
        tensors = self.tensors | resized_vision(self.tensors, config.vision, self.extensions)
        processor = self.processor and self.processor.with_image_size(image_size)
        return replace(self, config=config, tensors=tensors, processor=processor)

    def with_token_types(self, count: int) -> Checkpoint:
        """Returns the checkpoint with at least so many token types; new ones start as the last one, as officially."""
        name = "token_type_embedding.weight"
        table = self.tensors[name]
        if len(table) >= count:
            return self
        grown = torch.cat([table, table[-1:].expand(count - len(table), -1)])
        config = self.config.override({"fusion.num_token_types": count})
        return replace(self, config=config, tensors=self.tensors | {name: grown})

    def without_itc(self) -> Checkpoint:
        """Returns the checkpoint without its contrastive head."""
        if self.config.heads.itc is None:
            raise ValueError(f"{self.source} has no contrastive head to drop; leave drop_itc out")
        tensors = {
            name: tensor
            for name, tensor in self.tensors.items()
            if not name.startswith("itc_head.")
        }
        return replace(
            self,
            config=self.config.override({"heads.itc": None}),
            tensors=tensors,
            reranking=UNMEASURED,
        )


def resized_vision(
    tensors: Mapping[str, Tensor], config: VisionConfig, extensions: Extensions = NO_EXTENSIONS
) -> dict[str, Tensor]:
    own = {
        name.removeprefix("vision."): one
        for name, one in tensors.items()
        if name.startswith("vision.")
    }
    with on_meta():
        tower = vision_tower(config, extensions)
    return {f"vision.{name}": tensor for name, tensor in tower.fitted(own).items()}


@lru_cache(maxsize=4)
def parameter_shapes(
    config: ModelConfig, extensions: Extensions = NO_EXTENSIONS
) -> Mapping[str, torch.Size]:
    """Returns the shape of every parameter of `BridgeTower(config, extensions)`, without allocating them."""
    with on_meta():
        shapes = {
            name: tensor.shape
            for name, tensor in BridgeTower(config, extensions).state_dict().items()
        }
    return MappingProxyType(shapes)


def check_depth(source: str, config: ModelConfig, tensors: Collection[str]) -> None:
    """Raises ValueError if there are fewer tensors than layers, before a model of so many layers is described."""
    layers = config.vision.num_layers + config.text.num_layers + config.fusion.num_layers
    if len(tensors) < layers:
        raise ValueError(
            f"{source} has {len(tensors)} tensors for the {layers} layers of its config; copy it again"
        )


def extra_tensor_names(config: ModelConfig, extra_vision_layers: int = 0) -> list[str]:
    """Names that a source may have and no computation of ours reads, in our naming."""
    read, depth = config.vision.num_layers, config.vision.num_layers + extra_vision_layers
    modules = [
        "text.pooler.dense",
        *(f"vision.separate_norms.{number}" for number in range(depth + 1)),
    ]
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    block = [name for name in parameter_shapes(config) if name.startswith("vision.layers.0.")]
    return names + [
        name.replace(".0.", f".{number}.", 1) for number in range(read, depth) for name in block
    ]


def collect(
    source: str,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    table: Mapping[str, Source],
    extra_table: Mapping[str, Source],
    droppable: Iterable[str],
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    extra_table = {
        ours: entry for ours, entry in extra_table.items() if set(entry.names) <= set(tensors)
    }
    extra_names = {name for entry in extra_table.values() for name in entry.names}
    dropped = check_sources(
        source, parameter_shapes(config), tensors, table, droppable, extra_names
    )
    ours, extra_tensors = (
        finite(source, import_tensors(table, tensors, dtype)),
        import_tensors(extra_table, tensors),
    )
    return Checkpoint(
        source=source, config=config, tensors=ours, extra_tensors=extra_tensors, dropped=dropped
    )


def check_sources(
    source: str,
    shapes: Mapping[str, torch.Size],
    tensors: Mapping[str, Tensor],
    table: Mapping[str, Source],
    droppable: Iterable[str],
    extra_tensors: Collection[str] = (),
) -> tuple[str, ...]:
    """Checks that foreign tensors are those that a table asks for, and returns the names of those to leave behind."""
    needed = {name for entry in table.values() for name in entry.names}
    rest = set(tensors) - needed - set(extra_tensors)
    dropped = {name for name in rest if any(re.fullmatch(pattern, name) for pattern in droppable)}
    _refuse(source, "lacks", sorted(needed - set(tensors)))
    _refuse(source, "has unknown", sorted(rest - dropped))
    wrong, strange = [], []
    for ours, entry in table.items():
        for name in entry.names:
            tensor, shape = tensors[name], entry.foreign_shape(shapes[ours])
            if tensor.shape != shape:
                wrong.append(f"{name} {list(tensor.shape)} (expected {list(shape)})")
            if tensor.dtype not in _FLOATS:
                kind = str(tensor.dtype).removeprefix("torch.")
                strange.append(f"{name} {kind} (expected floats of 16, 32 or 64 bits)")
    _refuse(source, "has wrongly shaped", wrong)
    _refuse(source, "has wrongly typed", strange)
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
    check_sources(source, shapes, tensors, {name: Source((name,)) for name in shapes}, ())


def finite(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # One pass over each without a second tensor; NaN goes through both extremes.
    filled = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    wrong = [
        name
        for name, tensor in filled.items()
        if not torch.stack(tensor.aminmax()).isfinite().all()
    ]
    _refuse(source, "has NaN or infinite values in", wrong)
    return tensors


def _refuse(source: str, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise ValueError(f"{source} {what} tensors: {', '.join(names[:10])}{more}")


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
    return hashlib.sha256(json.dumps(_digests(tensors), sort_keys=True).encode()).hexdigest()[
        :_LETTERS
    ]


def code_content(
    parts: set[Any], files: Iterable[Path] = (), packages: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns what tells one version of some code from another, ready for JSON."""
    bases = {
        base for part in parts for base in getattr(part, "__mro__", (part,)) if base is not object
    }
    try:
        sources = {Path(inspect.getfile(base)) for base in bases}.union(files)
        code = sorted(sha256_of(file)[:_LETTERS] for file in sources)
    except (TypeError, OSError):
        code = [uuid4().hex]
    names = {"torch", *packages, *(part.__module__.partition(".")[0] for part in parts)}
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in sorted(names)}
    return {
        "code": code,
        "versions": {name: str(found) for name, found in versions.items() if found is not None},
    }


def _digests(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, str]:
    def digest(tensor: Tensor) -> str:
        found = hashlib.sha256(repr(list(tensor.shape)).encode())
        found.update(
            tensor.detach().to(dtype).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
        return found.hexdigest()

    with ThreadPoolExecutor() as pool:  # digests and conversions let other threads run
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def _changed(config: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from _changed(value, f"{prefix}{item.name}.")
        elif value != item.default:
            yield prefix + item.name, value
