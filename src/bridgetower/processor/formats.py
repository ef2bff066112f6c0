"""The image files that are let in, opened so that neither size nor metadata take memory before they are checked."""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Collection
from typing import Any

from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from bridgetower.processor import avif

MEMORY_PER_PIXEL = 24
"""Bytes that opening a file takes at most for each pixel that it may have; the file's own bytes come on top.

The most are taken by WebP and AVIF files with transparency: what the decoder keeps, a copy, and the image as RGB."""

# Only formats whose true size is known before they are decoded, and none that runs programs, as EPS does.
_MAGIC = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBPVP8[ LX]",
    "GIF": rb"GIF8[79]a",
    "AVIF": rb"....ftyp(?:avi[fs]|mif1|msf1)",
    "TIFF": rb"(?:II[*+]\0|MM\0\*)",
    "BMP": rb"BM",
}

# The decoders of others take memory that the size of the image does not bound.
_TIFF_COMPRESSIONS = (
    *("raw", "tiff_raw_16", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"),
    *("jpeg", "tiff_ccitt", "group3", "group4"),
)

_SLACK = 2**20
_HEADER_PARTS = 20_000  # reads; a header with more parts takes more memory than its bytes
_TIFF_VALUES = 2**18  # strips or tiles of an image; each takes a hundredfold in memory
_TIFF_BYTES, _TIFF_SIZES = (1, 2, 7), {3: "H", 4: "L"}  # types of values
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323
_TIFF_LAYERS = 6  # channels that Pillow takes
_TIFF_OFFSETS = (273, 324)  # where strips and tiles begin
_JPEG_SCANS = 100  # of one image; files have about ten, and each goes over the whole image however short it is
_JPEG_SCANS_OF_LARGEST = 20
_PNG_COMPRESSED = 32  # compressed texts and profiles; each may take 1 MiB

# Of those that end a scan; all others libjpeg skips, or gives up at.
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
_SOS, _ENDS = b"\xda", (b"\xd8", b"\xd9")

_XMP_ORIENTATION = r'tiff:Orientation(="|>)([0-9])'


def media_type(content: bytes) -> str:
    """Returns the media type of an image's file, such as `image/png`; only the head of the file is read."""
    try:
        return f"image/{_format(content).lower()}"
    except UnidentifiedImageError as error:
        raise ValueError(f"the file is no image; {error}") from error


def opened(content: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Opens an image file without decoding it."""
    image = _opened(content, max_pixels)
    _check_pixels(*image.size, max_pixels)
    if isinstance(image, BmpImagePlugin.BmpImageFile) and image.tile[0][0] == "bmp_rle":
        raise ValueError("run-length encoded BMP, which takes any amount of memory; save it as PNG")
    if isinstance(image, _Jpeg):
        _check_scans(content, [0], image.width * image.height, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image, content, max_pixels)
    if isinstance(image.fp, _Limited):
        image.fp.decode()
    return image


def _opened(content: bytes, max_pixels: int) -> ImageFile.ImageFile:
    match _format(content):
        case "JPEG":
            return _Jpeg(_Limited(content))
        case "PNG":
            _check_png(content, max_pixels)
            return PngImagePlugin.PngImageFile(_Limited(content))
        case "WEBP":
            return WebPImagePlugin.WebPImageFile(_Limited(content))
        case "GIF":
            _check_gif(content, max_pixels)
            return GifImagePlugin.GifImageFile(_Limited(content))
        case "AVIF":
            return _avif(avif.still(content, 2 * max_pixels))  # colours and transparency
        case "TIFF":
            _check_tiff_values(content, max_pixels)
            return _Tiff(_Limited(content))
        case _:
            return BmpImagePlugin.BmpImageFile(_Limited(content))


def _format(content: bytes) -> str:
    for name, magic in _MAGIC.items():
        if re.match(magic, content, re.DOTALL):
            return name
    raise UnidentifiedImageError(f"cannot be read as an image; expected one of {', '.join(sorted(_MAGIC))}")


def _avif(content: bytes) -> ImageFile.ImageFile:
    try:
        from PIL import AvifImagePlugin
    except ImportError as error:
        raise UnidentifiedImageError("AVIF needs Pillow 11.3 or newer") from error
    return AvifImagePlugin.AvifImageFile(_Limited(content))


def orientation(image: ImageFile.ImageFile) -> int:
    """Returns the EXIF orientation of a file that was decoded, 1 if none can be read."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow has turned it
    try:
        exif = image.info.get("exif")
        if exif is None and (profile := image.info.get("Raw profile type exif")):
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        found = None if exif is None else _exif_orientation(exif)
    except (ValueError, SyntaxError, OSError, struct.error):
        found = None
    return _xmp_orientation(image.info) if found is None else found


def _exif_orientation(exif: bytes) -> int | None:
    stream = _Limited(re.sub(rb"\A(?:Exif\0\0)+", b"", exif))
    directory = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
    stream.seek(directory.next)
    directory.load(stream)
    found = directory.get(ExifTags.Base.Orientation)
    return found if found is None or isinstance(found, int) else 1


def _xmp_orientation(info: dict[str | tuple[int, int], Any]) -> int:
    text = info.get("XML:com.adobe.xmp") or info.get("xmp") or ""
    pattern: Any = _XMP_ORIENTATION if isinstance(text, str) else _XMP_ORIENTATION.encode()
    found = re.search(pattern, text)
    return int(found[2]) if found else 1


class _Jpeg(JpegImagePlugin.JpegImageFile):
    def getexif(self) -> Image.Exif:
        """Returns nothing: Pillow would look for the resolution in it, whatever memory the EXIF takes."""
        return Image.Exif()


class _Tiff(TiffImagePlugin.TiffImageFile):
    def getexif(self) -> Image.Exif:
        """Returns the orientation alone, which Pillow applies; it would also read all that the tags point to."""
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = self.tag_v2.get(ExifTags.Base.Orientation, _xmp_orientation(self.info))
        return exif


class TooLargeError(ValueError):
    """An image has more pixels than the limit."""


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLargeError(
            f"has {width}x{height} = {width * height} pixels, the limit is {max_pixels}; shrink it first"
        )


def _check_scans(content: bytes, starts: Collection[int], pixels: int, max_pixels: int) -> None:
    """Counts the scans of each JPEG in a file up to its end, by the same markers as libjpeg."""
    most = min(_JPEG_SCANS, _JPEG_SCANS_OF_LARGEST * max_pixels // max(1, pixels))
    if content.count(b"\xff" + _SOS) <= most:
        return
    searched = 0
    for start in starts:
        scans = 0
        found = _JPEG_MARKER.search(content, start + 2)
        while found and found[1] not in _ENDS:
            scans += found[1] == _SOS
            if scans > most:
                raise ValueError(
                    f"it has more than {most} scans, each of which takes the time of an image; save it with fewer"
                )
            length = int.from_bytes(content[found.end() : found.end() + 2])
            found = _JPEG_MARKER.search(content, found.end() + length)
        searched += (found.end() if found else len(content)) - start
        if searched > 2 * len(content):
            raise ValueError("its strips or tiles overlap")


def _check_png(content: bytes, max_pixels: int) -> None:
    """Checks sizes in every header, since Pillow fills the first frame of an animation when it opens the file."""
    position, compressed, parts = 8, 0, 0
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        if kind == b"IEND":
            return
        if kind == b"IHDR" and position + 16 <= len(content):
            width, height = struct.unpack_from(">II", content, position + 8)
            _check_pixels(width, height, max_pixels)
        compressed += int(kind in (b"zTXt", b"iTXt", b"iCCP"))
        parts += 1
        if compressed > _PNG_COMPRESSED or parts > _HEADER_PARTS + len(content) // 64:
            raise ValueError(f"{parts} parts, {compressed} of them compressed texts and profiles, are too many")
        position += 12 + length


def _check_gif(content: bytes, max_pixels: int) -> None:
    """Checks the size of the first frame, which Pillow may fill when it opens the file."""
    position = 13 + (3 << (content[10] & 7) + 1 if content[10] & 128 else 0) if len(content) > 10 else 0
    inside = False  # an extension, which is a list of blocks
    for _ in range(_HEADER_PARTS):
        if position + 9 > len(content):
            return
        if inside:
            inside = content[position] > 0
            position += content[position] + 1
        elif content[position] == ord(","):
            left, top, width, height = struct.unpack_from("<4H", content, position + 1)
            _check_pixels(left + width, top + height, max_pixels)
            return
        else:
            inside = content[position] == ord("!")
            position += 2 if inside else 1
    raise ValueError(f"it has more than {_HEADER_PARTS} parts before its first image")


def _check_tiff_values(content: bytes, max_pixels: int) -> None:
    """Checks what the tags promise: Pillow makes a list of each, and buffers are as large as the tiles."""
    order, wide = "<" if content.startswith(b"II") else ">", content[2] == ord("+")
    word, entry = ("Q", struct.Struct(f"{order}HHQ8x")) if wide else ("L", struct.Struct(f"{order}HHL4x"))
    tile, tags = {_TIFF_TILE_WIDTH: 1, _TIFF_TILE_LENGTH: 1}, set[int]()
    try:
        (start,) = struct.unpack_from(order + word, content, 8 if wide else 4)
        (count,) = struct.unpack_from(order + ("Q" if wide else "H"), content, start)
        start += 8 if wide else 2
        for position in range(start, min(start + count * entry.size, len(content)), entry.size):
            tag, kind, values = entry.unpack_from(content, position)
            if kind not in _TIFF_BYTES and values > _TIFF_VALUES:
                raise ValueError(f"TIFF tag {tag} has {values} values; expected at most {_TIFF_VALUES}")
            if tag in _TIFF_OFFSETS and tag in tags:
                raise ValueError(f"TIFF tag {tag} is there twice")
            tags.add(tag)
            if tag in tile:
                if kind not in _TIFF_SIZES:
                    raise ValueError(f"the size of the tiles of a TIFF is of type {kind}; expected 3 or 4")
                value = position + entry.size - struct.calcsize(order + word)
                (size,) = struct.unpack_from(order + _TIFF_SIZES[kind], content, value)
                tile[tag] = max(tile[tag], size)
    except struct.error:
        pass  # Pillow says what is missing.
    _check_pixels(tile[_TIFF_TILE_WIDTH], tile[_TIFF_TILE_LENGTH], max_pixels)


def _check_tiff(image: TiffImagePlugin.TiffImageFile, content: bytes, max_pixels: int) -> None:
    if image.info["compression"] not in _TIFF_COMPRESSIONS:
        raise ValueError(f"TIFF with compression {image.info['compression']}; expected one of {_TIFF_COMPRESSIONS}")
    areas = (tile[1] or (0, 0, *image.size) for tile in image.tile)
    decoded = sum((right - left) * (lower - upper) for left, upper, right, lower in areas)
    if decoded > _TIFF_LAYERS * image.width * image.height:
        raise ValueError("its strips or tiles overlap")
    if image.info["compression"] == "jpeg":
        starts = [start for tag in _TIFF_OFFSETS for start in image.tag_v2.get(tag, ()) if isinstance(start, int)]
        tile_pixels = image.tag_v2.get(_TIFF_TILE_WIDTH, 0) * image.tag_v2.get(_TIFF_TILE_LENGTH, 0)
        _check_scans(content, set(starts), max(decoded, tile_pixels * len(starts)), max_pixels)


class _Limited(io.BytesIO):
    """A file that ends with an error when its parts overlap or are too many."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._length = len(content)
        self._reads: int = _HEADER_PARTS
        self._bytes: float = 2 * len(content) + _SLACK

    def decode(self) -> None:
        """Allows what decoding needs once the header is read."""
        self._reads, self._bytes = _HEADER_PARTS + self._length // 64, math.inf

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads as any file does."""
        part = super().read(size)
        self._reads -= 1
        self._bytes -= len(part)
        if self._reads < 0 or self._bytes < 0:
            raise ValueError("its parts overlap or are too many")
        return part
