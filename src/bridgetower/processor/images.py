"""Opens images of any kind as upright RGB, or raises an error that describes the damage."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from bridgetower.processor import formats


@dataclass(frozen=True, kw_only=True)
class Resized:
    """An image from `Processor.prepare`, opened in another process for example; accepted wherever an image is.

    Attributes:
        pixels: At the model's size.
        width: Of the upright image that it was, in pixels.
        height: Of the same.
    """

    pixels: UInt8[Tensor, "3 h w"] = field(repr=False)
    width: int
    height: int


ImageLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray | Tensor | Resized
)
"""A path, an image file as bytes or opened (`BytesIO`), a PIL image, a uint8 array or tensor [H, W], [H, W, 1|3|4] or
[1|3|4, H, W], or an image that is at the model's size already."""

Colour: TypeAlias = tuple[int, int, int]

MAX_PIXELS = 64_000_000
"""Largest image that is decoded by default; `formats.MEMORY_PER_PIXEL` says what memory it may take: 1.5 GB."""

# What PIL's decoders raise on damaged content, found by cutting and altering files of each format.
_DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error, OverflowError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)

_BYTES_PER_PIXEL = 8  # of a file: four channels of 16 bit
_METADATA = 2**25  # bytes of a file that are no pixels
_STRIP = 2**18  # pixels that are converted at once

_UINT16_MAX = 65535

# By EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXCHANGED = (5, 6, 7, 8)  # width and height


def open_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS, background: Colour | None = None) -> Image.Image:
    """Decodes an image to RGB with its EXIF orientation applied.

    Grey of 16 bit is scaled to 8 bit by 1/257 (PIL alone would clip it to white), CMYK goes through PIL's conversion,
    of an animation the first frame is taken (of an open PIL image, the current one). Unreadable EXIF means upright.
    """
    return open_reduced(source, None, max_pixels=max_pixels, background=background)[0]


def open_reduced(
    source: ImageLike, side: int | None, *, max_pixels: int = MAX_PIXELS, background: Colour | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Decodes an image as `open_image` does, but a JPEG at the least scale of 1/8, 1/4 and 1/2 that is large enough.

    libjpeg then computes fewer coefficients of each block, which is a multiple faster.
    """
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    elif isinstance(source, BytesIO):
        source = source.getvalue()
    elif hasattr(source, "read") and hasattr(source, "seek"):
        source.seek(0)  # it may come again
        source = source.read(max_pixels * _BYTES_PER_PIXEL + _METADATA + 1)
    if isinstance(source, bytes):
        name = f"the {len(source)} image bytes"
        check_length(name, len(source), max_pixels)
        return _decode(source, name, max_pixels, background, side)
    if isinstance(source, str) and "://" in source:
        raise ValueError(
            f"{source} is a URL, which is not fetched here; give it to a method of a predictor, or its bytes"
        )
    if isinstance(source, (str, os.PathLike)):
        return _decode(_read(Path(source), max_pixels), str(source), max_pixels, background, side)
    opened = _open_object(source, background)
    return opened, opened.size


def _open_object(source: ImageLike, background: Colour | None) -> Image.Image:
    if isinstance(source, Image.Image):
        rgb = _loaded(source, "the PIL image", background)
        try:
            return _turned(rgb, source.getexif().get(ExifTags.Base.Orientation))
        except _DECODE_ERRORS:
            return rgb
    if isinstance(source, np.ndarray | Tensor):
        return _to_rgb(_from_array(source), background)
    raise ValueError(
        f"an image is given as {type(source).__name__}; expected a path, bytes, an open file, a PIL image, a "
        "uint8 array or tensor"
    )


def _read(path: Path, max_pixels: int) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"no image file at {path}; check the path")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of one image")
    check_length(str(path), path.stat().st_size, max_pixels)
    return path.read_bytes()


def check_length(name: str, length: int, max_pixels: int = MAX_PIXELS) -> None:
    """Checks the length of an image file before it is read."""
    if length == 0:
        raise ValueError(f"{name} is empty (0 bytes); fetch the image again")
    if length > (longest := max_pixels * _BYTES_PER_PIXEL + _METADATA):
        raise ValueError(
            f"{name} has {length} bytes; expected at most {longest}, which {max_pixels} pixels have uncompressed"
        )


def _decode(
    content: bytes, name: str, max_pixels: int, background: Colour | None, side: int | None
) -> tuple[Image.Image, tuple[int, int]]:
    try:
        image = formats.opened(content, max_pixels)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} {error}") from error
    except formats.TooLargeError as error:
        raise ValueError(f"{name} {error}") from error
    except _DECODE_ERRORS as error:
        raise ValueError(f"{name} is damaged ({error}); fetch the image again") from error
    width, height = image.size
    drafted = None if side is None else image.draft(None, (side, side))  # does nothing but for JPEG
    rgb = _loaded(image, name, background)
    orientation = formats.orientation(image)
    del image  # A decoder keeps more than the image.
    upright = _turned(rgb, orientation)
    if drafted is None:
        return upright, upright.size
    return upright, (width, height) if orientation not in _EXCHANGED else (height, width)


def _loaded(image: Image.Image, name: str, background: Colour | None) -> Image.Image:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so cut-off files would end in grey; set it to False"
        )
    try:
        image.load()
    except _DECODE_ERRORS as error:
        raise ValueError(f"{name} is cut off or damaged ({error}); fetch the image again") from error
    return _to_rgb(image, background)


def _turned(image: Image.Image, orientation: int | None) -> Image.Image:
    turn = None if orientation is None else _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    """Returns a new image, of which no more than a strip takes memory in another mode."""
    if 0 in image.size:
        raise ValueError(f"an image has {image.width} x {image.height} pixels; expected one at least")
    if image.mode in ("F", "LAB"):
        raise ValueError(f"an image of mode {image.mode} has no fixed range or colours; save it as 8-bit RGB or grey")
    if image.mode == "I":
        low, high = np.array(image.getextrema())
        if low < 0 or high > _UINT16_MAX:
            raise ValueError(f"a grey image has values from {low} to {high}; expected 16 bit, 0 to {_UINT16_MAX}")
    rgb = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        for left in range(0, image.width, _STRIP):
            box = (left, top, min(left + _STRIP, image.width), min(top + rows, image.height))
            rgb.paste(_strip_to_rgb(image.crop(box), background), box)
    return rgb


def _strip_to_rgb(strip: Image.Image, background: Colour | None) -> Image.Image:
    if strip.mode == "I" or strip.mode.startswith("I;16"):
        strip = _reduce_depth(strip)
    if not strip.has_transparency_data:
        return strip.convert("RGB")
    opaque = strip.convert("RGBA")
    if background is not None:
        opaque = Image.alpha_composite(Image.new("RGBA", strip.size, (*background, 255)), opaque)
    return opaque.convert("RGB")


def _reduce_depth(image: Image.Image) -> Image.Image:
    """Scales grey of 16 bit to 8 bit, rounding v / 257; a colour marked as transparent becomes an alpha channel."""
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _from_array(given: np.ndarray | Tensor) -> Image.Image:
    """Returns an image whose channels come last, or first, where both could be in arrays last and in tensors first."""
    of_torch, shape = isinstance(given, Tensor), list(given.shape)
    dtype = str(given.dtype).removeprefix("torch.")
    places = [place for place in ((0, -1) if of_torch else (-1, 0)) if len(shape) == 3 and shape[place] in (1, 3, 4)]
    if dtype != "uint8" or not (places or len(shape) == 2) or 0 in shape:
        orders = "[1, 3 or 4, H, W] or [H, W, 1, 3 or 4]" if of_torch else "[H, W, 1, 3 or 4] or [1, 3 or 4, H, W]"
        raise ValueError(
            f"an image {'tensor' if of_torch else 'array'} is {dtype} of shape {shape}; expected uint8 (0-255) of "
            f"shape [H, W], {orders}"
        )
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else given
    if places:
        array = np.moveaxis(array, places[0], -1)
    return Image.fromarray(np.ascontiguousarray(array.squeeze(2) if array.shape[2:] == (1,) else array))
