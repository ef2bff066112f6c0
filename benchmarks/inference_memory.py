"""Peak memory of loading a model, and of evaluating retrieval on a set and on one ten times larger.

    python benchmarks/inference_memory.py

Each row is a process of its own. Models have random weights; images are noise, captions of 12 words. Of an evaluation
it is the memory of the process's own, looked at every few milliseconds.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bridgetower.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from bridgetower.data.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.data.own import PairsConfig, prepare_own
from bridgetower.evaluation.config import EvaluationOptions, RetrievalConfig
from bridgetower.evaluation.retrieval import evaluate_retrieval
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import ModelConfig
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.presets import BASE, NANO
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer

WORDS = [f"word{number}" for number in range(300)]
CANDIDATES = 2


def resident(name: str) -> int:
    """MiB of memory of this process: `VmRSS` now, `RssAnon` its own now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))


@contextmanager
def watched() -> Iterator[list[int]]:
    """Gives a list whose last number is the highest MiB of the process's own memory so far."""
    highest, ended = [resident("RssAnon")], threading.Event()

    def look() -> None:
        while not ended.wait(0.005):
            highest.append(max(highest.pop(), resident("RssAnon")))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield highest
    finally:
        ended.set()
        watcher.join()


def save_model(config: ModelConfig, folder: Path) -> int:
    """Writes a model of random weights; returns the MiB of them."""
    tokenizer = train_tokenizer([" ".join(WORDS)], vocab_size=1000)
    values = ProcessorConfig(profile="official-pretrain", image_size=config.vision.image_size, max_length=40)
    processor = Processor(values, tokenizer)
    config = config.override({"text.vocab_size": max(config.text.vocab_size, processor.vocab_size)})
    model = BridgeTower(config, generator=torch.Generator().manual_seed(0))
    write_checkpoint(
        Checkpoint(source="random weights", config=config, tensors=model.state_dict(), processor=processor), folder
    )
    return (folder / "model.safetensors").stat().st_size // 2**20


def make_set(folder: Path, count: int) -> Path:
    """Prepares a set with so many images for testing."""
    folder.mkdir()
    generator, lines = np.random.default_rng(0), ["image,caption"]
    for number in range(count + 2):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((60, 60), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        lines.append(f"{number}.jpg,{' '.join(generator.choice(WORDS, 12))}")
    (folder / "captions.csv").write_text("\n".join(lines))
    share = 1 / (count + 2)
    config = PairsConfig(test_fraction=1 - 2 * share, validation_fraction=share)
    prepare_own("pairs", folder / "captions.csv", folder / "set", config)
    return folder / "set"


def loading(folder: Path) -> dict[str, int]:
    """Loads a model with all of its weights in use."""
    before, model = resident("VmRSS"), read_checkpoint(folder).model(copy=False)
    total = sum(float(parameter.detach().sum()) for parameter in model.parameters())
    assert np.isfinite(total)
    return {"peak": resident("VmHWM") - before}


def evaluating(folder: Path, dataset: Path, warm: Path) -> dict[str, int]:
    """Evaluates a model on a set, after a small one for what any first evaluation takes."""
    torch.set_num_threads(1)
    checkpoint = read_checkpoint(folder)
    model, processor = checkpoint.model().eval(), checkpoint.processor
    assert processor is not None
    optimize_for_cpu(model)
    config = RetrievalConfig(candidates=CANDIDATES)
    small, images = (CaptionImages(DataConfig(folders=(str(place),)), "test", processor) for place in (warm, dataset))
    evaluate_retrieval(model, small, config)
    before = resident("RssAnon")
    with tempfile.TemporaryDirectory() as work, watched() as highest:
        evaluate_retrieval(model, images, config, EvaluationOptions(work=Path(work)))
    return {"images": len(images), "peak": highest[-1] - before}


def alone(function: Callable[..., dict[str, int]], *arguments: object) -> dict[str, int]:
    """Calls a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """Measures, prints a table and, if asked to, writes a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=700, help="of the small set")
    parser.add_argument("--skip-base", action="store_true", help="do not load the base model, which takes 4 GB of disk")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"nano": NANO} if options.skip_base else {"nano": NANO, "base": BASE}
        for size, config in models.items():
            file = save_model(config, folder / size)
            peak = alone(loading, folder / size)["peak"]
            rows.append({"name": f"load {size}", "file": file, "peak": peak})
            print(f"load {size}: file {file} MiB, peak {peak} MiB", flush=True)
        warm = make_set(folder / "warm", 16)
        sets = [make_set(folder / str(count), count) for count in (options.images, 10 * options.images)]
        for dataset in sets:
            found = alone(evaluating, folder / "nano", dataset, warm)
            rows.append({"name": "evaluate", **found})
            print(f"evaluate {found['images']} images: peak {found['peak']} MiB", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
