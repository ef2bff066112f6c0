"""Towers from published uni-modal weights: this package's own, and those that timm and transformers build."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bridgetower.checkpoints.checkpoint import check_sources, finite, resized_vision
from bridgetower.checkpoints.hub import locate
from bridgetower.checkpoints.keymap import (
    MODEL_TYPES,
    TowerNaming,
    Values,
    import_tensors,
    recognise,
    settings,
)
from bridgetower.checkpoints.tensors import (
    only_tensors,
    read_safetensors,
    read_torch_archive,
    read_weights,
)
from bridgetower.files import read_json
from bridgetower.model.config import TextConfig, VisionConfig
from bridgetower.model.layers import on_meta
from bridgetower.model.library_towers import (
    TimmTower,
    read_transformers,
    timm_config,
    timm_data_config,
    timm_hub_id,
    transformers_tokenizer,
)
from bridgetower.model.towers import TextTransformer, VisionTransformer
from bridgetower.processor import load_tokenizer
from bridgetower.processor.huggingface import channels, read_normalisation
from bridgetower.processor.text import find_tokenizer, tokenizers_errors

TIMM, HF = "timm:", "hf:"
_WRAPPERS = ("model", "state_dict")  # under which DeiT and training frameworks store the weights
_EXPECTED = {
    "vision": "CLIP of OpenAI or transformers, a ViT or DeiT of timm or transformers, or timm:NAME",
    "text": "an encoder of transformers",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TowerWeights:
    """A published tower."""

    source: str  # a hub id carries its commit, `id@commit`
    config: Any  # a `VisionConfig` for the image size that it was trained at, or a `TextConfig`
    # the parameters `vision.*` or `text.*` of a model with this tower, in float32
    tensors: dict[str, Tensor]
    # fields of `ProcessorConfig` that its files tell
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    def resized(self, image_size: int) -> TowerWeights:
        config = replace(self.config, image_size=image_size)
        return replace(self, config=config, tensors=resized_vision(self.tensors, config))


@dataclass(frozen=True)
class _Found:
    """What is at a source: its weights, its `config.json` ({} if it has none) and its folder (None of a file)."""

    name: str
    tensors: Mapping[str, Tensor]
    settings: Values
    folder: Path | None


def read_vision_tower(source: str, overrides: Values | None = None) -> TowerWeights:
    if not source.startswith(TIMM):
        found = _open(source.removeprefix(HF))
        try:
            return _own_tower(found, "vision", overrides or {})
        except ValueError as error:  # timm has more kinds of layers than the towers of this package
            if not isinstance(found.settings.get("architecture"), str):
                raise
            logger.info("%s: built by timm (%s)", found.name, error)
        return _timm_tower(found, overrides or {})
    # NAME=FILE, a folder, a hub id, or a name of timm, whose weights are on the hub
    name = source.removeprefix(TIMM)
    architecture, given, file = name.partition("=")
    bare, at, revision = name.partition("@")
    if given:
        found = replace(_open(file), settings={"architecture": architecture})
    else:
        found = _open(
            name if "/" in name or Path(name).is_dir() else f"{timm_hub_id(bare)}{at}{revision}"
        )
    if not isinstance(found.settings.get("architecture"), str):
        raise ValueError(
            f"{found.name} has no config.json of timm with its architecture; give timm:NAME=FILE"
        )
    return _timm_tower(found, overrides or {})


def read_text_tower(source: str, overrides: Values | None = None) -> TowerWeights:
    if source.startswith(TIMM):
        raise ValueError(
            f"{source} is of timm, which has image towers only; give a text encoder, such as hf:NAME"
        )
    found = _open(source.removeprefix(HF))
    kind = found.settings.get("model_type")
    of_library = isinstance(kind, str) and kind not in MODEL_TYPES["bert"]
    if found.folder is None or not of_library:
        tower = _own_tower(found, "text", overrides or {})
    else:
        config, loaded = read_transformers(found.folder)
        check_overrides(found.name, "text", vars(config), overrides or {})
        tensors = finite(found.name, {f"text.{name}": tensor for name, tensor in loaded.items()})
        tower = TowerWeights(source=found.name, config=config, tensors=tensors)
    if found.folder is None:
        return tower
    file = find_tokenizer(found.folder)
    if file is not None and (file.name == "tokenizer.json" or not of_library):
        return replace(tower, tokenizer=load_tokenizer(file))
    with tokenizers_errors(f"transformers cannot read the tokenizer in {found.folder}"):
        return replace(tower, tokenizer=transformers_tokenizer(found.folder))


def _open(source: str) -> _Found:
    place, name = locate(source, "a file with weights, a folder")
    if place.is_dir():
        config = place / "config.json"
        return _Found(
            name, read_weights(place, name), read_json(config) if config.exists() else {}, place
        )
    if place.suffix == ".safetensors":
        return _Found(name, read_safetensors(place), {}, None)
    content = read_torch_archive(place)
    wrapped = next(
        (content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content
    )
    return _Found(name, only_tensors(name, wrapped), {}, None)


def _own_tower(found: _Found, part: Literal["vision", "text"], overrides: Values) -> TowerWeights:
    """Reads a tower of this package's layers; its sizes are those of its tensors."""
    source, tensors, naming = found.name, found.tensors, recognise(found.tensors, part)
    if naming is None:
        start = ", ".join(sorted(tensors)[:3])
        raise ValueError(
            f"{source} holds no known {part} tower ({start}, …); expected {_EXPECTED[part]}"
        )
    if naming.kind == "bert":  # older files name the parameters of LayerNorms after the paper
        tensors = {
            name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
                "LayerNorm.beta", "LayerNorm.bias"
            ): tensor
            for name, tensor in tensors.items()
        }
    try:
        told = naming.sizes(source, tensors)
    except KeyError as error:
        raise ValueError(f"{source} lacks tensors: {error.args[0]}") from error
    from_config, defaults = settings(source, naming.kind, found.settings, told["hidden_size"])
    told |= from_config
    check_overrides(source, part, told, overrides)
    values = {**defaults, **overrides, **told}
    if "num_heads" not in values:
        raise ValueError(
            f"{source} does not tell its number of heads, and its width of {told['hidden_size']} is of no published "
            f"tower; set model.{part}.num_heads"
        )
    config = TextConfig(**values) if part == "text" else VisionConfig(**values)
    with on_meta():
        tower = (
            TextTransformer(config) if isinstance(config, TextConfig) else VisionTransformer(config)
        )
    pixels = None
    if part == "vision" and found.folder is not None:
        timm = found.settings.get("pretrained_cfg")
        if isinstance(timm, dict) and {"mean", "std"} <= set(timm):
            pixels = (
                channels(found.folder, "mean", timm["mean"]),
                channels(found.folder, "std", timm["std"]),
            )
        else:
            pixels = read_normalisation(found.folder)
    preprocessing = {} if pixels is None else {"image_mean": pixels[0], "image_std": pixels[1]}
    return _weights(source, config, tower, tensors, naming, preprocessing)


def _timm_tower(found: _Found, overrides: Values) -> TowerWeights:
    architecture = str(found.settings["architecture"])
    arguments = dict(found.settings.get("model_args") or {})
    data = timm_data_config(architecture, found.settings.get("pretrained_cfg"))
    size = arguments.pop("img_size", data["input_size"][1])
    sides = set(size) if isinstance(size, list | tuple) else {size}  # timm writes both
    if len(sides) != 1:
        raise ValueError(f"{found.name} takes images of {size} pixels; expected a square")
    config = timm_config(architecture, arguments, sides.pop())
    check_overrides(found.name, "vision", vars(config), overrides)
    with on_meta():
        tower = TimmTower(config)
    try:
        tensors = tower.converted(found.tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{found.name} does not fit timm's {architecture} ({error}); give its own name"
        ) from error
    naming = TowerNaming(
        "timm", "", "", [(r"vision\.model\.(.+)", ("{0}",))], (r"(head|head_dist|pre_logits)\..*",)
    )
    preprocessing = {
        "profile": "official-finetune" if data["crop_mode"] == "squash" else "official-pretrain",
        "image_mean": tuple(data["mean"]),
        "image_std": tuple(data["std"]),
        "interpolation": data["interpolation"],
    }
    return _weights(found.name, config, tower, tensors, naming, preprocessing)


def _weights(
    source: str,
    config: Any,
    tower: nn.Module,
    tensors: Mapping[str, Tensor],
    naming: TowerNaming,
    preprocessing: Values,
) -> TowerWeights:
    shapes = {f"{naming.part}.{name}": tensor.shape for name, tensor in tower.state_dict().items()}
    table = naming.table(shapes)
    if dropped := check_sources(source, shapes, tensors, table, naming.droppable):
        logger.info("%s: not used: %s", source, ", ".join(dropped))
    converted = finite(source, import_tensors(table, tensors, torch.float32))
    return TowerWeights(
        source=source, config=config, tensors=converted, preprocessing=preprocessing
    )


def check_overrides(source: str, part: str, decided: Values, overrides: Values) -> None:
    wrong = [
        f"model.{part}.{name} {value!r} (it has {decided[name]!r})"
        for name, value in overrides.items()
        if name in decided and decided[name] != value
    ]
    if wrong:
        raise ValueError(
            f"{part} {source} contradicts the run's settings: {', '.join(wrong)}; leave them out, or give another tower"
        )
