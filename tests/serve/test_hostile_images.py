"""Images that are made to take memory or time: each gets an error, and the server goes on."""

import io
import os
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgetower.processor import open_reduced
from bridgetower.processor.images import HAS_HEIC, MEMORY_PER_PIXEL, Fit
from bridgetower.serve.inputs import Decoders
from helpers.servers import URIS, data_uri, error_of, start_server

MEBI = 2**20


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@cache
def deflated_zeros(size):
    packer = zlib.compressobj(9, wbits=-15)
    zeros = packer.compress(bytes(MEBI)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + zeros * (size // MEBI) + b"\x03\0" + struct.pack(">HH", size % 65521, 1)


def chunk(kind, content=b""):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_of(*chunks, side=16, pixels=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
    data = pixels or zlib.compress(bytes(16 * (16 * 4 + 1)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND")


def animated_png(side):
    # cleared once it was shown
    control = struct.pack(">IIIIIHHBB", 0, side, side, 0, 0, 1, 1, 1, 0)
    return png_of(chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", control), side=side)


def gif(side):
    frame = (
        b"!\xf9\x04\x08\0\0\0\0" + b"," + struct.pack("<HHHH", 0, 0, side, side) + b"\0\x08\x01\0\0"
    )
    return b"GIF89a" + struct.pack("<HH", 16, 16) + bytes(3) + frame + b";"


def tiff(*entries, content=b""):
    """A TIFF file with tags: number, type, count and value or offset. `content` is at the end."""
    tags = b"".join(struct.pack("<HHLL", *entry) for entry in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + tags + bytes(4) + content


# 16x16 pixels of 8 bit
GREY = (
    (256, 3, 1, 16),
    (257, 3, 1, 16),
    (258, 3, 1, 8),
    (262, 3, 1, 1),
    (259, 3, 1, 1),
)


def strips(count, rows):
    return tiff(
        *GREY, (278, 4, 1, rows), (273, 4, count, 8 + 2 + 12 * 7 + 4), content=bytes(4 * count)
    )


def large_tile(side):
    data = deflated_zeros(side * side)
    at = 8 + 2 + 12 * 9 + 4
    tile = (
        (259, 3, 1, 8),
        (322, 4, 1, side),
        (323, 4, 1, side),
        (324, 4, 1, at),
        (325, 4, 1, len(data)),
    )
    return tiff(*GREY[:4], *tile, content=data)


def overlapping_tags():
    """EXIF whose tags all point to the same half of a MiB."""
    return tiff(*((50_000 + number, 7, MEBI // 2, 8) for number in range(2000))).ljust(MEBI, b"\0")


def jpeg_of_scans(side, count):
    """A progressive JPEG whose last scan is there many times. Each goes over the whole image."""
    content = saved(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * (count - content.count(b"\xff\xda")) + content[-2:]


def false_avif():
    content = bytearray(saved(Image.new("RGB", (5000, 5000)), "AVIF", speed=10))
    offset = content.index(b"ispe") + 8
    content[offset : offset + 8] = struct.pack(">II", 16, 16)
    return bytes(content)


def run_length_bmp():
    """A row of a million pixels that goes 255 rows up."""
    offset = 14 + 40 + 4 * 256
    header = struct.pack("<LllHHLLllLL", 40, 1_000_000, 1, 1, 8, 1, 0, 0, 0, 256, 0)
    palette = bytes(number % 251 for number in range(4 * 256))
    return (
        b"BM" + struct.pack("<LHHL", offset + 4, 0, 0, offset) + header + palette + b"\0\x02\0\xff"
    )


def animated_webp():
    """An animation of small frames on a canvas of 268 million pixels."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    content = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    content[24:30] = struct.pack("<L", 2**14 - 1)[:3] * 2
    return bytes(content)


def icon():
    inside = saved(Image.new("L", (3000, 3000)), "PNG")
    return struct.pack("<HHHBBBBHHLL", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside), 22) + inside


PHOTO = Image.effect_noise((200, 160), 90).convert("RGB")
HOSTILE = {
    "png, 60000x60000": lambda: png_of(side=60_000, pixels=deflated_zeros(64 * MEBI)),
    "png, frame of 60000x60000": lambda: animated_png(60_000),
    "png, frame of 12000x12000": lambda: animated_png(12_000),
    "png, text of 300 MB": lambda: png_of(chunk(b"zTXt", b"a\0\0" + deflated_zeros(300 * MEBI))),
    "png, profile of 300 MB": lambda: png_of(
        chunk(b"iCCP", b"a\0\0" + deflated_zeros(300 * MEBI)), side=5000
    ),
    "gif, frame of 60000x60000": lambda: gif(60_000),
    "gif, frame of 12000x12000": lambda: gif(12_000),
    "tiff, overlapping strips": lambda: strips(4000, 8),
    "tiff, 2^18 strips": lambda: strips(2**18, 1),
    "tiff, tile of 16384x16384": lambda: large_tile(2**14),
    "tiff, overlapping tags": overlapping_tags,
    "jpeg, 3000 scans": lambda: jpeg_of_scans(1900, 3000),
    "bmp, run of a million pixels": run_length_bmp,
    "webp, canvas of 268 million pixels": animated_webp,
    "icon of 9 million pixels": icon,
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    **{
        f"{kind}, cut off": lambda kind=kind: saved(PHOTO, kind)[:2000]
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")
    },
    "avif, false size": false_avif,
}
DECODED = {"tiff, overlapping strips", "avif, false size"}  # as images of 16x16, within the limits
NEARLY = "tiff, 2^18 strips"  # takes about the second that it may take: less on a fast processor


@pytest.fixture(scope="module")
def small(predictor):
    with start_server(predictor, max_pixels=4, max_body=2) as running:
        yield running


def memory(process, name):
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def asked(running, source):
    return running.client.post("/v1/embeddings", json={"input": source, "modality": "image"})


def vector(response):
    assert response.status_code == 200, response.text
    return pytest.approx(response.json()["data"][0]["embedding"], abs=1e-5)


@pytest.mark.slow
def test_hostile_images_get_an_error_and_others_their_answer(small):
    files = {name: data_uri(made()) for name, made in HOSTILE.items()}
    expected = vector(asked(small, URIS[0]))
    begin = memory(os.getpid(), "VmRSS")
    with ThreadPoolExecutor(1) as pool:
        for name, file in files.items():
            answer = pool.submit(asked, small, file)
            while not answer.done():
                assert asked(small, URIS[0]).json()["data"][0]["embedding"] == expected, name
                assert small.client.get("/ready").status_code == 200, name
                wait([answer], 0.1)
            if name in DECODED or (name == NEARLY and answer.result().status_code == 200):
                vector(answer.result())
            else:
                error = error_of(answer.result(), 400)
                assert (error["code"], error["param"]) == ("invalid_image", "input"), name
                if name == "jpeg, 3000 scans":
                    assert (
                        "takes more than 1 s + 0.25 s per million pixels to decode"
                        in error["message"]
                    )
    assert asked(small, URIS[0]).json()["data"][0]["embedding"] == expected
    if sys.platform == "linux":
        assert memory(os.getpid(), "VmRSS") < begin + 64 * MEBI
        decoders = small.service.main.decoders
        for process in decoders.processes:
            assert memory(process.pid, "VmHWM") < decoders.memory
            assert memory(process.pid, "VmRSS") < 128 * MEBI


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
def test_what_takes_too_much_is_told_and_its_process_replaced():
    decoders = Decoders(max_pixels=20_000_000, memory=100_000_000)
    try:
        decoders.open(saved(PHOTO, "PNG"))
        first = set(decoders.processes)
        with pytest.raises(
            ValueError, match=r"takes more than 100 MB to decode; save it in another way$"
        ):
            decoders.open(saved(Image.new("1", (5000, 4000)), "PNG"))
        assert not first & set(decoders.processes)
        assert np.array_equal(decoders.open(saved(PHOTO, "PNG"))[0], np.asarray(PHOTO))
        assert len(decoders.processes) == 1
    finally:
        decoders.close()


SIDE = 1200


def large_image(mode):
    image = Image.effect_noise((SIDE // 10, SIDE // 10), 90).resize(
        (SIDE, SIDE), Image.Resampling.NEAREST
    )
    if mode == "I;16":
        return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    return image.convert("RGB").convert(mode) if mode in ("P", "CMYK") else image.convert(mode)


KINDS = [
    *(
        ("PNG", mode, {"compress_level": 1})
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    ),
    ("PNG", "I;16", {"compress_level": 1, "transparency": 257}),
    *(
        ("TIFF", mode, {"compression": "tiff_lzw"})
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK")
    ),
    *(("TIFF", mode, {}) for mode in ("RGBA", "I;16")),
    *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
    ("JPEG", "CMYK", {"progressive": True, "subsampling": 0}),
    *(("WEBP", mode, {"method": 0}) for mode in ("RGB", "RGBA")),
    ("WEBP", "RGBA", {"method": 0, "lossless": True, "quality": 0}),
    *(("AVIF", mode, {"speed": 10, "subsampling": "4:4:4"}) for mode in ("L", "RGB", "RGBA")),
    *(("GIF", "P", {}), ("BMP", "RGB", {})),
    *(("HEIF", mode, {"quality": 50}) for mode in ("L", "RGB", "RGBA") if HAS_HEIC),
]


@pytest.mark.slow
def test_sound_images_of_every_kind_fit_and_are_what_this_process_makes_of_them():
    decoders = Decoders(max_pixels=SIDE**2, memory=MEMORY_PER_PIXEL * SIDE**2 + 3 * 2**22 + 2**26)
    exif = Image.Exif()
    exif[0x0112] = 6
    try:
        for kind, mode, options in KINDS:
            turned = {} if kind in ("GIF", "BMP") else {"exif": exif}
            content = saved(large_image(mode), kind, **options, **turned)
            limits = (
                {"side": 300, "background": (1, 2, 3), "fit": Fit(96, "bicubic", True)}
                if mode == "RGB"
                else {}
            )
            expected, size = open_reduced(content, **{"side": None, **limits})
            pixels, actual_size = decoders.open(content, **limits)
            assert actual_size == size, (kind, mode)
            assert np.array_equal(pixels, np.asarray(expected)), (kind, mode)
    finally:
        decoders.close()
