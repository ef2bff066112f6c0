"""RandAugment as the official code used it: a few random changes of an image, all of one strength."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from bridgetower.data.config import RandAugment

NUM_OPS = 2

_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@dataclass(frozen=True)
class Policy:
    """What may happen to an image.

    Attributes:
        ops: Value of each change at magnitude 0 and at the highest.
        highest: Magnitude.
        probability: Of each drawn change to be made.
        fill: Grey level of what comes into the image from outside.
    """

    ops: Mapping[str, tuple[float, float]]
    highest: int
    probability: float
    fill: int


_ENHANCE = (0.1, 1.9)
_GEOMETRY = {"rotate": (0.0, 30.0), "shear_x": (0.0, 0.3), "shear_y": (0.0, 0.3)}
_NOTHING = (0.0, 0.0)

POLICIES: Mapping[RandAugment, Policy] = {
    # Official `blip_randaug` and `blip_randaug_wohf`, after BLIP's transform/randaugment.py.
    "geometry": Policy(
        {
            "identity": _NOTHING,
            "autocontrast": _NOTHING,
            "equalize": _NOTHING,
            "brightness": _ENHANCE,
            "sharpness": _ENHANCE,
            **_GEOMETRY,
            "translate_x": (0.0, 10.0),
            "translate_y": (0.0, 10.0),
        },
        highest=10,
        probability=0.5,
        fill=128,
    ),
    # Official `blip_randaug_wc` and `clip_randaug`, after ViLT's transforms/randaug.py.
    "colour": Policy(
        {
            "autocontrast": _NOTHING,
            "equalize": _NOTHING,
            "posterize": (0.0, 4.0),
            "solarize": (0.0, 256.0),
            "solarize_add": (0.0, 110.0),
            "colour": _ENHANCE,
            "contrast": _ENHANCE,
            "brightness": _ENHANCE,
            "sharpness": _ENHANCE,
            **_GEOMETRY,
            "translate_x": (0.0, 100.0),
            "translate_y": (0.0, 100.0),
        },
        highest=30,
        probability=1.0,
        fill=0,
    ),
}


def rand_augment(image: Image.Image, kind: RandAugment, magnitude: int, generator: torch.Generator) -> Image.Image:
    """Returns an image after two drawn changes; `none` returns it as it is.

    Args:
        image: RGB.
        kind: Which changes there are.
        magnitude: Their strength, of 10 for `geometry` and of 30 for `colour`.
        generator: Source of all draws.
    """
    if kind == "none":
        return image
    policy = POLICIES[kind]
    names = list(policy.ops)
    for choice in torch.randint(len(names), (NUM_OPS,), generator=generator).tolist():
        made, sign = torch.rand(2, generator=generator).tolist()
        if made < policy.probability:
            name = names[choice]
            low, high = policy.ops[name]
            value = low + (high - low) * magnitude / policy.highest
            image = change(image, name, -value if name in _SIGNED and sign < 0.5 else value, policy.fill)
    return image


def change(image: Image.Image, name: str, value: float, fill: int) -> Image.Image:
    """Returns an image after one change.

    Args:
        image: RGB.
        name: One of the names in `POLICIES`.
        value: Degrees, pixels, a shear factor, an enhancement factor (1 changes nothing), bits or a grey level.
        fill: Grey level of what comes in from outside.
    """
    match name:
        case "identity":
            return image
        case "autocontrast":
            return functional.autocontrast(image)
        case "equalize":
            return functional.equalize(image)
        case "posterize":
            return functional.posterize(image, max(int(value), 1))
        case "solarize":
            return functional.solarize(image, value)
        case "solarize_add":
            return functional.solarize(image.point([min(level + int(value), 255) for level in range(256)] * 3), 128)
        case "colour":
            return functional.adjust_saturation(image, value)
        case "contrast":
            return functional.adjust_contrast(image, value)
        case "brightness":
            return functional.adjust_brightness(image, value)
        case "sharpness":
            return functional.adjust_sharpness(image, value)
        case "rotate":
            return functional.rotate(image, value, fill=[fill])
        case "shear_x" | "shear_y":
            degrees = math.degrees(math.atan(value))
            shear = [degrees, 0.0] if name == "shear_x" else [0.0, degrees]
            return _moved(image, fill, shear=shear)
        case "translate_x" | "translate_y":
            pixels = round(value)
            return _moved(image, fill, translate=[pixels, 0] if name == "translate_x" else [0, pixels])
    raise ValueError(f"there is no change {name!r} of an image")


def _moved(
    image: Image.Image, fill: int, *, shear: list[float] | None = None, translate: list[int] | None = None
) -> Image.Image:
    moved: Image.Image = functional.affine(
        image,
        angle=0.0,
        translate=translate or [0, 0],
        scale=1.0,
        shear=shear or [0.0, 0.0],
        fill=[fill],
        center=[0.0, 0.0],
    )
    return moved
