"""Opens images of any kind as upright RGB. As a program it decodes images for a server, within a limit of memory.

This module imports neither torch nor this package, so that the program starts quickly and is small.
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
from typing import Any, NamedTuple, TypeAlias

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


class Fit(NamedTuple):
    """How an image becomes a square.

    Attributes:
        side: Of the square, in pixels.
        interpolation: `bicubic` or `bilinear`.
        crops: Whether the short side is scaled and the centre cropped, as in the official `clip_transform`
            (src/transforms/transform.py), or both sides are scaled, as in `blip_transform`.
    """

    side: int
    interpolation: str
    crops: bool


MAX_PIXELS = 64_000_000
# Bytes that no sound image exceeds. WebP with transparency needs those of the decoder, a copy and RGB.
MEMORY_PER_PIXEL = 24
# Processor time for one image in a process for a server.
SECONDS = 1.0
SECONDS_PER_MEGAPIXEL = 0.25

# EPS is not read, as it runs programs.
_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP"]
if HAS_HEIC:
    _FORMATS.append("HEIF")
# Beginnings of files in formats that are not read, with advice.
_UNREAD_FORMATS = (
    (
        re.compile(rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL),
        "it is HEIC: pip install '.[heic]'",
    ),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "it is JPEG XL: save it as PNG or JPEG"),
)

# What PIL raises on damaged content, found by cutting and altering files of each format.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    EOFError,
    OverflowError,
    struct.error,
    TypeError,
    KeyError,
    IndexError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

# PIL's reasons for a sound file that it does not decode.
_UNSUPPORTED = re.compile(r"unknown pixel mode|unsupported|cannot handle|KeyError", re.IGNORECASE)
# A file has at most four channels of 16 bit a pixel, and so many bytes that are no pixels.
_BYTES_PER_PIXEL = 8
_METADATA_BYTES = 2**25
_LONGEST_PATH = 4096  # characters
# Niceness of a process that decodes for a server, so that the server has the cores first.
_NICENESS = 10
# Pixels that are converted at once.
_STRIP_PIXELS = 2**18


def media_type(content: bytes) -> str:
    """Returns the media type of an image's file, such as `image/png`, from the head of the file."""
    Image.init()
    for name in _FORMATS:
        _, accept = Image.OPEN[name]
        # HEIC may begin as AVIF does.
        is_other = name == "AVIF" and b"avi" not in content[8:64]
        if accept is not None and accept(content[:16]) is True and not is_other:
            return Image.MIME[name]
    raise ValueError(f"the file is no image; expected one of {', '.join(sorted(_FORMATS))}")


def open_image(
    source: Any, *, max_pixels: int = MAX_PIXELS, background: Colour | None = None
) -> Image.Image:
    """Decodes an image to RGB with its EXIF orientation applied.

    Grey of 16 bit is scaled to 8 bit by 1/257 (PIL alone would clip it to white), of an animation the first frame is
    taken. Without a `background` transparent pixels show the colour stored there, as in the official code.
    """
    image, _ = open_reduced(source, None, max_pixels=max_pixels, background=background)
    return image


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
        image, _ = _upright(source, "the PIL image", background)
        size = image.size
    elif isinstance(source, np.ndarray) or hasattr(source, "numpy"):
        image = _to_rgb(_from_array(source), background)
        size = image.size
    else:
        content, name = _read_content(source, max_pixels)
        opened = _open_content(content, name, max_pixels)
        width, height = opened.size
        # A draft of HEIC would be another image, the thumbnail.
        is_jpeg = opened.format in ("JPEG", "MPO")
        is_reduced = side is not None and is_jpeg and opened.draft(None, (side, side))
        image, is_turned = _upright(opened, name, background, reuse_pixels=True)
        size = image.size
        if is_reduced:
            size = (height, width) if is_turned else (width, height)
        # Free memory before another copy is made.
        del opened, content
    if fit is not None:
        image = _fitted(image, fit)
    return image, size


def _read_content(source: Any, max_pixels: int) -> tuple[bytes, str]:
    """Returns the bytes of an image's file and its name in errors."""
    if isinstance(source, str) and "://" in source:
        raise ValueError(
            f"{source} is a URL, which is not fetched here; give it to a method of a predictor, or its bytes"
        )
    if isinstance(source, str | os.PathLike):
        name = str(source)
        path = Path(source)
        # pathlib raises OSError of a text that is too long for a path, such as an image in base64.
        if not os.path.exists(path):  # noqa: PTH110
            start = name if len(name) <= _LONGEST_PATH else f"{name[:60]}…"
            kinds = ", which is no URL and no image either" if isinstance(source, str) else ""
            raise FileNotFoundError(f"no image file at {start}{kinds}; check the path")
        if not path.is_file():
            raise ValueError(f"{path} is not a file; give the path of one image")
        check_length(name, path.stat().st_size, max_pixels)
        return path.read_bytes(), name
    if hasattr(source, "read"):
        # A file may be read again. Streams, such as the answer of a web server, cannot seek.
        with suppress(AttributeError, UnsupportedOperation):
            source.seek(0)
        source = source.read(max_pixels * _BYTES_PER_PIXEL + _METADATA_BYTES + 1)
    if not isinstance(source, bytes | bytearray | memoryview):
        raise ValueError(
            f"an image is given as {type(source).__name__}; expected a path, bytes, an open file, a PIL image, a "
            "uint8 array or tensor"
        )
    content = bytes(source)
    name = f"the image of {len(content)} bytes"
    check_length(name, len(content), max_pixels)
    return content, name


def check_length(name: str, length: int, max_pixels: int = MAX_PIXELS) -> None:
    """Checks that an image file is neither empty nor longer than one of so many pixels can be, before it is read."""
    if length == 0:
        raise ValueError(f"{name} is empty (0 bytes); fetch the image again")
    longest = max_pixels * _BYTES_PER_PIXEL + _METADATA_BYTES
    if length > longest:
        raise ValueError(
            f"{name} has {length} bytes; expected at most {longest}, which {max_pixels} pixels have uncompressed"
        )


def _open_content(content: bytes, name: str, max_pixels: int) -> ImageFile.ImageFile:
    try:
        image = Image.open(BytesIO(content), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels ({error}); shrink it first") from error
    except _DECODE_ERRORS as error:
        try:
            kind = media_type(content)
        except ValueError:
            expected = ", ".join(sorted(_FORMATS))
            advice = ""
            for head, hint in _UNREAD_FORMATS:
                if head.match(content):
                    advice = f"; {hint}"
            raise ValueError(
                f"{name} cannot be read as an image; supported are {expected}{advice}"
            ) from error
        reason: Exception | str = error
        # PIL does not say why it identified no image, but its plugin does.
        if isinstance(error, UnidentifiedImageError):
            reason = ""
            try:
                open_plugin, _ = Image.OPEN[kind.removeprefix("image/").upper()]
                open_plugin(BytesIO(content), "")
            except _DECODE_ERRORS as plugin_error:
                reason = plugin_error
        if _UNSUPPORTED.search(repr(reason)):
            raise ValueError(
                f"{name} is of an unsupported kind ({kind}: {reason}); convert it to PNG"
            ) from error
        detail = f" ({reason})" if str(reason) else ""
        raise ValueError(f"{name} is damaged{detail}; fetch the image again") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width}x{height} = {width * height} pixels, the limit is {max_pixels}; shrink it first"
        )
    return image


def _upright(
    image: Image.Image, name: str, background: Colour | None, *, reuse_pixels: bool = False
) -> tuple[Image.Image, bool]:
    """Decodes an image to upright RGB, and tells whether width and height were exchanged.

    `reuse_pixels` takes the memory of the image, as a copy takes a fifth of the time of a large JPEG.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so cut-off files would end in grey; set it to False"
        )
    try:
        image.load()
    except _DECODE_ERRORS as error:
        # TIFF has compressions that Pillow may lack.
        compression = image.info.get("compression")
        advice = ""
        if compression in ("webp", "zstd", "lzma"):
            advice = f", or convert it: its compression {compression} may be unsupported"
        raise ValueError(
            f"{name} is cut off or damaged ({error}); fetch the image again{advice}"
        ) from error

    # RGB without transparency.
    is_plain = image.mode == "RGB" and all(image.size) and not image.has_transparency_data
    if reuse_pixels and is_plain:
        rgb = image._new(image.im)
        rgb.info = {}
    else:
        rgb = _to_rgb(image, background)

    # Upright. Pillow would write all other EXIF anew.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS:
        orientation = 1
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb, orientation in (5, 6, 7, 8)


def _fitted(image: Image.Image, fit: Fit) -> Image.Image:
    """Resizes to a square with the passes in the order of Pillow 13, for any installed release.

    Each pass rounds to 8 bit, so their order moves values. Pillow 13 begins vertically where the height loses more than
    twice as many pixels as the width. Earlier releases always begin horizontally.
    """
    # The size before the crop.
    side = fit.side
    width = side
    height = side
    if fit.crops:
        long_side = max(image.size) * side // min(image.size)
        if long_side * side > MAX_PIXELS:
            raise ValueError(
                f"an image of {image.width}x{image.height} is too elongated: with a short side of {side} px it would "
                f"have {long_side * side} pixels, the limit is {MAX_PIXELS}; crop it first"
            )
        if image.width < image.height:
            height = long_side
        else:
            width = long_side

    # Both passes.
    is_vertical_first = image.height - height > max(0, 2 * (image.width - width))
    first_size = (image.width, height) if is_vertical_first else (width, image.height)
    kernel = Image.Resampling[fit.interpolation.upper()]
    resized = image.resize(first_size, kernel).resize((width, height), kernel)

    # The crop. Halves round to even, as in torchvision's `CenterCrop`.
    start = round((width - side) / 2)
    top = round((height - side) / 2)
    return resized.crop((start, top, start + side, top + side))


def _to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    """Converts an image strip by strip, so that only a strip takes memory in another mode."""
    # Refuse modes whose values have no fixed range.
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

    # Convert each strip in the same steps.
    rgb = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        strip = image.crop(box)
        if strip.mode == "I" or strip.mode.startswith("I;16"):
            # 16 bit are divided by 257 and rounded, and a transparent grey becomes an alpha channel.
            transparent = strip.info.get("transparency")
            values = np.asarray(strip).astype(np.uint32)
            strip = Image.fromarray(((values + 128) // 257).astype(np.uint8))
            if transparent is not None:
                alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
                strip.putalpha(Image.fromarray(alpha))
        # Pillow does not convert premultiplied grey to RGBA.
        if strip.mode == "La":
            strip = strip.convert("LA")
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            if background is not None:
                colour = Image.new("RGBA", strip.size, (*background, 255))
                strip = Image.alpha_composite(colour, strip)
        rgb.paste(strip.convert("RGB"), box)
    return rgb


def _from_array(pixels: Any) -> Image.Image:
    """Returns the image of an array, whose channels come last, or of a tensor, whose channels come first.

    The other order is taken if only that is possible.
    """
    kind = "array"
    axes: tuple[int, ...] = (-1, 0)
    orders = "[H, W, 1, 3 or 4] or [1, 3 or 4, H, W]"
    if not isinstance(pixels, np.ndarray):
        kind = "tensor"
        axes = (0, -1)
        orders = "[1, 3 or 4, H, W] or [H, W, 1, 3 or 4]"
    shape = list(pixels.shape)
    dtype = str(pixels.dtype).removeprefix("torch.")
    axes = tuple(axis for axis in axes if len(shape) == 3 and shape[axis] in (1, 3, 4))
    if dtype != "uint8" or not (axes or len(shape) == 2) or 0 in shape:
        raise ValueError(
            f"an image {kind} is {dtype} of shape {shape}; expected uint8 (0-255) of shape [H, W], {orders}"
        )
    array: np.ndarray = pixels.detach().cpu().numpy() if kind == "tensor" else pixels
    if axes:
        array = np.moveaxis(array, axes[0], -1)
        if array.shape[2] == 1:
            array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _decode_for_server(max_pixels: int, memory: int) -> None:
    """Answers each image on standard input with its pixels.

    An image that takes too much memory or time ends the process.
    """
    # Windows lacks this module.
    import resource

    # The server ends this process when it is done, not a signal to the whole group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    # Limit what this process takes. Each thread would take memory, and other images have the other cores.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICENESS)
    Image.init()
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if HAS_HEIC:
        heif_options.DECODE_THREADS = 1
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = max_pixels

    # The signal of the timer ends the process.
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        content = sys.stdin.buffer.read(job["length"])
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answer: dict[str, Any]
        pixels = b""
        try:
            name = f"the image of {len(content)} bytes"
            check_length(name, len(content), max_pixels)
            width, height = _open_content(content, name, max_pixels).size
            seconds = SECONDS + SECONDS_PER_MEGAPIXEL * width * height / 1e6
            signal.setitimer(signal.ITIMER_PROF, seconds)
            image, size = open_reduced(
                content,
                job["side"],
                max_pixels=max_pixels,
                background=job["background"],
                fit=None if job["fit"] is None else Fit(*job["fit"]),
            )
            answer = {"shape": (image.height, image.width, 3), "size": size}
            pixels = image.tobytes()
            # Free memory before the next image comes.
            del image, content
        except ValueError as error:
            answer = {"error": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.write(pixels)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _decode_for_server(*map(int, sys.argv[1:]))
