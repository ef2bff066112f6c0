"""Speed on a GPU: a training step, matching, reranking and reading images, beside transformers' model in the same run.

`python benchmarks/gpu.py` takes a GPU. With `--device cpu --tiny` it runs through on small models, whose numbers say
nothing about a GPU. Operations are counted on the meta device, two per multiply-add; recomputed ones are not counted.
Utilisation is operations per second over what the maker gives for dense products in bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from bridgetower.data.batch import IGNORED, CaptionBatch, StepSampler
from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.data.config import DataConfig
from bridgetower.data.own import PairsConfig, prepare_own
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import HeadsConfig, ModelConfig
from bridgetower.model.layers import autocast, on_meta
from bridgetower.model.presets import BASE, LARGE, NANO
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.processor import Processor, ProcessorConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig
from bridgetower.training.data_parallel import Replicated
from bridgetower.training.optim import build_optimizer, parameter_groups
from bridgetower.training.setup import TrainContext
from bridgetower.training.step import run_step

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Operations per second in bfloat16, dense, by what is in the device's name."""

WORDS = 50  # tokens of a text
PHASES = {
    "MLM + ITM": (Phase(mlm=1, itm=1), HeadsConfig()),
    "MLM + ITM + ITC": (Phase(mlm=1, itm=1, itc=1, negatives="hard"), HeadsConfig(itc="tower")),
}

Row = dict[str, Any]


def batch(config: ModelConfig, pairs: int) -> CaptionBatch:
    """Draws images and texts, a seventh of whose words are hidden."""
    generator, size = torch.Generator().manual_seed(0), config.vision.image_size
    length = min(WORDS, config.text.max_length)
    ids = torch.randint(5, config.text.vocab_size, (pairs, length), generator=generator)
    labels = torch.where(torch.arange(length) % 7 == 1, ids, IGNORED)
    return CaptionBatch(
        pixel_values=torch.randn(pairs, 3, size, size, generator=generator),
        input_ids=ids,
        masked_input_ids=ids,
        mlm_labels=labels,
        image_index=torch.arange(pairs),
        ids=tuple(map(str, range(pairs))),
    )


def tensors(given: CaptionBatch) -> tuple[Tensor, Tensor]:
    """Returns pixel values and token ids."""
    assert isinstance(given.pixel_values, Tensor)
    assert isinstance(given.input_ids, Tensor)
    return given.pixel_values, given.input_ids


def operations(run: Callable[[], object]) -> int:
    """Counts those of products, convolutions and attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Returns the median time after two runs that do not count."""
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def row(name: str, pairs: int, spent: float, counted: int, device: torch.device) -> Row:
    """Puts a measurement together; utilisation is unknown for devices that are not in `PEAKS`."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for part, peak in PEAKS.items() if part in kind), None)
    rate = counted / spent
    return {
        "name": name,
        "pairs_per_second": pairs / spent,
        "tflops": rate / 1e12,
        "mfu": None if peak is None else rate / peak,
    }


def model(config: ModelConfig, device: torch.device) -> BridgeTower:
    """Returns a model with random weights."""
    made = BridgeTower(config, generator=torch.Generator().manual_seed(0))
    return made.to(device)


def training(name: str, config: ModelConfig, device: torch.device, options: argparse.Namespace) -> Iterator[Row]:
    """Measures steps of pre-training in bfloat16, plain and with compiled layers."""
    for objectives, (phase, heads) in PHASES.items():
        settings, pairs = replace(config, heads=heads), options.pairs
        task = PretrainingConfig(phases=(phase,), mlm_normalization="official")
        counted = operations_of_step(settings, task, pairs)
        for compiled in (False, True):
            run = step(settings, task, device, pairs, backend=options.backend if compiled else None)
            label = f"{name}: {objectives} step{', compiled layers' * compiled}"
            yield row(label, pairs, seconds(run, device, options.repeats), counted, device)


def operations_of_step(config: ModelConfig, task: PretrainingConfig, pairs: int) -> int:
    """Counts a pass forward and backward, without memory for weights."""
    with on_meta():
        counted = PretrainingTask(BridgeTower(config).train(), task)
    moved = batch(config, pairs).to(torch.device("meta"))
    return operations(lambda: counted(moved).total.backward())


def step(
    config: ModelConfig, task: PretrainingConfig, device: torch.device, pairs: int, *, backend: str | None
) -> Callable[[], object]:
    """Returns what runs one step of one micro-batch, the optimiser included."""
    network = model(config, device).train()
    if backend is not None:
        network.compile_layers(backend)
    run = RunConfig(
        task=task,
        model=config,
        optimizer=OptimizerConfig(rule="hf_adamw"),
        batch_size=pairs,
        max_steps=10**6,
        precision="bf16",
        select_by="itm_accuracy",
    )
    parts = TrainContext(
        config=run,
        task=PretrainingTask(network, task),
        model=network,
        examples=CaptionPairs.__new__(CaptionPairs),  # not read: the batches are handed over
    )
    optimizer, wrapped = (
        build_optimizer(parameter_groups(network, run.optimizer), run.optimizer),
        Replicated(parts.task),
    )
    batches = itertools.repeat(batch(config, pairs).pin_memory() if device.type == "cuda" else batch(config, pairs))
    return lambda: run_step(wrapped, parts, optimizer, batches, 0)


@torch.inference_mode()
def inference(name: str, config: ModelConfig, device: torch.device, options: argparse.Namespace) -> list[Row]:
    """Measures matching of pairs, and of one image with many texts, in bfloat16."""
    network, moved, pairs = model(config, device).eval(), batch(config, options.pairs).to(device), options.pairs
    with on_meta():
        counted = BridgeTower(config).eval()
    meta = moved.to(torch.device("meta"))

    def match(network: BridgeTower, given: CaptionBatch) -> Tensor:
        return network.itm_logits(network(*tensors(given), outputs="pooled").pooled)

    def rerank(network: BridgeTower, given: CaptionBatch) -> Tensor:
        pixels, ids = tensors(given)
        image, text = network.cache_image(network.encode_image(pixels[:1])), network.encode_text(ids)
        rows = torch.zeros(len(text), dtype=torch.long, device=ids.device)
        return network.itm_logits(network.fuse(image[rows], text).pooled)

    rows = []
    with autocast(device, "bf16"):
        for kind, run in (("match", match), ("rerank one image with as many texts", rerank)):
            spent = seconds(lambda run=run: run(network, moved), device, options.repeats)  # type: ignore[misc]
            rows.append(row(f"{name}: {kind}", pairs, spent, operations(lambda run=run: run(counted, meta)), device))  # type: ignore[misc]
    return rows


def others(name: str, config: ModelConfig, device: torch.device, options: argparse.Namespace) -> Iterator[Row]:
    """Measures transformers' model at the same sizes: its step of MLM and of ITM, each with a pass of its own."""
    from transformers import BridgeTowerConfig, BridgeTowerForImageAndTextRetrieval, BridgeTowerForMaskedLM

    vision, text, fusion = config.vision, config.text, config.fusion
    sizes = BridgeTowerConfig(
        hidden_size=fusion.hidden_size,
        num_attention_heads=fusion.num_heads,
        num_hidden_layers=fusion.num_layers,
        vision_config={
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
        },
        text_config={
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "intermediate_size": text.intermediate_size,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_positions,
        },
    )
    given, pairs = batch(config, options.pairs).to(device), options.pairs
    pixels, ids = tensors(given)
    inputs = {"pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    matches = torch.arange(pairs, device=device) % 2
    for compiled in (False, True):
        words: Any = BridgeTowerForMaskedLM(sizes).to(device).train()
        pooled: Any = BridgeTowerForImageAndTextRetrieval(sizes).to(device).train()
        optimizer = torch.optim.AdamW([*words.parameters(), *pooled.parameters()], fused=True)
        if compiled:
            words.compile(backend=options.backend)
            pooled.compile(backend=options.backend)

        def run(words: Any = words, pooled: Any = pooled, optimizer: Any = optimizer) -> None:
            with autocast(device, "bf16"):
                loss = words(input_ids=given.masked_input_ids, labels=given.mlm_labels, **inputs).loss
                loss = loss + pooled(input_ids=given.input_ids, labels=matches, **inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        label = f"{name}: MLM + ITM step of transformers{', compiled' * compiled}"
        yield row(label, pairs, seconds(run, device, options.repeats), 0, device)


def reading(config: ModelConfig, workers: int, images: int) -> Row:
    """Measures how many images a second are decoded, resized and augmented."""
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), np.random.default_rng(0)
        lines = ["image,caption"]
        for number in range(images):
            pixels = source.integers(0, 255, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((640, 480)).save(folder / f"{number}.jpg")
            lines.append(f"{number}.jpg,image {number}")
        (folder / "captions.csv").write_text("\n".join(lines))
        prepare_own("pairs", folder / "captions.csv", folder / "set", PairsConfig())
        data = DataConfig(folders=(str(folder / "set"),), augmentation="affine", num_workers=workers)
        processor = Processor(
            ProcessorConfig(profile="official-pretrain", image_size=config.vision.image_size, max_length=WORDS), None
        )
        pictures = CaptionImages(data, "train", processor)
        pictures.raw = True
        size = min(16, len(pictures))
        sampler = StepSampler(len(pictures), batch_size=size, micro_batches=1, steps=range(8), seed=0)
        views = _Views(pictures)
        loader: Any = DataLoader(views, sampler=sampler, batch_size=None, num_workers=workers)  # type: ignore[arg-type]
        source_of = iter(loader)
        next(source_of)
        started = time.perf_counter()
        count = sum(len(pixels) for pixels in source_of)
        return {
            "name": f"images read by {workers} workers",
            "images_per_second": count / (time.perf_counter() - started),
        }


class _Views:
    """Views of images by the numbers of a batch."""

    def __init__(self, images: CaptionImages) -> None:
        self.images = images

    def __getitem__(self, key: Any) -> Any:
        return self.images.views(list(key.examples), torch.Generator().manual_seed(key.seed))


def main() -> None:
    """Measures, prints a table and, if asked to, writes a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="such as cuda:1 or cpu")
    parser.add_argument("--models", nargs="+", choices=["base", "large"], default=["base", "large"])
    parser.add_argument("--pairs", type=int, default=64, help="in a batch")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--workers", type=int, default=16, help="processes that read images")
    parser.add_argument("--images", type=int, default=512, help="that are read")
    parser.add_argument("--tiny", action="store_true", help="a small model in place of the published ones")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    options.backend = "eager" if options.tiny else "inductor"  # which takes minutes to compile
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --tiny tries the benchmark without one")
    presets = {"base": BASE, "large": LARGE}
    models = {"tiny": NANO} if options.tiny else {name: presets[name] for name in options.models}
    rows: list[Row] = []
    for name, config in models.items():
        rows += training(name, config, device, options)
        rows += inference(name, config, device, options)
        if not options.without_transformers:
            rows += others(name, config, device, options)
    rows.append(reading(next(iter(models.values())), options.workers, options.images))
    for each in rows:
        figures = (f"{key} {value:.4g}" for key, value in each.items() if isinstance(value, float))
        print(f"{each['name']:64}{'  '.join(figures)}")
    if options.json:
        options.json.write_text(json.dumps({"device": str(device), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
