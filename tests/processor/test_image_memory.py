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
from PIL import Image

from bridgetower.processor import MEMORY_PER_PIXEL

_MEBI = 2**20
_CONSTANT = 64 * _MEBI  # what decoders and allocators keep, whatever the image

# Tells of each file how far the memory of the process rose above what it was before, and the error.
_MEASURE = """
import json, sys, time, warnings
from pathlib import Path
from bridgetower.processor import open_image
warnings.simplefilter("ignore")
def memory(name):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name)).split()[1])
for path in sorted(Path(sys.argv[1]).iterdir()):
    Path("/proc/self/clear_refs").write_text("5")
    before, error, start = memory("VmRSS"), "", time.process_time()
    try:
        open_image(path, max_pixels=int(sys.argv[2]), background=(1, 2, 3))
    except ValueError as raised:
        error = str(raised)
    seconds = time.process_time() - start
    print(json.dumps([path.name, (memory("VmHWM") - before) * 1024, error, seconds]))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")


def _opened(files: dict[str, bytes], max_pixels: int, folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yields of each file its name, how many bytes opening it takes at most, and the error."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    command = [sys.executable, "-c", _MEASURE, str(folder), str(max_pixels)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for line in done.stdout.splitlines():
        name, rise, error, seconds = json.loads(line)
        print(f"{name:40} {len(files[name]):10} {rise / max_pixels:6.1f} {seconds:6.2f} {error[:110]}")
        yield name, rise, error


def _bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


_SIDE = 2400


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
    *(("AVIF", mode, {"speed": 10, "subsampling": "4:4:4"}) for mode in ("L", "RGB", "RGBA")),
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
