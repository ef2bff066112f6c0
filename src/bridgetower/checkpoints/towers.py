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
from bridgetower.checkpoints.hub import download, parse_hub_id
from bridgetower.checkpoints.keymap import (
    MODEL_TYPES,
    TowerNaming,
    Values,
    import_tensors,
    normalisation,
    recognise,
    rule_table,
    text_settings,
    vision_settings,
)
from bridgetower.checkpoints.tensors import extent, only_tensors, read_safetensors, read_torch_archive, read_weights
from bridgetower.files import read_json
from bridgetower.model.layers import on_meta
from bridgetower.model.library_towers import (
    TimmTower,
    read_transformers,
    timm_config,
    timm_data_config,
    timm_hub_id,
    transformers_tokenizer,
)
from bridgetower.model.tower_config import TextConfig, VisionConfig
from bridgetower.model.towers import TextTransformer, VisionTransformer
from bridgetower.processor import load_tokenizer
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
    """A published tower.

    Attributes:
        source: Where it came from; a hub id carries its commit, `id@commit`.
        config: Its architecture, a `VisionConfig` for the image size that it was trained at, or a `TextConfig`.
        tensors: The parameters `vision.*` or `text.*` of a model with this tower, in float32.
        preprocessing: Fields of `ProcessorConfig` that an image tower was trained with, as far as its files tell them.
        tokenizer: Of the folder of a text tower; None if there is none.
    """

    source: str
    config: Any
    tensors: dict[str, Tensor]
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    def resized(self, image_size: int) -> TowerWeights:
        """Returns an image tower for square images of another size: position embeddings are interpolated."""
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
    """Reads an image tower, recognised by the names of its tensors."""
    if source.startswith(TIMM):
        return _timm_tower(_open_timm(source.removeprefix(TIMM)), overrides or {})
    found = _open(source.removeprefix(HF))
    if not isinstance(found.settings.get("architecture"), str):
        return _bridgetower_vision_tower(found, overrides or {})
    try:
        return _bridgetower_vision_tower(found, overrides or {})
    except ValueError as error:  # timm has more kinds of layers than the towers of this package
        logger.info("%s: built by timm (%s)", found.name, error)
    return _timm_tower(found, overrides or {})


def read_text_tower(source: str, overrides: Values | None = None) -> TowerWeights:
    """Reads a text tower and its tokenizer, recognised by the names of its tensors."""
    if source.startswith(TIMM):
        raise ValueError(f"{source} is of timm, which has image towers only; give a text encoder, such as hf:NAME")
    found = _open(source.removeprefix(HF))
    kind = found.settings.get("model_type")
    of_library = found.folder is not None and isinstance(kind, str) and kind not in MODEL_TYPES["bert"]
    if found.folder is not None and of_library:
        config, loaded = read_transformers(found.folder)
        tensors = {f"text.{name}": tensor for name, tensor in loaded.items()}
        check_overrides(found.name, "text", vars(config), overrides or {})
    else:
        found, naming = _recognised(found, "text")
        words, positions = "text.word_embedding.weight", "text.position_embedding.weight"
        from_weights: dict[str, Any] = {
            "vocab_size": _extent(found, naming, words),
            "hidden_size": _extent(found, naming, words, -1),
            **_sizes(found, naming),
            "max_positions": _extent(found, naming, positions),
            "type_vocab_size": _extent(found, naming, "text.token_type_embedding.weight"),
        }
        from_weights |= text_settings(found.name, found.settings)
        config = TextConfig(**_settle(found.name, "text", from_weights, {}, overrides or {}))
        tensors = _collect(found, naming, TextTransformer, config)
    return TowerWeights(
        source=found.name,
        config=config,
        tensors=finite(found.name, tensors),
        tokenizer=None if found.folder is None else _tokenizer(found.folder, of_library),
    )


def _tokenizer(folder: Path, of_library: bool) -> Tokenizer | None:
    file = find_tokenizer(folder)
    if file is not None and (file.name == "tokenizer.json" or not of_library):
        return load_tokenizer(file)
    with tokenizers_errors(f"transformers cannot read the tokenizer in {folder}"):
        return transformers_tokenizer(folder)


def _bridgetower_vision_tower(found: _Found, overrides: Values) -> TowerWeights:
    found, naming = _recognised(found, "vision")
    config = _vision_config(found, naming, overrides)
    pixels = None if found.folder is None else normalisation(found.folder, found.settings)
    return TowerWeights(
        source=found.name,
        config=config,
        tensors=_collect(found, naming, VisionTransformer, config),
        preprocessing={} if pixels is None else {"image_mean": pixels[0], "image_std": pixels[1]},
    )


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
        raise ValueError(f"{found.name} does not fit timm's {architecture} ({error}); give its own name") from error
    shapes = {f"vision.{name}": tensor.shape for name, tensor in tower.state_dict().items()}
    table = rule_table(shapes, [(r"vision\.model\.(.+)", ("{0}",))], {}, {})
    check_sources(found.name, shapes, tensors, table, (r"(head|head_dist|pre_logits)\..*",))
    return TowerWeights(
        source=found.name,
        config=config,
        tensors=finite(found.name, import_tensors(table, tensors, torch.float32)),
        preprocessing={
            "profile": "official-finetune" if data["crop_mode"] == "squash" else "official-pretrain",
            "image_mean": tuple(data["mean"]),
            "image_std": tuple(data["std"]),
            "interpolation": data["interpolation"],
        },
    )


def _open_timm(name: str) -> _Found:
    """Opens `NAME=FILE`, a folder, a hub id, or the hub's weights of a name of timm."""
    architecture, given, file = name.partition("=")
    if given:
        return replace(_open(file), settings={"architecture": architecture})
    bare, at, revision = name.partition("@")
    found = _open(name if "/" in name or Path(name).is_dir() else f"{timm_hub_id(bare)}{at}{revision}")
    if not isinstance(found.settings.get("architecture"), str):
        raise ValueError(f"{found.name} has no config.json of timm with its architecture; give timm:NAME=FILE")
    return found


def _recognised(found: _Found, part: Literal["vision", "text"]) -> tuple[_Found, TowerNaming]:
    naming = recognise(found.tensors, part)
    if naming is None:
        start = ", ".join(sorted(found.tensors)[:3])
        raise ValueError(f"{found.name} holds no known {part} tower ({start}, …); expected {_EXPECTED[part]}")
    if naming.kind == "bert":  # older files name the parameters of LayerNorms after the paper
        modern = {
            name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): tensor
            for name, tensor in found.tensors.items()
        }
        found = replace(found, tensors=modern)
    return found, naming


def _open(source: str) -> _Found:
    path = Path(source)
    if path.is_file():
        if path.suffix == ".safetensors":
            return _Found(source, read_safetensors(path), {}, None)
        content = read_torch_archive(path)
        wrapped = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)
        return _Found(source, only_tensors(source, wrapped), {}, None)
    if path.is_dir():
        folder, name = path, source
    elif (hub_id := parse_hub_id(source)) and hub_id[1] is None:
        repo, _, revision = hub_id
        folder, commit = download(repo, revision)
        name = f"{repo}@{commit}"
        if revision != commit:
            logger.warning("%s is at commit %s; %s pins it", source, commit, name)
    else:
        raise FileNotFoundError(f"{source} does not exist; expected a file with weights, a folder or a hub id")
    config = folder / "config.json"
    return _Found(name, read_weights(folder, name), read_json(config) if config.exists() else {}, folder)


def _vision_config(found: _Found, naming: TowerNaming, overrides: Values) -> VisionConfig:
    patches = "vision.patch_embedding.weight"
    width, patch = _extent(found, naming, patches), _extent(found, naming, patches, -1)
    clip = naming.kind in ("openai", "clip")
    distilled = not clip and naming.find(found.tensors, "vision.distillation_embedding") is not None
    num_patches = _extent(found, naming, "vision.position_embedding", -2) - 1 - distilled
    side = round(max(num_patches, 0) ** 0.5)
    if side**2 != num_patches or not side:
        raise ValueError(f"{found.name} has positions for {num_patches} patches; expected a square number")
    from_weights: dict[str, Any] = {
        "patch_size": patch,
        "hidden_size": width,
        **_sizes(found, naming),
        "pre_norm": clip,
        "patch_bias": not clip,
        "distillation_token": distilled,
    }
    from_config, defaults = vision_settings(found.name, naming.kind, found.settings, width)
    return VisionConfig(
        image_size=side * patch, **_settle(found.name, "vision", {**from_weights, **from_config}, defaults, overrides)
    )


def _sizes(found: _Found, naming: TowerNaming) -> dict[str, int]:
    depth = 0
    while naming.find(found.tensors, f"{naming.part}.layers.{depth}.mlp.up.weight") is not None:
        depth += 1
    return {
        "num_layers": depth,
        "intermediate_size": _extent(found, naming, f"{naming.part}.layers.0.mlp.up.weight"),
    }


def _extent(found: _Found, naming: TowerNaming, name: str, axis: int = 0) -> int:
    tensor = naming.find(found.tensors, name)
    if tensor is None:
        raise ValueError(f"{found.name} lacks tensors: {naming.table([name])[name].names[0]}")
    return extent({name: tensor}, name, axis)


def _settle(source: str, part: str, from_weights: Values, defaults: Values, overrides: Values) -> dict[str, Any]:
    """Joins fields from the files, defaults for others, and overrides, which must not contradict the files."""
    check_overrides(source, part, from_weights, overrides)
    values = {**defaults, **overrides, **from_weights}
    if "num_heads" not in values:
        raise ValueError(
            f"{source} does not tell its number of heads, and its width of {from_weights['hidden_size']} is of no "
            f"published tower; set model.{part}.num_heads"
        )
    return values


def check_overrides(source: str, part: str, decided: Values, overrides: Values) -> None:
    """Checks that nothing is set otherwise than a tower has it."""
    wrong = [
        f"model.{part}.{name} {value!r} (it has {decided[name]!r})"
        for name, value in overrides.items()
        if name in decided and decided[name] != value
    ]
    if wrong:
        raise ValueError(
            f"{part} {source} contradicts the run's settings: {', '.join(wrong)}; leave them out, or give another tower"
        )


def _collect(
    found: _Found, naming: TowerNaming, build: type[nn.Module], config: VisionConfig | TextConfig
) -> dict[str, Tensor]:
    with on_meta():
        parameters = build(config).state_dict()
    shapes = {f"{naming.part}.{name}": tensor.shape for name, tensor in parameters.items()}
    table = naming.table(shapes)
    dropped = check_sources(found.name, shapes, found.tensors, table, naming.droppable)
    if dropped:
        logger.info("%s: not used: %s", found.name, ", ".join(dropped))
    return finite(found.name, import_tensors(table, found.tensors, torch.float32))
