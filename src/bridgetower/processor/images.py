"""Opens images of any kind as upright RGB. Run as a program it does so for a server, within a limit of memory.

It imports neither torch nor this package, so that such a program starts quickly and is small.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import sys
import warnings
from contextlib import suppress
from io import BytesIO, UnsupportedOperation
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

try:
    from pillow_heif import options as heif_options
    from pillow_heif import register_heif_opener
except ImportError:  # the extra 'heic'
    HAS_HEIC = False
else:
    HAS_HEIC = True
    register_heif_opener()

Colour: TypeAlias = tuple[int, int, int]
Fit: TypeAlias = tuple[int, str, bool]
"""Side of a square, the interpolation, and whether the short side is scaled to it and the centre cropped, as in the
official `clip_transform` (src/transforms/transform.py), or both sides are, as in `blip_transform`."""

MAX_PIXELS = 64_000_000
# bytes at most of a sound image: of WebP with transparency the decoder's, a copy and RGB
MEMORY_PER_PIXEL = 24
# of processor time for one image in a process of its own
SECONDS, SECONDS_PER_MEGAPIXEL = (
    1.0,
    0.25,
)

# None that runs programs, as EPS does.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", *(("HEIF",) if HAS_HEIC else ()))
_NOT_READ = (  # how files begin that are images of other formats, with advice
    (
        re.compile(rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL),
        "it is HEIC: pip install '.[heic]'",
    ),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "it is JPEG XL: save it as PNG or JPEG"),
)

# What PIL raises on damaged content, found by cutting and altering files of each format.
_DECODE_ERRORS = (
    *(
        OSError,
        SyntaxError,
        ValueError,
        RuntimeError,
        EOFError,
        OverflowError,
        struct.error,
        TypeError,
        KeyError,
    ),
    *(IndexError, Image.DecompressionBombError, Image.DecompressionBombWarning),
)

# of PIL's reasons
_UNSUPPORTED = re.compile(r"unknown pixel mode|unsupported|cannot handle|KeyError", re.IGNORECASE)
_BYTES_PER_PIXEL = 8  # of a file: four channels of 16 bit
_METADATA = 2**25  # bytes of a file that are no pixels
_LONGEST_PATH = 4096  # characters
_NICE = 10  # of a process that decodes for a server, which has the cores first
_STRIP = 2**18  # pixels that are converted at once


def media_type(content: bytes) -> str:
    """Returns the media type of an image's file, such as `image/png`; only the head of the file is read."""
    Image.init()
    for name in _FORMATS:
        accept = Image.OPEN[name][1]
        if (
            accept is not None
            and accept(content[:16]) is True
            and (name != "AVIF" or b"avi" in content[8:64])
        ):
            return Image.MIME[name]  # HEIC may begin as AVIF does
    raise ValueError(f"the file is no image; expected one of {', '.join(sorted(_FORMATS))}")


def open_image(
    source: Any, *, max_pixels: int = MAX_PIXELS, background: Colour | None = None
) -> Image.Image:
    """Decodes an image to RGB with its EXIF orientation applied.

    Grey of 16 bit is scaled to 8 bit by 1/257 (PIL alone would clip it to white), of an animation the first frame is
    taken. Without a `background` transparent pixels show the colour stored there, as in the official code.
    """
    return open_reduced(source, None, max_pixels=max_pixels, background=background)[0]


def open_reduced(
    source: Any,
    side: int | None,
    *,
    max_pixels: int = MAX_PIXELS,
    background: Colour | None = None,
    fit: Fit | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """Decodes as `open_image`, but a JPEG at the least scale of 1/8, 1/4 and 1/2 whose shorter side has `side` pixels.

    Also returns width and height of the full image, upright.
    """
    if isinstance(source, Image.Image):
        image = _upright(source, "the PIL image", background)[0]
        size = image.size
    elif isinstance(source, np.ndarray) or hasattr(source, "numpy"):
        image = _to_rgb(_from_array(source), background)
        size = image.size
    else:
        content, name = _content(source, max_pixels)
        opened = _opened(content, name, max_pixels)
        size = opened.size
        # of HEIC it would take another image, the thumbnail
        is_jpeg = opened.format in (
            "JPEG",
            "MPO",
        )
        reduced = side is not None and is_jpeg and opened.draft(None, (side, side))
        image, exchanged = _upright(opened, name, background, own=True)
        if not reduced:
            size = image.size
        elif exchanged:
            size = size[::-1]
        del opened, content  # before another copy is made
    return image if fit is None else _fitted(image, *fit), size


def _content(source: Any, max_pixels: int) -> tuple[bytes, str]:
    """Returns the bytes of an image's file, and what errors call it."""
    if isinstance(source, str) and "://" in source:
        raise ValueError(
            f"{source} is a URL, which is not fetched here; give it to a method of a predictor, or its bytes"
        )
    if isinstance(source, str | os.PathLike):
        name, path = str(source), Path(source)
        if not os.path.exists(path):  # noqa: PTH110 - of a text that is too long for a path, pathlib raises OSError
            kinds = ", which is no URL and no image either" if isinstance(source, str) else ""
            raise FileNotFoundError(f"no image file at {_start(name)}{kinds}; check the path")
        if not path.is_file():
            raise ValueError(f"{path} is not a file; give the path of one image")
        check_length(name, path.stat().st_size, max_pixels)
        return path.read_bytes(), name
    if hasattr(source, "read"):
        # of a stream, such as the answer of a web server
        with suppress(AttributeError, UnsupportedOperation):
            source.seek(0)  # it may come again
        source = source.read(max_pixels * _BYTES_PER_PIXEL + _METADATA + 1)
    if not isinstance(source, bytes | bytearray | memoryview):
        raise ValueError(
            f"an image is given as {type(source).__name__}; expected a path, bytes, an open file, a PIL image, a "
            "uint8 array or tensor"
        )
    content = bytes(source)
    check_length(name := f"the image of {len(content)} bytes", len(content), max_pixels)
    return content, name


def _start(name: str) -> str:
    """Returns a path, or the beginning of what is too long for one, such as an image in base64."""
    return name if len(name) <= _LONGEST_PATH else f"{name[:60]}…"


def check_length(name: str, length: int, max_pixels: int = MAX_PIXELS) -> None:
    """Checks that an image file is neither empty nor longer than one of so many pixels can be, before it is read."""
    if length == 0:
        raise ValueError(f"{name} is empty (0 bytes); fetch the image again")
    if length > (longest := max_pixels * _BYTES_PER_PIXEL + _METADATA):
        raise ValueError(
            f"{name} has {length} bytes; expected at most {longest}, which {max_pixels} pixels have uncompressed"
        )


def _opened(content: bytes, name: str, max_pixels: int) -> ImageFile.ImageFile:
    try:
        image = Image.open(BytesIO(content), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels ({error}); shrink it first") from error
    except _DECODE_ERRORS as error:
        try:
            kind = media_type(content)
        except ValueError:
            expected = ", ".join(sorted(_FORMATS))
            advice = "".join(f"; {each}" for head, each in _NOT_READ if head.match(content))
            raise ValueError(
                f"{name} cannot be read as an image; supported are {expected}{advice}"
            ) from error
        reason: Exception | str = error
        if isinstance(error, UnidentifiedImageError):  # which has no reason
            try:
                reason = ""
                Image.OPEN[kind.removeprefix("image/").upper()][0](BytesIO(content), "")
            except _DECODE_ERRORS as own:
                reason = own
        if _UNSUPPORTED.search(repr(reason)):
            raise ValueError(
                f"{name} is of an unsupported kind ({kind}: {reason}); convert it to PNG"
            ) from error
        shown = f" ({reason})" if str(reason) else ""
        raise ValueError(f"{name} is damaged{shown}; fetch the image again") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width}x{height} = {width * height} pixels, the limit is {max_pixels}; shrink it first"
        )
    return image


def _upright(
    image: Image.Image, name: str, background: Colour | None, *, own: bool = False
) -> tuple[Image.Image, bool]:
    """Decodes an image to upright RGB, and tells whether width and height were exchanged; one's `own` gives its pixels.

    A copy of the pixels takes a fifth of the time of a large JPEG.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so cut-off files would end in grey; set it to False"
        )
    try:
        image.load()
    except _DECODE_ERRORS as error:
        kind = image.info.get("compression")  # of a TIFF
        more = (
            f", or convert it: its compression {kind} may be unsupported"
            if kind in ("webp", "zstd", "lzma")
            else ""
        )
        raise ValueError(
            f"{name} is cut off or damaged ({error}); fetch the image again{more}"
        ) from error
    if own and image.mode == "RGB" and all(image.size) and not image.has_transparency_data:
        rgb = image._new(image.im)
        rgb.info = {}
    else:
        rgb = _to_rgb(image, background)
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS:
        orientation = 1
    # alone: Pillow would write all of the EXIF anew
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb, orientation in (5, 6, 7, 8)


def _fitted(image: Image.Image, size: int, interpolation: str, crop: bool) -> Image.Image:
    """PIL's resizing with the passes in the order of Pillow 13, whatever release is installed.

    Each pass rounds to 8 bit, so their order moves values. Pillow 13 begins vertically where the height loses more than
    twice as many pixels as the width; earlier releases always begin horizontally.
    """
    width = height = size
    if crop:
        long_side = max(image.size) * size // min(image.size)
        if long_side * size > MAX_PIXELS:
            raise ValueError(
                f"an image of {image.width}x{image.height} is too elongated: with a short side of {size} px it would "
                f"have {long_side * size} pixels, the limit is {MAX_PIXELS}; crop it first"
            )
        width, height = (size, long_side) if image.width < image.height else (long_side, size)
    vertical_first = image.height - height > max(0, 2 * (image.width - width))
    between = (image.width, height) if vertical_first else (width, image.height)
    kernel = Image.Resampling[interpolation.upper()]
    resized = image.resize(between, kernel).resize((width, height), kernel)
    # half to even, as torchvision's `CenterCrop`
    left, top = (
        round((width - size) / 2),
        round((height - size) / 2),
    )
    return resized.crop((left, top, left + size, top + size))


def _to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    """Returns a new image, of which no more than a strip takes memory in another mode."""
    if 0 in image.size:
        raise ValueError(
            f"an image has {image.width} x {image.height} pixels; expected one at least"
        )
    if image.mode in ("F", "LAB"):
        raise ValueError(
            f"an image of mode {image.mode} has no fixed range or colours; save it as 8-bit RGB or grey"
        )
    if image.mode == "I":
        low, high = np.array(image.getextrema())
        if low < 0 or high > 65535:
            raise ValueError(
                f"a grey image has values from {low} to {high}; expected 16 bit, 0 to 65535"
            )
    rgb = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        strip = image.crop(box)
        if strip.mode == "I" or strip.mode.startswith("I;16"):
            values, transparent = (
                np.asarray(strip).astype(np.uint32),
                strip.info.get("transparency"),
            )
            strip = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # v / 257, rounded
            if transparent is not None:  # a colour marked so becomes an alpha channel
                strip.putalpha(
                    Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
                )
        if strip.mode == "La":  # from which Pillow makes no RGBA
            strip = strip.convert("LA")
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            if background is not None:
                strip = Image.alpha_composite(
                    Image.new("RGBA", strip.size, (*background, 255)), strip
                )
        rgb.paste(strip.convert("RGB"), box)
    return rgb


def _from_array(given: Any) -> Image.Image:
    """Returns an image whose channels come last, or first, where both could be in arrays last and in tensors first."""
    of_torch, shape = not isinstance(given, np.ndarray), list(given.shape)
    dtype = str(given.dtype).removeprefix("torch.")
    places = [
        place
        for place in ((0, -1) if of_torch else (-1, 0))
        if len(shape) == 3 and shape[place] in (1, 3, 4)
    ]
    if dtype != "uint8" or not (places or len(shape) == 2) or 0 in shape:
        orders = (
            "[1, 3 or 4, H, W] or [H, W, 1, 3 or 4]"
            if of_torch
            else "[H, W, 1, 3 or 4] or [1, 3 or 4, H, W]"
        )
        raise ValueError(
            f"an image {'tensor' if of_torch else 'array'} is {dtype} of shape {shape}; expected uint8 (0-255) of "
            f"shape [H, W], {orders}"
        )
    array: np.ndarray = given.detach().cpu().numpy() if of_torch else given
    if places:
        array = np.moveaxis(array, places[0], -1)
    return Image.fromarray(
        np.ascontiguousarray(array.squeeze(2) if array.shape[2:] == (1,) else array)
    )


def _decode_for_server(max_pixels: int, memory: int) -> None:
    """Answers each image on standard input with its pixels; what takes too much memory or time ends the process."""
    import resource  # which Windows has not

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # sent to the whole group; the server ends this process when it is done
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICE)
    Image.init()
    # each takes memory, and other images have the other cores
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if HAS_HEIC:
        heif_options.DECODE_THREADS = 1
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = max_pixels
    while order := sys.stdin.buffer.readline():
        job = json.loads(order)
        content = sys.stdin.buffer.read(job["length"])
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends the process
        answer: dict[str, Any]
        pixels = b""
        try:
            check_length(name := f"the image of {len(content)} bytes", len(content), max_pixels)
            width, height = _opened(content, name, max_pixels).size
            signal.setitimer(
                signal.ITIMER_PROF, SECONDS + SECONDS_PER_MEGAPIXEL * width * height / 1e6
            )
            image, size = open_reduced(
                content,
                job["side"],
                max_pixels=max_pixels,
                background=job["background"],
                fit=job["fit"],
            )
            answer, pixels = (
                {"shape": (image.height, image.width, 3), "size": size},
                image.tobytes(),
            )
            del image, content  # before the next one comes
        except ValueError as error:
            answer = {"error": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.write(pixels)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _decode_for_server(*map(int, sys.argv[1:]))
