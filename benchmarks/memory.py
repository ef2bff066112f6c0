"""Memory of loading, evaluating and training: python benchmarks/memory.py; prints tables and JSON.

Each row is a process of its own; `mib` is how far it rises. `load`: a model of random weights. `retrieval`: an
evaluation of the nano model on a set and on one ten times larger; `peak` is of the process's own memory, looked at
every few milliseconds. `step`: the nano model with ITC, as one batch, in micro-batches that contrast on their own, and
in micro-batches that contrast over the step; `peak` leaves out the loaded process.
"""

import argparse
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bridgetower.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from bridgetower.data.batches.batch import CaptionBatch
from bridgetower.data.batches.captions import CaptionImages, CaptionPairs
from bridgetower.data.batches.examples import PreparedImages
from bridgetower.data.config import DataConfig
from bridgetower.data.sets.custom import PairsConfig, prepare_custom
from bridgetower.evaluation.config import EvaluationOptions, RetrievalConfig
from bridgetower.evaluation.retrieval import evaluate_retrieval
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import ModelConfig
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.presets import BASE, NANO
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.data_parallel import Replicated
from bridgetower.training.optim import build_optimizer, parameter_groups
from bridgetower.training.setup import TrainContext
from bridgetower.training.step import run_step
from search import Row, alone, resident, show

PARTS = ["load", "retrieval", "step"]
WORDS = [f"word{number}" for number in range(300)]
SHAPE = ProcessorConfig(
    profile="official-pretrain", image_size=NANO.vision.image_size, max_length=40
)
TOKENS, MICRO = 16, 64  # of a pair, and pairs
WAYS: dict[str, dict[str, Any]] = {
    "one batch": {"micro_batch_size": None},
    f"micro-batches of {MICRO}": {"micro_batch_size": MICRO},
    f"micro-batches of {MICRO}, --contrast-over step": {
        "micro_batch_size": MICRO,
        "contrast_over": "step",
    },
}


def read_bytes() -> int:
    """Bytes that this process has asked the system for, in its cache or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def save_model(config: ModelConfig, folder: Path) -> int:
    """Writes a model of random weights; returns the MiB of them."""
    tokenizer = train_tokenizer([" ".join(WORDS)], vocab_size=1000)
    values = ProcessorConfig(
        profile="official-pretrain", image_size=config.vision.image_size, max_length=40
    )
    processor = Processor(values, tokenizer)
    config = config.override({"text.vocab_size": max(config.text.vocab_size, processor.vocab_size)})
    model = BridgeTower(config, generator=torch.Generator().manual_seed(0))
    write_checkpoint(
        Checkpoint(
            source="random weights", config=config, tensors=model.state_dict(), processor=processor
        ),
        folder,
    )
    return (folder / "model.safetensors").stat().st_size // 2**20


def make_set(folder: Path, count: int, size: tuple[int, int], config: PairsConfig) -> Path:
    """Writes noisy images with captions of twelve words, and prepares them; returns the set."""
    folder.mkdir(exist_ok=True)
    generator, lines = np.random.default_rng(0), ["image,caption"]
    for number in range(count):
        coarse = Image.fromarray(
            generator.integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
        )
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        lines.append(f"{number}.jpg,{' '.join(generator.choice(WORDS, 12))}")
    (folder / "captions.csv").write_text("\n".join(lines))
    prepare_custom("pairs", folder / "captions.csv", folder / "set", config)
    return folder / "set"


def load(sizes: list[str]) -> Iterator[Row]:
    """Loads models with all of their weights in use."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            weights = save_model({"nano": NANO, "base": BASE}[size], Path(name) / "model")
            yield {"model": size, "file_mib": weights, **alone(_load, Path(name) / "model")}


def _load(folder: Path) -> Row:
    total = sum(
        float(weight.detach().sum())
        for weight in read_checkpoint(folder).model(copy=False).parameters()
    )
    assert np.isfinite(total)
    return {}


def retrieval(count: int) -> Iterator[Row]:
    """Evaluates on sets, each time after a small one for what any first evaluation takes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(NANO, folder / "nano")
        for images in (16, count, 10 * count):
            share = 1 / (images + 2)
            config = PairsConfig(test_fraction=1 - 2 * share, validation_fraction=share)
            make_set(folder / str(images), images + 2, (60, 60), config)
        for images in (count, 10 * count):
            yield alone(_retrieval, folder / "nano", folder / "16", folder / str(images))


def _retrieval(folder: Path, *sets: Path) -> Row:
    torch.set_num_threads(1)
    checkpoint = read_checkpoint(folder)
    model, processor = checkpoint.model().eval(), checkpoint.processor
    assert processor is not None
    optimize_for_cpu(model)
    config = RetrievalConfig(candidates=2)
    small, images = (
        CaptionImages(DataConfig(folders=(str(one / "set"),)), "test", processor) for one in sets
    )
    evaluate_retrieval(model, small, config)
    before = resident("RssAnon")
    with tempfile.TemporaryDirectory() as work, _watched() as highest:
        evaluate_retrieval(model, images, config, EvaluationOptions(work=Path(work)))
    return {"images": len(images), "peak": highest[-1] - before}


@contextmanager
def _watched() -> Iterator[list[int]]:
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


def step(sizes: list[int]) -> Iterator[Row]:
    """Runs two steps of so many pairs in each way."""
    for pairs in sizes:
        for way, settings in WAYS.items():
            yield {"pairs": pairs, "way": way, **alone(_step, pairs, settings)}


def _step(pairs: int, settings: dict[str, Any]) -> Row:
    torch.set_num_threads(1)
    task = PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=1),))
    config = RunConfig(
        task=task, model=NANO, batch_size=pairs, max_steps=2, device="cpu", **settings
    )
    model = BridgeTower(NANO, generator=torch.Generator().manual_seed(0))
    optimize_for_cpu(model)
    optimizer = build_optimizer(parameter_groups(model, config.optimizer), config.optimizer)
    setup = Replicated(PretrainingTask(model, task).train())
    pictures = PreparedImages.__new__(PreparedImages)
    pictures.processor = Processor(SHAPE, None)  # what is read of them
    examples = CaptionPairs.__new__(CaptionPairs)  # not read: the batches are handed over
    parts = TrainContext(
        config=config, task=setup.task, model=model, examples=examples, images=(pictures, pictures)
    )
    batches, before = (
        _micro_batches(min(pairs, config.micro_batch_size or pairs)),
        resident("VmRSS"),
    )
    for number in range(2):
        run_step(setup, parts, optimizer, batches, number)
    return {"peak": resident("VmHWM") - before}


def _micro_batches(size: int) -> Iterator[CaptionBatch]:
    """Random pictures and texts, made when they are asked for."""
    generator, number, side = torch.Generator().manual_seed(0), 0, NANO.vision.image_size
    while True:
        ids = torch.randint(5, NANO.text.vocab_size, (size, TOKENS), generator=generator)
        yield CaptionBatch(
            pixel_values=torch.randint(
                256, (size, 3, side, side), generator=generator, dtype=torch.uint8
            ),
            input_ids=ids,
            masked_input_ids=ids,
            mlm_labels=torch.where(torch.arange(TOKENS) == 1, ids, -100),
            image_index=torch.arange(number, number + size),
        )
        number += size


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument(
        "--models", nargs="+", choices=["nano", "base"], default=["nano", "base"], help="of `load`"
    )
    parser.add_argument("--images", type=int, default=700, help="of the smaller set of `retrieval`")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[128, 512, 2048], help="pairs of a `step`"
    )
    given = parser.parse_args()
    if "load" in given.parts:
        show("load", load(given.models))
    if "retrieval" in given.parts:
        show("retrieval", retrieval(given.images))
    if "step" in given.parts:
        show("step", step(given.batches))


if __name__ == "__main__":
    main()
