"""What the publishers of towers say, or always do, about what tensors do not show: heads, activations, epsilons."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridgetower.checkpoints.tower_names import Kind
from bridgetower.processor.huggingface import channels, read_normalisation

Values = Mapping[str, Any]
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

# Per width, of timm's ViT and DeiT, of RoBERTa and BERT.
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}

_MODEL_TYPES: dict[Kind, tuple[str, ...]] = {
    "clip": ("clip", "clip_vision_model"),
    "vit": ("vit", "deit"),
    "bert": ("roberta", "bert"),
}


def vision_settings(source: str, kind: Kind, values: Values, width: int) -> tuple[Values, Values]:
    """Returns fields of `VisionConfig` that are told and, apart, those that are usual where nothing is told.

    Args:
        source: Named in errors.
        kind: Of the naming.
        values: Of `config.json`; {} if there is none.
        width: Of the tower.

    Raises:
        ValueError: transformers' config is missing, of another model, or asks for what is not supported.
    """
    if kind == "openai":  # its code takes the heads from the width
        return {}, {"num_heads": max(width // 64, 1), "activation": "quick_gelu", "layer_norm_eps": 1e-5}
    if kind == "timm":
        heads = {"num_heads": PUBLISHED_HEADS[width]} if width in PUBLISHED_HEADS else {}
        return {}, {**heads, "activation": "gelu", "layer_norm_eps": 1e-6}
    _check_model_type(source, kind, values)
    if kind == "clip":
        nested = values.get("vision_config")
        values = nested if isinstance(nested, dict) else values
        told = {"activation": values.get("hidden_act", "quick_gelu"), "layer_norm_eps": 1e-5}
        _check_value(source, "hidden_act", told["activation"], ("quick_gelu", "gelu"))
    else:
        told = {"activation": "gelu", "layer_norm_eps": 1e-12}
        _check_value(source, "hidden_act", values.get("hidden_act", "gelu"), ("gelu",))
    return told | _told(values), {}


def text_settings(source: str, values: Values) -> dict[str, Any]:
    """Returns the fields of `TextConfig` that tensors do not show, except dropout.

    Args:
        source: Named in errors.
        values: Of `config.json`; {} if there is none.

    Raises:
        ValueError: The config is missing, of another model, or asks for what is not supported.
    """
    _check_model_type(source, "bert", values)
    _check_value(source, "hidden_act", values.get("hidden_act", "gelu"), ("gelu",))
    _check_value(source, "position_embedding_type", values.get("position_embedding_type", "absolute"), ("absolute",))
    roberta = values["model_type"] == "roberta"
    told = {"positions": "roberta" if roberta else "bert", "layer_norm_eps": 1e-12}
    return told | _told(values) | {"pad_token_id": values.get("pad_token_id", 1 if roberta else 0)}


def normalisation(folder: Path, values: Values) -> Normalisation | None:
    """Returns the mean and standard deviation of pixels that a folder of transformers or timm tells.

    Raises:
        ValueError: They are not three numbers each.
    """
    timm = values.get("pretrained_cfg")
    if isinstance(timm, dict) and {"mean", "std"} <= set(timm):
        return channels(folder, "mean", timm["mean"]), channels(folder, "std", timm["std"])
    return read_normalisation(folder)


def _told(values: Values) -> dict[str, Any]:
    """Heads and epsilon of a transformers config, which may leave its defaults out."""
    told = {"num_heads": values.get("num_attention_heads", 12)}
    return told | ({"layer_norm_eps": values["layer_norm_eps"]} if "layer_norm_eps" in values else {})


def _check_model_type(source: str, kind: Kind, values: Values) -> None:
    if not values:
        raise ValueError(f"{source} comes without its config.json, which tells heads and epsilon; pass its folder")
    _check_value(source, "model_type", values.get("model_type"), _MODEL_TYPES[kind])


def _check_value(source: str, name: str, value: Any, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise ValueError(f"{source}/config.json sets {name} to {value!r}; expected {' or '.join(map(repr, expected))}")
