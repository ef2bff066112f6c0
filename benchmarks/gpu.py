"""Speed on a GPU: training steps, with reading too, matching and reranking, beside transformers' model in the same run.

`python benchmarks/gpu.py` takes a GPU. With `--device cpu --tiny` it runs through on small models, whose numbers say
nothing about a GPU. Operations are counted on the meta device, two per multiply-add; recomputed ones are not counted.
Utilisation is operations per second over what the maker gives for dense products in bfloat16; waiting is the share of
time for which a step waits for its batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bridgetower.checkpoints import Checkpoint
from bridgetower.checkpoints.huggingface import export
from bridgetower.data.batches.batch import IGNORED, CaptionBatch, StepSampler
from bridgetower.data.batches.captions import CaptionImages, CaptionPairs
from bridgetower.data.sets.custom import PairsConfig, prepare_custom
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import HeadsConfig, ModelConfig
from bridgetower.model.layers import autocast, on_meta
from bridgetower.model.presets import BASE, LARGE
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.processor import Processor, ProcessorConfig, load_items, train_tokenizer
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.table import RECIPES
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
_SMALL = {"hidden_size": 64, "num_heads": 1, "num_layers": 2, "intermediate_size": 256}
TINY = BASE.override(
    {
        f"{part}.{name}": size
        for part in ("vision", "text", "fusion")
        for name, size in _SMALL.items()
    }
)
TINY = TINY.override({"vision.image_size": 64})

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


def times(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    found = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return found


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Returns the median time after two runs that do not count."""
    return statistics.median(times(run, device, repeats + 2)[2:])


def row(name: str, pairs: int, spent: float, counted: int, device: torch.device) -> Row:
    """Puts a measurement together; utilisation is unknown for devices that are not in `PEAKS`."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for part, peak in PEAKS.items() if part in kind), None)
    rate, memory = (
        counted / spent,
        torch.cuda.max_memory_allocated(device) / 2**30 if kind else None,
    )
    return {
        "name": name,
        "pairs_per_second": pairs / spent,
        "tflops": rate / 1e12,
        "mfu": None if peak is None else rate / peak,
        "memory_gib": memory,
    }


def training(
    name: str, config: ModelConfig, device: torch.device, options: argparse.Namespace
) -> Iterator[Row]:
    """Measures steps of pre-training in bfloat16, plain and with compiled layers."""
    for objectives, (phase, heads) in PHASES.items():
        task, pairs = (
            PretrainingConfig(phases=(phase,), mlm_normalization="official"),
            options.pairs,
        )
        run = replace(
            RECIPES["pretrain-base"],
            task=task,
            model=replace(config, heads=heads),
            batch_size=pairs,
        )
        given = batch(run.model, pairs)
        given = given.pin_memory() if device.type == "cuda" else given
        for backend, kind in ((None, ""), (options.backend, ", compiled layers")):
            spent = seconds(
                step(run, device, backend, itertools.repeat(given)), device, options.repeats
            )
            yield row(
                f"{name}: {objectives} step{kind}", pairs, spent, operations_of_step(run), device
            )


def task_of(run: RunConfig, network: BridgeTower) -> PretrainingTask:
    assert isinstance(run.task, PretrainingConfig)
    return PretrainingTask(network.train(), run.task)


def operations_of_step(run: RunConfig) -> int:
    """Counts a pass forward and backward, without memory for weights."""
    with on_meta():
        counted = task_of(run, BridgeTower(run.model))
    moved = batch(run.model, run.batch_size).to(torch.device("meta"))
    return operations(lambda: counted(moved).total.backward())


def step(
    run: RunConfig,
    device: torch.device,
    backend: str | None,
    batches: Iterator[Any],
    *images: CaptionImages,
) -> Callable[[], object]:
    """Returns what runs one step of one micro-batch, the optimiser included."""
    network = BridgeTower(run.model).to(device)
    run = replace(run, micro_batch_size=None, max_steps=10**6, max_epochs=None)
    if backend is not None:
        network.compile_layers(backend)
    examples = CaptionPairs.__new__(CaptionPairs)  # not read: the batches are handed over
    parts = TrainContext(
        config=run, task=task_of(run, network), model=network, examples=examples, images=images
    )
    optimizer = build_optimizer(parameter_groups(network, run.optimizer), run.optimizer)
    wrapped = Replicated(parts.task)
    return lambda: run_step(wrapped, parts, optimizer, batches, 0)


@torch.inference_mode()
def inference(
    name: str, config: ModelConfig, device: torch.device, options: argparse.Namespace
) -> list[Row]:
    """Measures matching of pairs, and of one image with many texts, in bfloat16."""
    network, moved, pairs = (
        BridgeTower(config).to(device),
        batch(config, options.pairs).to(device),
        options.pairs,
    )
    network.eval()
    with on_meta():
        counted = BridgeTower(config).eval()
    meta = moved.to(torch.device("meta"))

    def match(network: BridgeTower, given: CaptionBatch) -> Tensor:
        return network.itm_logits(network(*tensors(given), outputs="pooled").pooled)

    def rerank(network: BridgeTower, given: CaptionBatch) -> Tensor:
        pixels, ids = tensors(given)
        image, text = (
            network.cache_image(network.encode_image(pixels[:1])),
            network.encode_text(ids),
        )
        rows = torch.zeros(len(text), dtype=torch.long, device=ids.device)
        return network.itm_logits(network.fuse(image[rows], text).pooled)

    rows = []
    with autocast(device, "bf16"):
        for kind, run in (("match", match), ("rerank one image with as many texts", rerank)):
            spent = seconds(partial(run, network, moved), device, options.repeats)
            counted_operations = operations(partial(run, counted, meta))
            rows.append(row(f"{name}: {kind}", pairs, spent, counted_operations, device))
    return rows


def others(
    name: str, config: ModelConfig, device: torch.device, options: argparse.Namespace
) -> Iterator[Row]:
    """Measures transformers' model at the same sizes: its step of MLM and of ITM, each with a pass of its own."""
    from transformers import (
        BridgeTowerConfig,
        BridgeTowerForImageAndTextRetrieval,
        BridgeTowerForMaskedLM,
    )

    with on_meta():
        checkpoint = Checkpoint(
            source=name, config=config, tensors=BridgeTower(config).state_dict()
        )
    sizes = BridgeTowerConfig(**export(checkpoint)[0])
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
                loss = words(
                    input_ids=given.masked_input_ids, labels=given.mlm_labels, **inputs
                ).loss
                loss = loss + pooled(input_ids=given.input_ids, labels=matches, **inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        label = f"{name}: MLM + ITM step of transformers{', compiled' * compiled}"
        yield row(label, pairs, seconds(run, device, options.repeats), 0, device)


def fine_tuning(
    name: str, config: ModelConfig, device: torch.device, options: argparse.Namespace
) -> Iterator[Row]:
    """Measures steps with their reading, as of Hugging Face's post on fine-tuning: ITC, 48 pairs of the model large.

    It gave about 75 pairs a second on each H100: huggingface.co/blog/bridgetower.
    """
    recipe, letters = RECIPES["contrastive-large"], np.random.default_rng(0)
    pairs = options.pairs if options.tiny else 48
    run = replace(recipe, model=replace(config, heads=recipe.model.heads), batch_size=pairs)
    with tempfile.TemporaryDirectory() as written:
        folder, lines = Path(written), ["image,caption"]
        for number in range(options.images):
            pixels = letters.integers(0, 255, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((640, 480)).save(folder / f"{number}.jpg")
            lines.append(
                f"{number}.jpg,{' '.join(letters.choice(list('abcdefghijklmnop'), WORDS - 2))}"
            )
        (folder / "captions.csv").write_text("\n".join(lines))
        prepare_custom("pairs", folder / "captions.csv", folder / "set", PairsConfig())
        data = replace(recipe.data, folders=(str(folder / "set"),))
        tokenizer = train_tokenizer([line.partition(",")[2] for line in lines], vocab_size=300)
        values = ProcessorConfig(
            profile="official-pretrain", image_size=config.vision.image_size, max_length=WORDS
        )
        examples = CaptionPairs(CaptionImages(data, "train", Processor(values, tokenizer)), None)
        examples.images.raw = True
        ahead = 2 * options.workers + 2  # batches, which are read while kernels are compiled
        waits, steps = list[float](), ahead + max(ahead, options.repeats)

        def batches() -> Iterator[CaptionBatch]:
            sampler = StepSampler(
                len(examples), batch_size=pairs, micro_batches=1, steps=range(steps), seed=0
            )
            read = load_items(
                examples.__getitem__, sampler, num_workers=options.workers, device=device
            )
            for _ in range(steps):
                started = time.perf_counter()
                given = next(read)
                waits.append(time.perf_counter() - started)
                yield given

        deque(batches(), maxlen=0)
        rate = pairs / statistics.mean(waits[ahead:])
        yield {"name": f"{name}: pairs read by {options.workers} workers", "pairs_per_second": rate}
        for backend, kind in ((None, ""), (options.backend, ", compiled layers")):
            waits.clear()
            spent = statistics.mean(
                times(step(run, device, backend, batches(), examples.images), device, steps)[ahead:]
            )
            found = row(
                f"{name}: ITC step with reading{kind}",
                pairs,
                spent,
                operations_of_step(run),
                device,
            )
            yield {**found, "waiting": statistics.mean(waits[ahead:]) / spent}


def main() -> None:
    """Measures, prints a table and, if asked to, writes a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="such as cuda:1 or cpu")
    parser.add_argument("--models", nargs="+", choices=["base", "large"], default=["base", "large"])
    parser.add_argument("--pairs", type=int, default=64, help="in a batch")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--workers", type=int, default=16, help="processes that read images")
    parser.add_argument("--images", type=int, default=512, help="that are read")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model in place of the published ones"
    )
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    options.backend = "eager" if options.tiny else "inductor"  # which takes minutes to compile
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --tiny tries the benchmark without one")
    presets = {"base": BASE, "large": LARGE}
    models = {"tiny": TINY} if options.tiny else {name: presets[name] for name in options.models}
    rows: list[Row] = []
    for name, config in models.items():
        rows += training(name, config, device, options)
        rows += inference(name, config, device, options)
        if not options.without_transformers:
            rows += others(name, config, device, options)
        if name != "base":
            rows += fine_tuning(name, config, device, options)
    for each in rows:
        figures = (f"{key} {value:.4g}" for key, value in each.items() if isinstance(value, float))
        print(f"{each['name']:64}{'  '.join(figures)}")
    if options.json:
        options.json.write_text(json.dumps({"device": str(device), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
