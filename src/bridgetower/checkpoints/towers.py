"""Reads towers from published uni-modal weights.

Layers are those of this package, or of timm and transformers where it lacks their kind.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bridgetower.checkpoints.checkpoint import check_finite, check_sources, resized_vision
from bridgetower.checkpoints.hub import locate
from bridgetower.checkpoints.keymap import (
    MODEL_TYPES,
    Tower,
    TowerNaming,
    Values,
    config_settings,
    default_settings,
    import_tensors,
    recognise,
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
from bridgetower.processor.text import tokenizers_errors
from bridgetower.processor.tokenizer_files import find_tokenizer

TIMM = "timm:"
HF = "hf:"
# Keys under which DeiT and training frameworks save the weights.
_WRAPPERS = ("model", "state_dict")
_EXPECTED: dict[Tower, str] = {
    "vision": "CLIP of OpenAI or transformers, a ViT or DeiT of timm or transformers, or timm:NAME",
    "text": "an encoder of transformers",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TowerWeights:
    """A published tower."""

    # A hub id has its commit, `id@commit`.
    source: str
    # A `VisionConfig` for the image size of its training, or a `TextConfig`.
    config: Any
    # The parameters `vision.*` or `text.*` of a model with this tower, in float32.
    tensors: dict[str, Tensor]
    # Fields of `ProcessorConfig` that its files have.
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    def resized(self, image_size: int) -> TowerWeights:
        config = replace(self.config, image_size=image_size)
        return replace(self, config=config, tensors=resized_vision(self.tensors, config))


@dataclass(frozen=True)
class _TowerFiles:
    """Tensors and settings at a source."""

    name: str
    tensors: Mapping[str, Tensor]
    # The content of `config.json`, or nothing.
    settings: Values = field(default_factory=dict)
    # None of a file.
    folder: Path | None = None


def read_vision_tower(source: str, overrides: Values | None = None) -> TowerWeights:
    overrides = overrides or {}
    if not source.startswith(TIMM):
        files = _open_tower_files(source.removeprefix(HF))
        try:
            return _read_package_tower(files, "vision", overrides)
        # timm has more kinds of layers than the towers of this package.
        except ValueError as error:
            if not isinstance(files.settings.get("architecture"), str):
                raise
            logger.info("%s: built by timm (%s)", files.name, error)
        return _read_timm_tower(files, overrides)

    # Of timm: NAME=FILE, a folder, a hub id, or a name of timm, whose weights are on the hub.
    name = source.removeprefix(TIMM)
    architecture, is_file, file = name.partition("=")
    if is_file:
        files = replace(_open_tower_files(file), settings={"architecture": architecture})
    elif "/" in name or Path(name).is_dir():
        files = _open_tower_files(name)
    else:
        timm_name, at, revision = name.partition("@")
        files = _open_tower_files(f"{timm_hub_id(timm_name)}{at}{revision}")
    if not isinstance(files.settings.get("architecture"), str):
        raise ValueError(
            f"{files.name} has no config.json of timm with its architecture; give timm:NAME=FILE"
        )
    return _read_timm_tower(files, overrides)


def read_text_tower(source: str, overrides: Values | None = None) -> TowerWeights:
    if source.startswith(TIMM):
        raise ValueError(
            f"{source} is of timm, which has image towers only; give a text encoder, such as hf:NAME"
        )
    files = _open_tower_files(source.removeprefix(HF))
    if files.folder is None:
        return _read_package_tower(files, "text", overrides or {})

    # transformers builds the kinds of layers that this package lacks.
    model_type = files.settings.get("model_type")
    is_of_library = isinstance(model_type, str) and model_type not in MODEL_TYPES["bert"]
    if is_of_library:
        config, tensors = read_transformers(files.folder)
        check_overrides(files.name, "text", vars(config), overrides or {})
        tensors = {f"text.{name}": tensor for name, tensor in tensors.items()}
        check_finite(files.name, tensors)
        tower = TowerWeights(source=files.name, config=config, tensors=tensors)
    else:
        tower = _read_package_tower(files, "text", overrides or {})

    # It also converts other files of a tokenizer than `tokenizer.json`.
    file = find_tokenizer(files.folder)
    if file is not None and (file.name == "tokenizer.json" or not is_of_library):
        return replace(tower, tokenizer=load_tokenizer(file))
    with tokenizers_errors(f"transformers cannot read the tokenizer in {files.folder}"):
        return replace(tower, tokenizer=transformers_tokenizer(files.folder))


def _open_tower_files(source: str) -> _TowerFiles:
    path, name = locate(source, "a file with weights, a folder")
    if path.is_dir():
        config = path / "config.json"
        settings = read_json(config) if config.exists() else {}
        return _TowerFiles(name, read_weights(path, name), settings, path)
    if path.suffix == ".safetensors":
        return _TowerFiles(name, read_safetensors(path))
    content = read_torch_archive(path)
    wrapped = [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)]
    return _TowerFiles(name, only_tensors(name, wrapped[0] if wrapped else content))


def _read_package_tower(files: _TowerFiles, tower: Tower, overrides: Values) -> TowerWeights:
    """Reads a tower that this package builds, whose sizes are those of its tensors."""
    # Recognise the publisher by the names of the tensors.
    source = files.name
    naming = recognise(files.tensors, tower)
    if naming is None:
        start = ", ".join(sorted(files.tensors)[:3])
        raise ValueError(
            f"{source} holds no known {tower} tower ({start}, …); expected {_EXPECTED[tower]}"
        )
    tensors = files.tensors
    if naming.kind == "bert":
        # Older files name the parameters of LayerNorms after the paper.
        for old, new in (("gamma", "weight"), ("beta", "bias")):
            tensors = {
                name.replace(f"LayerNorm.{old}", f"LayerNorm.{new}"): tensor
                for name, tensor in tensors.items()
            }

    # Make the config of the tensors and of config.json, which nothing may contradict.
    try:
        settings = naming.sizes(source, tensors)
    except KeyError as error:
        raise ValueError(f"{source} lacks tensors: {error.args[0]}") from error
    width = settings["hidden_size"]
    settings |= config_settings(source, naming.kind, files.settings)
    check_overrides(source, tower, settings, overrides)
    values = {**default_settings(naming.kind, width), **overrides, **settings}
    if "num_heads" not in values:
        raise ValueError(
            f"{source} does not tell its number of heads, and its width of {width} is of no published tower; set "
            f"model.{tower}.num_heads"
        )
    config: TextConfig | VisionConfig
    module: TextTransformer | VisionTransformer
    with on_meta():
        if tower == "text":
            config = TextConfig(**values)
            module = TextTransformer(config)
        else:
            config = VisionConfig(**values)
            module = VisionTransformer(config)

    # Read mean and standard deviation of the pixels from the files of timm or of transformers.
    preprocessing: dict[str, Any] = {}
    if tower == "vision" and files.folder is not None:
        timm = files.settings.get("pretrained_cfg")
        if isinstance(timm, dict) and {"mean", "std"} <= set(timm):
            preprocessing["image_mean"] = channels(files.folder, "mean", timm["mean"])
            preprocessing["image_std"] = channels(files.folder, "std", timm["std"])
        else:
            preprocessing |= read_normalisation(files.folder)
    return _import_tower(source, config, module, tensors, naming, preprocessing)


def _read_timm_tower(files: _TowerFiles, overrides: Values) -> TowerWeights:
    """Reads a tower that timm builds."""
    architecture = str(files.settings["architecture"])
    arguments = dict(files.settings.get("model_args") or {})
    data = timm_data_config(architecture, files.settings.get("pretrained_cfg"))

    # timm writes the image size as one number or as both sides.
    size = arguments.pop("img_size", data["input_size"][1])
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise ValueError(f"{files.name} takes images of {size} pixels; expected a square")
    config = timm_config(architecture, arguments, sides.pop())
    check_overrides(files.name, "vision", vars(config), overrides)
    with on_meta():
        module = TimmTower(config)
    try:
        tensors = module.converted(files.tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{files.name} does not fit timm's {architecture} ({error}); give its own name"
        ) from error
    rules = [("vision.model.{path}", ("{path}",))]
    naming = TowerNaming("timm", "", "", rules, (r"(head|head_dist|pre_logits)\..*",))
    preprocessing = {
        "profile": "official-finetune" if data["crop_mode"] == "squash" else "official-pretrain",
        "image_mean": tuple(data["mean"]),
        "image_std": tuple(data["std"]),
        "interpolation": data["interpolation"],
    }
    return _import_tower(files.name, config, module, tensors, naming, preprocessing)


def _import_tower(
    source: str,
    config: Any,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    naming: TowerNaming,
    preprocessing: Values,
) -> TowerWeights:
    shapes = {
        f"{naming.tower}.{name}": tensor.shape for name, tensor in module.state_dict().items()
    }
    table = naming.table(shapes)
    if dropped := check_sources(source, shapes, tensors, table, naming.droppable):
        logger.info("%s: not used: %s", source, ", ".join(dropped))
    imported = import_tensors(table, tensors, torch.float32)
    check_finite(source, imported)
    return TowerWeights(source=source, config=config, tensors=imported, preprocessing=preprocessing)


def check_overrides(source: str, tower: str, settings: Values, overrides: Values) -> None:
    """Raises ValueError, with a list, if a run's settings contradict those of a tower."""
    wrong = [
        f"model.{tower}.{name} {value!r} (it has {settings[name]!r})"
        for name, value in overrides.items()
        if name in settings and settings[name] != value
    ]
    if wrong:
        raise ValueError(
            f"{tower} {source} contradicts the run's settings: {', '.join(wrong)}; leave them out, or give another "
            "tower"
        )
