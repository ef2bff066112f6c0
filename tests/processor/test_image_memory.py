"""Opening an image takes the memory that is planned for its pixels, whatever the file says or hides."""

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from bridgetower.processor import MEMORY_PER_PIXEL

_MEBI = 2**20
_CONSTANT = 64 * _MEBI  # what decoders and allocators keep, whatever the image

# Tells of each file how far the memory of the process rose above what it was before, and the error.
_MEASURE = """
import json, sys, warnings
from pathlib import Path
from bridgetower.processor import open_image
warnings.simplefilter("ignore")
def memory(name):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name)).split()[1])
for path in sorted(Path(sys.argv[1]).iterdir()):
    Path("/proc/self/clear_refs").write_text("5")
    before, error = memory("VmRSS"), ""
    try:
        open_image(path, max_pixels=int(sys.argv[2]), background=(1, 2, 3))
    except ValueError as raised:
        error = str(raised)
    print(json.dumps([path.name, (memory("VmHWM") - before) * 1024, error]))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")


def _opened(files: dict[str, bytes], max_pixels: int, folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yields of each file its name, how many bytes opening it takes at most, and the error."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    command = [sys.executable, "-c", _MEASURE, str(folder), str(max_pixels)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for line in done.stdout.splitlines():
        name, rise, error = json.loads(line)
        yield name, rise, error


def _bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


_SIDE = 2400
_AVIF = features.check("avif")  # from Pillow 11.3 on


def _large(mode: str) -> Image.Image:
    small = Image.effect_noise((_SIDE // 10, _SIDE // 10), 90)
    image = small.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    return image.convert("RGB").convert(mode) if mode in ("P", "CMYK") else image.convert(mode)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


_KINDS: list[tuple[str, str, dict[str, Any]]] = [
    *(("PNG", mode, {"compress_level": 1}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("PNG", "I;16", {"compress_level": 1, "transparency": 257}),
    *(("TIFF", mode, {"compression": "tiff_lzw"}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK")),
    *(("TIFF", mode, {}) for mode in ("RGBA", "I;16")),
    *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
    ("JPEG", "CMYK", {"progressive": True, "subsampling": 0}),
    *(("WEBP", mode, {"method": 0}) for mode in ("RGB", "RGBA")),
    ("WEBP", "RGBA", {"method": 0, "lossless": True, "quality": 0}),
    *(("AVIF", mode, {"speed": 10, "subsampling": "4:4:4"}) for mode in ("L", "RGB", "RGBA") if _AVIF),
    *(("GIF", "P", {}), ("BMP", "RGB", {})),
]


def test_an_image_takes_what_is_planned(tmp_path: Path) -> None:
    files = {}
    for number, (kind, mode, options) in enumerate(_KINDS):
        turned = {} if kind in ("GIF", "BMP") else {"exif": _exif()}
        files[f"{number:02} {kind} {mode}"] = _bytes(_large(mode), kind, **options, **turned)
    opened = list(_opened(files, _SIDE**2, tmp_path))
    assert len(opened) == len(_KINDS)
    for name, rise, error in opened:
        assert error == "", name
        assert rise < MEMORY_PER_PIXEL * _SIDE**2 + 3 * len(files[name]) + _CONSTANT, name


def _chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(*chunks: bytes, side: int = 16) -> bytes:
    """A black PNG with chunks before its pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    pixels = zlib.compress(bytes(16 * (16 * 4 + 1)))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(chunks) + _chunk(b"IDAT", pixels) + _chunk(b"IEND")


def _tiff(*entries: tuple[int, int, int, int], content: bytes = b"") -> bytes:
    """A TIFF file with tags: number, type, count and value or offset; `content` is at the end."""
    tags = b"".join(struct.pack("<HHLL", *entry) for entry in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + tags + bytes(4) + content


def _at(entries: int) -> int:
    """Where the content of a TIFF file begins."""
    return 8 + 2 + 12 * entries + 4


_GREY = ((256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (262, 3, 1, 1))  # 16x16 pixels of 8 bit


def _overlapping(tags: int, length: int) -> bytes:
    """EXIF whose tags all point to the same bytes."""
    return _tiff(*((50_000 + number, 7, length - 8, 8) for number in range(tags))).ljust(length, b"\0")


def _sub_directory() -> bytes:
    """A TIFF image whose tag of an EXIF directory leads to tags that all point to the same bytes."""
    start = _at(len(_GREY) + 4)
    tags = b"".join(struct.pack("<HHLL", 50_000 + number, 7, _MEBI // 2, 8) for number in range(600))
    directory = struct.pack("<H", 600) + tags + bytes(4)
    strips = ((259, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 256), (34665, 4, 1, start))
    return _tiff(*_GREY, *strips, content=directory + bytes(_MEBI))


def _large_tile() -> bytes:
    """A TIFF image of 16x16 pixels in a tile of 16384x16384, of which little is in the file."""
    deflated = zlib.compress(bytes(2**28), 1)
    tile = ((259, 3, 1, 8), (322, 4, 1, 2**14), (323, 4, 1, 2**14), (324, 4, 1, _at(9)), (325, 4, 1, len(deflated)))
    return _tiff(*_GREY, *tile, content=deflated)


def _many_strips() -> bytes:
    strips = 2_000_000
    return _tiff(*_GREY, (259, 3, 1, 1), (278, 4, 1, 1), (273, 4, strips, _at(7)), content=bytes(4 * strips))


def _overlapping_strips() -> bytes:
    """Each of many strips is half of the image."""
    strips = 4000
    return _tiff(*_GREY, (259, 3, 1, 1), (278, 4, 1, 8), (273, 4, strips, _at(7)), content=bytes(4 * strips))


def _animated_png() -> bytes:
    control = struct.pack(">IIIIIHHBB", 0, 12_000, 12_000, 0, 0, 1, 1, 1, 0)  # cleared once it was shown
    return _png(_chunk(b"acTL", struct.pack(">II", 2, 0)), _chunk(b"fcTL", control), side=12_000)


def _gif(*extensions: bytes, side: int = 16) -> bytes:
    frame = b"," + struct.pack("<HHHH", 0, 0, side, side) + b"\0\x08\x01\0\0"
    return b"GIF89a" + struct.pack("<HH", 16, 16) + bytes(3) + b"".join(extensions) + frame + b";"


def _run_length_bmp() -> bytes:
    """A row of a million pixels that goes 255 rows up."""
    offset = 14 + 40 + 4 * 256
    header = struct.pack("<LllHHLLllLL", 40, 1_000_000, 1, 1, 8, 1, 0, 0, 0, 256, 0)
    palette = bytes(number % 251 for number in range(4 * 256))
    return b"BM" + struct.pack("<LHHL", offset + 4, 0, 0, offset) + header + palette + b"\0\x02\0\xff"


def _icon() -> bytes:
    """An icon that claims 16x16 pixels and is a PNG of 9 million."""
    inside = _bytes(Image.new("L", (3000, 3000)), "PNG")
    return struct.pack("<HHHBBBBHHLL", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside), 22) + inside


def _avif(claimed: int, **options: Any) -> bytes:
    """An AVIF file of 9 million pixels that claims to have others."""
    content = bytearray(_bytes(Image.new("RGB", (3000, 3000)), "AVIF", speed=10, **options))
    place = content.index(b"ispe") + 8
    content[place : place + 8] = struct.pack(">II", claimed, claimed)
    return bytes(content)


def _animated_webp() -> bytes:
    """An animation of small frames on a canvas of 268 million pixels."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    content = bytearray(_bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    content[24:30] = struct.pack("<L", 2**14 - 1)[:3] * 2
    return bytes(content)


def _jpeg(*segments: bytes) -> bytes:
    content = _bytes(Image.new("RGB", (16, 16)), "JPEG")
    return content[:2] + b"".join(segments) + content[2:]


def _small(kind: str, **options: Any) -> bytes:
    return _bytes(Image.new("RGB", (16, 16)), kind, **options)


def _attacks() -> dict[str, tuple[bytes, str]]:
    """Files and what is said of them; an empty message is of a file that is opened."""
    exif = _overlapping(600, _MEBI)
    short = _overlapping(5000, 65_000)
    profile = b"x\0\0" + zlib.compress(bytes(_MEBI - 9))
    raw = "\nexif\n" + f"{len(short):8}\n" + short.hex()
    avif = {
        "avif, size": lambda: (_avif(16), "AV1 frames in it may have 9000000 pixels"),
        "avif, exif": lambda: (_small("AVIF", exif=b"Exif\0\0" + exif), ""),
    }
    return {
        **{name: attack() for name, attack in avif.items() if _AVIF},
        "icon": (_icon(), "cannot be read as an image"),
        "jpeg2000": (_small("JPEG2000"), "cannot be read as an image"),
        "webp, exif": (_small("WEBP", exif=exif), ""),
        "webp, canvas": (_animated_webp(), "268435456 pixels"),
        "png, exif": (_png(_chunk(b"eXIf", exif)), ""),
        "png, text": (_png(_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw.encode()))), ""),
        "png, profiles": (_png(*[_chunk(b"iCCP", profile)] * 300), "compressed texts and profiles, are too many"),
        "png, chunks": (_png(*[_chunk(b"prVt")] * 200_000), "too many"),
        "png, frame": (_animated_png(), "144000000 pixels"),
        "jpeg, exif": (_jpeg(b"\xff\xe1" + struct.pack(">H", 8 + len(short)) + b"Exif\0\0" + short), ""),
        "jpeg, segments": (_jpeg(b"\xff\xe5\0\x02" * 1_000_000), "too many"),
        "gif, frame": (_gif(b"!\xf9\x04\x08\0\0\0\0", side=15_000), "225000000 pixels"),
        "gif, comment": (_gif(b"!\xfe", (b"\xff" + b"x" * 255) * 25_000, b"\0"), "20000 parts before its first image"),
        "bmp, delta": (_run_length_bmp(), "run-length encoded BMP"),
        "tiff, tags": (
            _overlapping(600, _MEBI),
            "overlap or are too many|Missing dimensions",
        ),  # the latter of Pillow 13
        "tiff, directory": (_sub_directory(), ""),
        "tiff, tile": (_large_tile(), "268435456 pixels"),
        "tiff, strips": (_many_strips(), "tag 273 has 2000000 values"),
        "tiff, overlap": (_overlapping_strips(), "strips or tiles overlap"),
        "tiff, lzma": (_small("TIFF", compression="lzma"), "TIFF with compression lzma"),
        "long": (_png() + bytes(48 * _MEBI), "bytes; expected at most"),
    }


def test_no_file_takes_more_than_is_planned(tmp_path: Path) -> None:
    attacks = _attacks()
    opened = list(_opened({name: content for name, (content, _) in attacks.items()}, 1_000_000, tmp_path))
    assert len(opened) == len(attacks)
    for name, rise, error in opened:
        content, words = attacks[name]
        assert any(part in error for part in words.split("|")) if words else not error, f"{name}: {error}"
        assert rise < MEMORY_PER_PIXEL * 1_000_000 + 3 * len(content) + _CONSTANT, name
