"""Memory of a training set in every process that decodes: two sets, the second twenty times larger.

    python benchmarks/set_memory.py

Each set has five captions of 12 words per image, all with the same small image. The first number is what opening the
set adds to the process; the second is what a forked worker has for itself after it has read the captions and the id of
every pair once, in random order.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.data.records import ImageFile, Record, write_split
from bridgetower.processor import Processor, ProcessorConfig

WORDS = 12
CAPTIONS = 5


def private() -> float:
    """MiB of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def write_set(folder: Path, count: int) -> Path:
    """Writes a set with so many images."""
    stream = BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    file = ImageFile("image.png", stream.getvalue())

    def captions(image: int) -> list[str]:
        return [" ".join(f"word{image + n + word}" for word in range(WORDS)) for n in range(CAPTIONS)]

    records = (Record(image_id=f"image-{n:012d}", images=[file], entries=captions(n)) for n in range(count))
    write_split(folder / "train.parquet", records)
    return folder


def read_all(pairs: CaptionPairs) -> float:
    """Forks a worker that reads every pair; returns the MiB that it has for itself more than one that reads none."""
    found: list[float] = []
    for reads in (False, True):
        reading, writing = os.pipe()
        if os.fork() == 0:
            if reads:
                generator = torch.Generator().manual_seed(0)
                for batch in torch.randperm(len(pairs), generator=generator).split(1000):
                    for image, number in pairs.pairs[batch].tolist():
                        assert pairs.images.image_ids[image]
                        assert pairs.images.caption(image, number, generator)
            os.write(writing, str(private()).encode())
            os._exit(0)
        found.append(float(os.read(reading, 100)))
        os.wait()
    return found[1] - found[0]


def measure(folder: Path) -> dict[str, float]:
    """Opens a set and reads it in a worker."""
    torch.set_num_threads(1)
    processor = Processor(ProcessorConfig(profile="official-pretrain", image_size=4, max_length=40), None)
    before = private()
    pairs = CaptionPairs(CaptionImages(DataConfig(folders=(str(folder),)), "train", processor), MaskingConfig())
    opened = private() - before
    return {"pairs": len(pairs), "opened_mib": round(opened, 1), "worker_mib": round(read_all(pairs), 1)}


def main() -> None:
    """Prints a line of JSON per set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 200_000], help="of each set")
    for count in parser.parse_args().images:
        with tempfile.TemporaryDirectory() as name:
            folder = write_set(Path(name), count)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                print(json.dumps({"images": count, **pool.submit(measure, folder).result()}), flush=True)


if __name__ == "__main__":
    main()
