"""Images per second from the bytes of JPEG files to batches of pixels, beside torchvision's and open_clip's ways.

    python benchmarks/decoding.py

Photo-like JPEGs are generated: noise whose strength falls with its frequency as that of photos does (1/f). They are
brought to the input of the base model, 288 x 288, in one thread each. Beside the rates, which other processes on the
machine lower, stand the milliseconds of the processor for one image, and by how much the pixels of `fast_decode`
differ. open_clip's transform, as it composes it, also normalises. `index` then takes the large images with and without
`--fast-decode`; `cosine` is the least of the vectors of an image both ways, `others` the mean of different images'. At
last, images of a prepared set are read in random order: bytes that are asked for per byte of the files.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from memory import make_set, read_bytes
from PIL import Image
from torch import Tensor
from torchvision import transforms  # type: ignore[import-untyped]
from torchvision.io import decode_image  # type: ignore[import-untyped]

from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.data.sets.custom import PairsConfig
from bridgetower.inference.predictor import load
from bridgetower.processor import Processor, ProcessorConfig, loaded
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower_demo.folder import FOLDER, trained_model
from search import Row, show

SMALL = "640 x 480"
SIZES = {"12 megapixels": (4000, 3000), SMALL: (640, 480)}
SIDE = 288
ORDINARY = ProcessorConfig(profile="official-pretrain", image_size=SIDE, max_length=50)
BATCH = 8
Way = Callable[[bytes], Tensor]


def opened(content: bytes) -> Image.Image:
    """Returns the image, still to be decoded, as torchvision's data sets and open_clip's do."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def tensor(content: bytes) -> Tensor:
    """Decodes with torchvision's own decoder."""
    pixels: Tensor = decode_image(
        torch.frombuffer(bytearray(content), dtype=torch.uint8), mode="RGB"
    )
    return pixels


def normalised(pixels: Tensor) -> Tensor:
    """Ends with our code where open_clip's transform ends."""
    return Processor(ORDINARY, None).normalise(pixels[None])[0]


FULL = Processor(ORDINARY, None).resize
CROP = [transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(SIDE)]
NORMALISED = [transforms.ToTensor(), transforms.Normalize(ORDINARY.image_mean, ORDINARY.image_std)]
WAYS: dict[str, Way] = {
    "in full": FULL,
    "reduced": Processor(replace(ORDINARY, fast_decode=True), None).resize,
    "in full, profile hf": Processor(replace(ORDINARY, profile="hf"), None).resize,
    "torchvision": transforms.Compose([opened, *CROP, transforms.PILToTensor()]),
    "torchvision, tensors": transforms.Compose([tensor, *CROP]),
    "in full, normalised": transforms.Compose([FULL, normalised]),
    "open_clip's transform": transforms.Compose([opened, *CROP, *NORMALISED]),
}


def photo(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """Returns an image with the spectrum of a photo, in colours that belong together."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    shared = _noise(frequency, width, height, generator)
    channels = [shared + 0.4 * _noise(frequency, width, height, generator) for _ in range(3)]
    levels = [128 + 50 * channel / channel.std() for channel in channels]
    return Image.fromarray(np.stack(levels, axis=-1).clip(0, 255).astype(np.uint8))


def _noise(
    frequency: np.ndarray, width: int, height: int, generator: np.random.Generator
) -> np.ndarray:
    spectrum = np.fft.rfft2(generator.standard_normal((height, width)))
    field: np.ndarray = np.fft.irfft2(spectrum / frequency, s=(height, width))
    return field / field.std()


def rate(way: Way, files: list[bytes], workers: int, repeats: int) -> float:
    """Returns the median of images per second; starting the processes counts."""
    batches, rates = [files[start : start + BATCH] for start in range(0, len(files), BATCH)], []
    for _ in range(repeats):
        started = time.perf_counter()
        done = sum(len(batch) for batch in loaded(way, batches, num_workers=workers))
        rates.append(done / (time.perf_counter() - started))
    return statistics.median(rates)


def milliseconds(way: Way, files: list[bytes], repeats: int) -> float:
    """Returns the least processor time for one image."""
    times = []
    for file in files * repeats:
        started = time.process_time()
        way(file)
        times.append(1000 * (time.process_time() - started))
    return min(times)


def decode(sizes: dict[str, list[bytes]], options: argparse.Namespace) -> Iterator[Row]:
    """Measures every way with images of each size."""
    for size, files in sizes.items():
        many = [
            files[number % len(files)]
            for number in range(options.decoded // (1 if size == SMALL else 4))
        ]
        whole = torch.stack([WAYS["in full"](file) for file in files]).int()
        for name, way in WAYS.items():
            rates = {
                f"{n} workers": round(rate(way, many, n, options.repeats), 1)
                for n in options.workers
            }
            row: Row = {
                "size": size,
                "way": name,
                **rates,
                "cpu_ms": round(milliseconds(way, files, options.repeats), 1),
            }
            if (found := torch.stack([way(file) for file in files])).dtype == torch.uint8:
                off = (found.int() - whole).abs()
                row |= {
                    "mean_off": round(float(off.float().mean()), 2),
                    "largest_off": int(off.max()),
                }
            yield row


def index(files: list[bytes], model: str | Path, copies: int) -> Iterator[Row]:
    """Indexes images with and without `--fast-decode`, and compares the vectors."""
    vectors = {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "photos").mkdir()
        for number in range(copies * len(files)):
            (Path(name) / "photos" / f"{number:03}.jpg").write_bytes(files[number % len(files)])
        for fast in (False, True):
            predictor = load(model, device="cpu", fast_decode=fast)
            out = Path(name) / f"{fast}.lance"
            report = build_index(Path(name) / "photos", out, predictor, IndexConfig(num_workers=0))
            vectors[fast] = predictor.embed_images(files)
            row = {"fast_decode": fast, "images_per_s": round(report.images / report.seconds, 1)}
            if fast:
                both, others = (
                    (vectors[True] * vectors[False]).sum(1),
                    vectors[False] @ vectors[False].T,
                )
                mean = (others.sum() - others.trace()) / (others.numel() - len(others))
                row |= {"cosine": round(float(both.min()), 5), "others": round(float(mean), 5)}
            yield row


def prepared(count: int) -> Iterator[Row]:
    """Reads images of 640 x 480 out of a prepared set."""
    with tempfile.TemporaryDirectory() as name:
        share = PairsConfig(test_fraction=0.9, validation_fraction=0.05)
        data = DataConfig(folders=(str(make_set(Path(name), count, SIZES[SMALL], share)),))
        images = CaptionImages(data, "test", Processor(ORDINARY, None))
        images.contents([0])
        for batch in (1, 32):
            before, sizes = read_bytes(), list[int]()
            for numbers in torch.randperm(
                len(images), generator=torch.Generator().manual_seed(0)
            ).split(batch):
                sizes += map(len, images.contents(numbers.tolist()))
            read = read_bytes() - before
            figures = {"kib_of_a_file": round(statistics.mean(sizes) / 1024, 1)}
            yield {"batch": batch, **figures, "read_per_byte": round(read / sum(sizes), 2)}


def main() -> None:
    """Measures, prints tables and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4, help="different ones of each size")
    parser.add_argument(
        "--decoded", type=int, default=64, help="how many of 640 x 480; a quarter of others"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument(
        "--model", default=trained_model(FOLDER), help="that indexes; default: the demo's"
    )
    parser.add_argument("--prepared", type=int, default=400, help="images of the prepared set")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes: dict[str, list[bytes]] = {}
    for size, pixels in SIZES.items():
        generator, streams = np.random.default_rng(0), [io.BytesIO() for _ in range(options.images)]
        for stream in streams:
            photo(*pixels, generator).save(stream, "JPEG", quality=90)
        sizes[size] = [stream.getvalue() for stream in streams]
    show("decoding", decode(sizes, options))
    show("prepared set", prepared(options.prepared))
    show("index", index(sizes["12 megapixels"], options.model, 4))


if __name__ == "__main__":
    main()
