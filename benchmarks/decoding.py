"""Images per second that are decoded and resized, in this process and in others, in full and at reduced scale.

    python benchmarks/decoding.py

Photo-like JPEGs are generated: noise whose strength falls with its frequency as that of photos does (1/f). They are
brought to the input of the base model, 288 x 288. Beside the rates, which other processes on the machine lower, stand
the milliseconds of the processor for one image, and by how much the pixels of `fast_decode` differ.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bridgetower.processor import Processor, ProcessorConfig, loaded

SIZES = {"12 megapixels": (4000, 3000), "640 x 480": (640, 480)}
ORDINARY = ProcessorConfig(profile="official-pretrain", image_size=288, max_length=50)
BATCH = 8


def photo(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """Returns an image with the spectrum of a photo, in colours that belong together."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    shared = _noise(frequency, width, height, generator)
    channels = [shared + 0.4 * _noise(frequency, width, height, generator) for _ in range(3)]
    levels = [128 + 50 * channel / channel.std() for channel in channels]
    return Image.fromarray(np.stack(levels, axis=-1).clip(0, 255).astype(np.uint8))


def _noise(frequency: np.ndarray, width: int, height: int, generator: np.random.Generator) -> np.ndarray:
    spectrum = np.fft.rfft2(generator.standard_normal((height, width)))
    field: np.ndarray = np.fft.irfft2(spectrum / frequency, s=(height, width))
    return field / field.std()


def rate(processor: Processor, paths: list[Path], workers: int, repeats: int) -> float:
    """Returns the median of images per second; starting the processes counts."""
    batches, rates = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)], []
    for _ in range(repeats):
        started = time.perf_counter()
        done = sum(len(batch) for batch in loaded(processor.resize, batches, num_workers=workers))
        rates.append(done / (time.perf_counter() - started))
    return statistics.median(rates)


def milliseconds(processor: Processor, paths: list[Path], repeats: int) -> float:
    """Returns the least processor time for one image."""
    times = []
    for path in paths * repeats:
        started = time.process_time()
        processor.resize(path)
        times.append(1000 * (time.process_time() - started))
    return min(times)


def pixels(processor: Processor, paths: list[Path]) -> Tensor:
    """Returns the resized images as numbers that can be subtracted."""
    return torch.stack([processor.resize(path) for path in paths]).int()


def main() -> None:
    """Measures, prints a table and, if asked to, writes a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="different ones of each size")
    parser.add_argument(
        "--decoded", type=int, default=64, help="how many are decoded of 640 x 480; a quarter of others"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = {fast: Processor(replace(ORDINARY, fast_decode=fast), None) for fast in (False, True)}
    heads = "".join(f"{f'{workers} workers':>12}" for workers in options.workers)
    print(f"{'images per second':22}{'decoded':>12}{heads}{'CPU ms':>10}{'mean off':>10}{'largest':>9}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for size, (width, height) in SIZES.items():
            generator = np.random.default_rng(0)
            paths = [Path(name) / f"{size}-{number}.jpg" for number in range(options.images)]
            for path in paths:
                photo(width, height, generator).save(path, quality=90)
            count = options.decoded // (1 if width < 1000 else 4)
            many = [paths[number % len(paths)] for number in range(count)]
            whole = pixels(ways[False], paths)
            for fast, processor in ways.items():
                off = (pixels(processor, paths) - whole).abs()
                rates = {workers: rate(processor, many, workers, options.repeats) for workers in options.workers}
                busy = milliseconds(processor, paths, options.repeats)
                mean, largest = float(off.float().mean()), int(off.max())
                rows.append(
                    {
                        "size": size,
                        "fast": fast,
                        "per_second": rates,
                        "cpu_ms": busy,
                        "mean_off": mean,
                        "largest_off": largest,
                    }
                )
                numbers = "".join(f"{rates[workers]:12.1f}" for workers in options.workers)
                way = "reduced" if fast else "in full"
                print(f"{size:22}{way:>12}{numbers}{busy:10.1f}{mean:10.2f}{largest:9}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
