"""Memory of a training set in every process that decodes: two sets, the second twenty times larger.

    python benchmarks/set_memory.py

Each set has five captions of 12 words per image, all with the same small image. The first number is what opening the
set adds to the process; the second is what a worker has for itself after it has read the captions and the id of every
pair once, in random order, more than one that reads nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from PIL import Image as PillowImage

from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.data.config import DataConfig, MaskingConfig, WritingConfig
from bridgetower.data.example import Image
from bridgetower.data.prepared_set import DatasetInfo, SetWriter
from bridgetower.data.schema import CAPTIONS
from bridgetower.processor import Processor, ProcessorConfig

WORDS = 12
CAPTIONS_EACH = 5


def private() -> float:
    """MiB of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def write_set(folder: Path, count: int) -> Path:
    """Writes a set with so many images."""
    info = DatasetInfo(name="memory", split_rule="all is train")
    with SetWriter(folder, CAPTIONS, WritingConfig(), progress=False) as writer:
        for number in range(count):
            stream = BytesIO()
            PillowImage.new("RGB", (4, 4), (number % 256, number // 256 % 256, number // 65536)).save(stream, "PNG")
            captions = [" ".join(f"word{number + n + word}" for word in range(WORDS)) for n in range(CAPTIONS_EACH)]
            name = f"image-{number:012d}"
            writer.add([Image(name=name, place=name, content=stream.getvalue())], captions, split="train")
        writer.finish(folder, info)
    return folder


def read_all(pairs: CaptionPairs | None, results: Queue[float]) -> None:
    """Reads every pair in random order, in a worker; None only imports what that takes."""
    import lancedb  # noqa: F401

    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).split(1000) if pairs else ()
    for batch in order:
        assert pairs
        pairs.images.chosen(pairs.pairs[batch].tolist(), torch.Generator().manual_seed(0))
    results.put(private())


def in_worker(pairs: CaptionPairs | None) -> float:
    """MiB that a process has for itself after it has read."""
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    worker = context.Process(target=read_all, args=(pairs, results))
    worker.start()
    found: float = results.get()
    worker.join()
    return found


def measure(folder: Path) -> dict[str, float]:
    """Opens a set and reads it in a worker."""
    torch.set_num_threads(1)
    import lancedb  # noqa: F401

    processor = Processor(ProcessorConfig(profile="official-pretrain", image_size=4, max_length=40), None)
    before = private()
    pairs = CaptionPairs(CaptionImages(DataConfig(folders=(str(folder),)), "train", processor), MaskingConfig())
    opened = private() - before
    worker = in_worker(pairs) - in_worker(None)
    return {"pairs": len(pairs), "opened_mib": round(opened, 1), "worker_mib": round(worker, 1)}


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
