"""Opens pictures of any kind as upright RGB, or says what is wrong with them."""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Resized:
    """A picture from `Processor.prepare`, such as another process has opened; it counts as an image everywhere.

    Attributes:
        pixels: At the model's size.
        width: Of the upright picture that it was, in pixels.
        height: Of the same.
    """

    pixels: UInt8[Tensor, "3 h w"] = field(repr=False)
    width: int
    height: int


ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor | Resized
"""A path, the bytes of an image file, a PIL image, a uint8 array [H, W] or [H, W, 1|3|4], a tensor [1|3|4, H, W], or
a picture that is at the model's size already."""

Colour: TypeAlias = tuple[int, int, int]

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded by default: 192 MB as RGB."""

# Raster formats only: PIL would also hand EPS files, which are programs, to Ghostscript.
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

# What PIL's decoders raise on damaged content, found by cutting and altering files of each format.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error)

_UINT16_MAX = 65535

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def open_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS, background: Colour | None = None) -> Image.Image:
    """Decodes a picture to RGB with its EXIF orientation applied.

    Grey of 16 bit is scaled to 8 bit by 1/257 (PIL alone would clip it to white), CMYK goes through PIL's conversion,
    of an animation the first frame is taken (of an open PIL image, the current one). Unreadable EXIF means upright.

    Args:
        source: What to open. For arrays and tensors 0 is black and 255 white.
        max_pixels: Files and bytes with more pixels are refused before they are decoded.
        background: Colour under transparent pixels; None drops the alpha channel and shows the colour stored there, as
            the official code's `convert("RGB")` does.

    Returns:
        A new image of mode RGB.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, cut off, damaged, too large, not an image, or an array of another type or shape.
    """
    return open_reduced(source, None, max_pixels=max_pixels, background=background)[0]


def open_reduced(
    source: ImageLike, side: int | None, *, max_pixels: int = MAX_PIXELS, background: Colour | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Decodes a picture as `open_image` does, but a JPEG at the least scale of 1/8, 1/4 and 1/2 that is large enough.

    libjpeg then computes fewer coefficients of each block, which is a multiple faster.

    Args:
        source: What to open.
        side: Pixels that the shorter side keeps at least, if it has as many; None decodes everything in full.
        max_pixels: Of the full picture.
        background: Colour under transparent pixels.

    Returns:
        A new image of mode RGB, and width and height of the full picture, upright.

    Raises:
        FileNotFoundError: As `open_image`.
        ValueError: As `open_image`.
    """
    if isinstance(source, bytes):
        name = f"the {len(source)} image bytes"
        return _decode(io.BytesIO(source), name, len(source), max_pixels, background, side)
    if isinstance(source, (str, os.PathLike)):
        return _open_file(Path(source), max_pixels, background, side)
    opened = _open_object(source, background)
    return opened, opened.size


def media_type(content: bytes) -> str:
    """Returns the media type of an image's file, such as `image/png`; only the head of the file is read.

    Raises:
        ValueError: It is none that `open_image` reads.
    """
    Image.init()
    try:
        with Image.open(io.BytesIO(content), formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
            return image.get_format_mimetype() or "image/unknown"
    except (UnidentifiedImageError, Image.DecompressionBombError, *_DECODE_ERRORS) as error:
        raise ValueError(f"the file is no image; expected one of {', '.join(_FORMATS)}") from error


def _open_object(source: ImageLike, background: Colour | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the PIL image", background)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), background)
    if isinstance(source, Tensor):
        return _to_rgb(_from_tensor(source), background)
    raise ValueError(
        f"an image is given as {type(source).__name__}; expected a path, bytes, a PIL image, a uint8 array or tensor"
    )


def _open_file(
    path: Path, max_pixels: int, background: Colour | None, side: int | None
) -> tuple[Image.Image, tuple[int, int]]:
    if not path.exists():
        raise FileNotFoundError(f"no image file at {path}; check the path")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of one image")
    with path.open("rb") as stream:
        return _decode(stream, str(path), path.stat().st_size, max_pixels, background, side)


def _decode(
    stream: IO[bytes], name: str, size: int, max_pixels: int, background: Colour | None, side: int | None
) -> tuple[Image.Image, tuple[int, int]]:
    if size == 0:
        raise ValueError(f"{name} is empty (0 bytes); fetch the picture again")
    try:
        Image.init()  # Image.open(formats=…) fails on names without a loaded plugin; AVIF came with Pillow 11.3.
        image = Image.open(stream, formats=[name for name in _FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be read as an image; expected one of {', '.join(_FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} exceeds the limit of {max_pixels} pixels: {error}; shrink it first") from error
    except _DECODE_ERRORS as error:
        raise ValueError(f"{name} is damaged ({error}); fetch the picture again") from error
    with image:
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise ValueError(
                f"{name} has {image.width}x{image.height} = {pixels} pixels, the limit is {max_pixels}; "
                "shrink it first, or open it with open_image(..., max_pixels=...)"
            )
        full = image.size
        if side is not None:
            image.draft(None, (side, side))  # does nothing but for JPEG
        upright = _upright_rgb(image, name, background)
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return upright, (full[1], full[0]) if turned else full


def _upright_rgb(image: Image.Image, name: str, background: Colour | None) -> Image.Image:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so cut-off files would end in grey; set it to False"
        )
    try:
        upright = ImageOps.exif_transpose(image)  # A copy; files are decoded here.
    except _DECODE_ERRORS as error:
        raise ValueError(f"{name} is cut off or damaged ({error}); fetch the picture again") from error
    return _to_rgb(upright, background)


def _to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _reduce_depth(image)
    elif image.mode in ("F", "LAB"):
        raise ValueError(f"an image of mode {image.mode} has no fixed range or colours; save it as 8-bit RGB or grey")
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = image.convert("RGBA")
    if background is not None:
        opaque = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), opaque)
    return opaque.convert("RGB")


def _reduce_depth(image: Image.Image) -> Image.Image:
    """Scales grey of 16 bit to 8 bit, rounding v / 257; a colour marked as transparent becomes an alpha channel."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _UINT16_MAX:
        raise ValueError(
            f"a grey image has values from {values.min()} to {values.max()}; expected 16 bit, 0 to {_UINT16_MAX}"
        )
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"an image array is {array.dtype} of shape {list(array.shape)}; "
            "expected uint8 (0-255) of shape [H, W] or [H, W, 1, 3 or 4]"
        )
    return Image.fromarray(np.ascontiguousarray(array.squeeze(2) if channels == 1 and array.ndim == 3 else array))


def _from_tensor(tensor: Tensor) -> Image.Image:
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if dtype != "uint8" or len(shape) != 3 or shape[0] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"an image tensor is {dtype} of shape {shape}; expected uint8 (0-255) of shape [1, 3 or 4, H, W]"
        )
    return _from_array(tensor.detach().cpu().permute(1, 2, 0).numpy())
