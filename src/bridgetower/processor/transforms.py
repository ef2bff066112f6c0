"""From an RGB image to the tensor that the model receives, as each source of checkpoints does it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from bridgetower.processor.config import ProcessorConfig
from bridgetower.processor.images import MAX_PIXELS

# transformers, BridgeTowerImageProcessor.resize: the long side of an image whose short side is 800 stays below 1333.
_LONG_SIDE = 1333 / 800


def resize(image: Image.Image, config: ProcessorConfig) -> UInt8[Tensor, "3 h w"]:
    """Brings an RGB image to `config.image_size` squared, by the config's profile."""
    match config.profile:
        case "official-pretrain":
            return _scale_and_crop(image, config)
        case "official-finetune":
            return _squash(image, config)
        case "hf":
            return _scale_and_letterbox(image, config)


def to_tensor(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """Returns the pixels of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalise(pixels: UInt8[Tensor, "b 3 h w"], config: ProcessorConfig) -> Float[Tensor, "b 3 h w"]:
    """Maps 0..255 to (v/255 - mean) / std, on the device of `pixels`.

    The factor 255 sits in mean and std, as in transformers (equal bit for bit; the official order differs by rounding).
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels are {pixels.dtype} of shape {list(pixels.shape)}; expected uint8 [batch, 3, h, w]")
    mean, std = (
        (torch.tensor(values) * 255.0)[:, None, None].to(pixels.device, non_blocking=True)
        for values in (config.image_mean, config.image_std)
    )
    return pixels.to(torch.float32).sub_(mean).div_(std)


def _scale_and_crop(image: Image.Image, config: ProcessorConfig) -> UInt8[Tensor, "3 h w"]:
    """Official src/transforms/transform.py, `clip_transform`: PIL bicubic on the short side, then the centre."""
    size = config.image_size
    long_side = max(image.size) * size // min(image.size)
    if long_side * size > MAX_PIXELS:
        raise ValueError(
            f"an image of {image.width}x{image.height} is too elongated: with a short side of {size} px it would have "
            f"{long_side * size} pixels, the limit is {MAX_PIXELS}; crop it first"
        )
    width, height = (size, long_side) if image.width < image.height else (long_side, size)
    left, top = round((width - size) / 2), round((height - size) / 2)  # half to even, as torchvision's `CenterCrop`
    return to_tensor(_resized(image, width, height, config).crop((left, top, left + size, top + size)))


def _squash(image: Image.Image, config: ProcessorConfig) -> UInt8[Tensor, "3 h w"]:
    """Official src/transforms/transform.py, `blip_transform`: PIL bicubic straight to the square."""
    return to_tensor(_resized(image, config.image_size, config.image_size, config))


def _resized(image: Image.Image, width: int, height: int, config: ProcessorConfig) -> Image.Image:
    """PIL's resizing with the passes in the order of Pillow 13, whatever release is installed.

    Each pass rounds to 8 bit, so their order moves about a quarter of the values by a level or more. Pillow 13 begins
    vertically where the height loses more than twice as many pixels as the width; earlier releases always begin
    horizontally. The golden data is Pillow 13's.
    """
    vertical_first = image.height - height > max(0, 2 * (image.width - width))
    between = (image.width, height) if vertical_first else (width, image.height)
    kernel = Image.Resampling[config.interpolation.upper()]
    return image.resize(between, kernel).resize((width, height), kernel)


def _scale_and_letterbox(image: Image.Image, config: ProcessorConfig) -> UInt8[Tensor, "3 h w"]:
    """As transformers' torchvision backend: bicubic on the uint8 tensor (PIL differs by a level here and there)."""
    height, width = _hf_size(image.height, image.width, config.resize_edge, config.resize_divisor)
    if min(height, width) == 0:
        raise ValueError(
            f"an image of {image.width}x{image.height} is too elongated for profile 'hf': its short side shrinks below "
            f"{config.resize_divisor} px and is cut to 0; crop it first or use profile 'official-pretrain'"
        )
    scaled = F.interpolate(to_tensor(image)[None], (height, width), mode=config.interpolation, antialias=True)
    return _centre(scaled[0], config.image_size)


def _hf_size(height: int, width: int, edge: int, divisor: int) -> tuple[int, int]:
    """Height and width with the short side at `edge`, the long side limited, both cut to multiples of `divisor`."""
    scale = edge / min(height, width)
    exact = (edge, scale * width) if height < width else (scale * height, edge)
    shrink = min(1.0, int(_LONG_SIDE * edge) / max(exact))
    rows, columns = (int(shrink * side + 0.5) // divisor * divisor for side in exact)
    return rows, columns


def _centre(image: UInt8[Tensor, "3 h w"], size: int) -> UInt8[Tensor, "3 s s"]:
    """Cuts or fills with black to `size` squared; odd differences leave the smaller part left and above.

    torchvision's own `center_crop` rounds half to even, which is one pixel off for some odd differences.
    """
    height, width = image.shape[-2:]
    missing_rows, missing_columns = max(size - height, 0), max(size - width, 0)
    left, top = missing_columns // 2, missing_rows // 2
    filled = F.pad(image, [left, missing_columns - left, top, missing_rows - top])
    row, column = max(height - size, 0) // 2, max(width - size, 0) // 2
    return filled[:, row : row + size, column : column + size]
