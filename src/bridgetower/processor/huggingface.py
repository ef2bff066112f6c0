"""Translates preprocessing from and to the files of transformers, and refuses settings that it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bridgetower.files import differences, read_json
from bridgetower.processor.config import (
    CLIP_MEAN,
    CLIP_STD,
    Interpolation,
    ProcessorConfig,
    Profile,
)
from bridgetower.processor.text import SpecialTokens

BRIDGETOWER_TYPES = ("BridgeTowerImageProcessor", "BridgeTowerImageProcessorFast")
CLIP_TYPES = ("CLIPImageProcessor", "CLIPImageProcessorFast")

_WHITE = (255, 255, 255)

# Settings with the only value that this package carries out, which is also the default.
_FIXED: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "default_to_square": False,
    "data_format": "channels_first",
}
# By PIL's numbers.
_INTERPOLATIONS: dict[Any, Interpolation] = {3: "bicubic", 2: "bilinear"}
_KNOWN = (
    "resample",
    "size",
    "crop_size",
    "size_divisor",
    "image_mean",
    "image_std",
    "do_center_crop",
    "do_convert_rgb",
    "do_pad",
    # Names and hardware, which do not change a pixel.
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_valid_processor_keys",
    "return_tensors",
    "disable_grouping",
    "device",
)


def read_config(folder: Path, *, patch_size: int, max_length: int | None = None) -> ProcessorConfig:
    """Reads the image settings of a transformers folder.

    `BridgeTowerImageProcessor` becomes profile `hf`. Without a `crop_size` the crop is `size.shortest_edge`, as in
    transformers when the checkpoints were published; the default of 288 in 5.24 does not fit those of 294 px.
    `CLIPImageProcessor`, which `image_settings` writes for the official profiles, becomes the official profile again.
    """
    path, values = _read_image_settings(folder)
    if max_length is None:
        # Positions of RoBERTa and BERT, for folders that name no limit (or transformers' 1e30).
        max_length = 512
        file = folder / "tokenizer_config.json"
        limit = read_json(file).get("model_max_length") if file.is_file() else None
        if limit is not None and type(limit) not in (int, float):
            raise ValueError(f"{file} sets model_max_length to {limit!r}; expected a whole number")
        if limit is not None and limit < 1_000_000:
            max_length = limit
    return _read_values(path, values, patch_size, max_length)


def _read_values(
    path: Path, values: Mapping[str, Any], patch_size: int | None, max_length: int
) -> ProcessorConfig:
    # Refuse settings that this package does not carry out.
    settings = {name: value for name, value in values.items() if value is not None}
    for name, value in settings.items():
        if name in _FIXED and value != _FIXED[name]:
            raise ValueError(
                f"{path} sets {name} to {value!r}; this package carries out {_FIXED[name]!r} only"
            )
        if name not in _FIXED and name not in _KNOWN:
            raise ValueError(
                f"{path} sets {name} to {value!r}, which this package does not know; remove it if unused"
            )
    kind = settings.get("image_processor_type", BRIDGETOWER_TYPES[0])
    if kind not in BRIDGETOWER_TYPES + CLIP_TYPES:
        raise ValueError(
            f"{path} is for {kind}; expected one of {', '.join(BRIDGETOWER_TYPES + CLIP_TYPES)}"
        )
    resample = settings.get("resample", 3)
    if type(resample) is not int or resample not in _INTERPOLATIONS:
        raise ValueError(
            f"{path} sets resample to {resample!r}; expected 3 (bicubic) or 2 (bilinear)"
        )

    # Sizes depend on the profile.
    is_clip = kind in CLIP_TYPES
    default_size = 224 if is_clip else 288
    edge = _side(path, "size", settings.get("size", default_size))
    image_size = edge
    profile: Profile = "hf"
    if is_clip:
        profile = _clip_profile(path, settings)
    elif settings.get("do_center_crop", True) is not True:
        raise ValueError(
            f"{path} sets do_center_crop to false; the model needs one size, so expected true"
        )
    else:
        # do_pad fills a batch up to its largest image. All are equal after the crop, so it has no effect.
        image_size = _side(path, "crop_size", settings.get("crop_size", edge))
    return ProcessorConfig(
        profile=profile,
        image_size=image_size,
        shortest_edge=None if edge == image_size else edge,
        size_divisor=settings.get("size_divisor"),
        interpolation=_INTERPOLATIONS[resample],
        max_length=max_length,
        image_mean=channels(path, "image_mean", settings.get("image_mean", CLIP_MEAN)),
        image_std=channels(path, "image_std", settings.get("image_std", CLIP_STD)),
        patch_size=patch_size,
        background=_WHITE if settings.get("do_convert_rgb", is_clip) else None,
    )


def _clip_profile(path: Path, settings: Mapping[str, Any]) -> Profile:
    if settings.get("do_pad") or "size_divisor" in settings:
        raise ValueError(
            f"{path} sets do_pad or size_divisor, which a CLIPImageProcessor does not carry out here"
        )
    size = settings.get("size", {"shortest_edge": 224})
    edge = _side(path, "size", size)
    squashes = isinstance(size, dict) and "height" in size
    crops = settings.get("do_center_crop", True)
    crop = edge
    if crops:
        crop = _side(path, "crop_size", settings.get("crop_size", 224))
    if crop != edge or not (crops or squashes):
        raise ValueError(
            f"{path} resizes to {size} and crops {crop if crops else 'nothing'}; expected a crop equal to the "
            "shortest_edge (official-pretrain) or to height and width (official-finetune)"
        )
    return "official-finetune" if squashes else "official-pretrain"


def read_normalisation(folder: Path) -> dict[str, Any]:
    """Returns `image_mean` and `image_std` of any image processor of transformers, or nothing without one."""
    files = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).is_file() for name in files):
        return {}
    path, values = _read_image_settings(folder)
    names = ("image_mean", "image_std")
    if not values.keys() >= set(names):
        return {}
    return {name: channels(path, name, values[name]) for name in names}


def image_settings(config: ProcessorConfig) -> dict[str, Any]:
    """Describes the image side for transformers' `preprocessor_config.json`.

    Profile `hf` is exact. For the official profiles transformers has only `CLIPImageProcessor`, which scales tensors
    where the official code scales PIL images. Settings that another config would be read from are refused.
    """
    square = {"height": config.image_size, "width": config.image_size}
    sizes: dict[Profile, dict[str, Any]] = {
        "hf": {
            "do_pad": True,
            "size": {"shortest_edge": config.resize_edge},
            "crop_size": {"shortest_edge": config.image_size},
            "size_divisor": config.resize_divisor,
        },
        "official-pretrain": {"size": {"shortest_edge": config.image_size}, "crop_size": square},
        "official-finetune": {"size": square, "crop_size": square},
    }
    types = BRIDGETOWER_TYPES if config.profile == "hf" else CLIP_TYPES
    numbers = {name: number for number, name in _INTERPOLATIONS.items()}
    settings = {
        "processor_class": "BridgeTowerProcessor",
        "image_processor_type": types[0],
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "resample": numbers[config.interpolation],
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "do_convert_rgb": config.background is not None,
        # transformers' BridgeTowerProcessor crops whatever the file says; a square of its own size stays as it is.
        "do_center_crop": True,
        **sizes[config.profile],
    }

    # Refuse settings from which another config would be read.
    path = Path("preprocessor_config.json")
    read_back = _read_values(path, settings, config.patch_size, config.max_length)
    differing = differences(_comparable(read_back), _comparable(config))
    changes = [f"{name} is {ours!r}, there {theirs!r}" for name, theirs, ours in differing]
    if changes:
        raise ValueError(
            f"transformers cannot prepare images so: {'; '.join(changes)}; change the config with "
            "dataclasses.replace, or keep the model as a folder of this package"
        )
    return settings


def _comparable(config: ProcessorConfig) -> dict[str, Any]:
    """Returns the fields of a config, with one spelling for values that mean the same."""
    values = asdict(config)
    values["shortest_edge"] = config.resize_edge
    values["size_divisor"] = config.resize_divisor
    # `Processor.save_huggingface` warns that it is lost.
    del values["fast_decode"]
    return values


def tokenizer_settings(special: SpecialTokens[str], max_length: int) -> dict[str, Any]:
    """Describes the text side for `tokenizer_config.json`, so that transformers takes `tokenizer.json` as it stands."""
    roles = {f"{role}_token": token for role, token in special._asdict().items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "BridgeTowerProcessor",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "cls_token": special.bos,
        "sep_token": special.eos,
        **roles,
    }


def _read_image_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    nested = folder / "processor_config.json"
    plain = folder / "preprocessor_config.json"
    if nested.is_file():
        settings = read_json(nested).get("image_processor")
        if isinstance(settings, dict):
            return nested, settings
    if not plain.is_file():
        raise FileNotFoundError(
            f"{folder} has no image settings; expected {plain.name} or {nested.name}"
        )
    return plain, read_json(plain)


def _side(path: Path, name: str, value: Any) -> int:
    sides = value if isinstance(value, dict) else {"shortest_edge": value}
    are_integers = all(type(side) is int for side in sides.values())
    if are_integers and sides.keys() in ({"shortest_edge"}, {"height", "width"}):
        side, *other_sides = set(sides.values())
        if not other_sides:
            return int(side)
    raise ValueError(
        f"{path} sets {name} to {value!r}; expected one whole number, such as {{'shortest_edge': 288}}"
    )


def channels(path: Path, name: str, value: Any) -> tuple[float, float, float]:
    has_three = isinstance(value, list | tuple) and len(value) == 3
    if not has_three or not all(
        type(number) in (int, float) and abs(number) < 1e9 for number in value
    ):
        raise ValueError(f"{path} sets {name} to {value!r}; expected three numbers")
    red, green, blue = map(float, value)
    return red, green, blue
