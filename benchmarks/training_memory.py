"""Peak memory of one training step, each measured in a process of its own: python benchmarks/training_memory.py.

Rows: the nano model with ITC over batches of several sizes, as one batch, in micro-batches that contrast on their own,
and in micro-batches that contrast over the step; and what the optimiser keeps beside the weights.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bridgetower.data.batch import CaptionBatch
from bridgetower.data.captions import CaptionPairs
from bridgetower.data.examples import PreparedImages
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.presets import NANO
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.processor import Processor, ProcessorConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig
from bridgetower.training.data_parallel import Replicated
from bridgetower.training.optim import build_optimizer, parameter_groups
from bridgetower.training.setup import TrainContext
from bridgetower.training.step import run_step

MICRO = 64
TOKENS = 16
WAYS = {
    "one batch": {"micro_batch_size": None},
    f"micro-batches of {MICRO}": {"micro_batch_size": MICRO},
    f"micro-batches of {MICRO}, --contrast-over step": {"micro_batch_size": MICRO, "contrast_over": "step"},
}


def resident(name: str) -> int:
    """Bytes of memory of this process: `VmRSS` now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def micro_batches(size: int) -> Iterator[CaptionBatch]:
    """Random pictures and texts, made when they are asked for."""
    generator, number = torch.Generator().manual_seed(0), 0
    while True:
        ids = torch.randint(5, NANO.text.vocab_size, (size, TOKENS), generator=generator)
        side = NANO.vision.image_size
        yield CaptionBatch(
            pixel_values=torch.randint(256, (size, 3, side, side), generator=generator, dtype=torch.uint8),
            input_ids=ids,
            attention_mask=None,
            masked_input_ids=ids,
            mlm_labels=torch.where(torch.arange(TOKENS) == 1, ids, -100),
            image_index=torch.arange(number, number + size),
        )
        number += size


def run(rule: str, phase: Phase, batch_size: int, ways: dict[str, Any]) -> dict[str, int]:
    """Runs two steps and returns the bytes that they added to the process, and those of weights and optimiser."""
    torch.set_num_threads(1)
    task = PretrainingConfig(phases=(phase,))
    optimizer_config = OptimizerConfig(rule=rule)
    config = RunConfig(
        task=task, model=NANO, optimizer=optimizer_config, batch_size=batch_size, max_steps=2, device="cpu", **ways
    )
    model = BridgeTower(NANO, generator=torch.Generator().manual_seed(0))
    optimize_for_cpu(model)
    optimizer = build_optimizer(parameter_groups(model, config.optimizer), config.optimizer)
    setup = Replicated(PretrainingTask(model, task).train())
    sizes = ProcessorConfig(profile="official-pretrain", image_size=NANO.vision.image_size, max_length=TOKENS)
    pictures = PreparedImages.__new__(PreparedImages)
    pictures.processor = Processor(sizes, None)  # what is read of them
    parts = TrainContext(
        config=config,
        task=setup.task,
        model=model,
        examples=CaptionPairs.__new__(CaptionPairs),  # not read: the batches are handed over
        images=(pictures, pictures),
    )
    batches, before = micro_batches(min(batch_size, config.micro_batch_size or batch_size)), resident("VmRSS")
    for step in range(2):
        run_step(setup, parts, optimizer, batches, step)
    state = sum(
        value.numel() * value.element_size()
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"peak": resident("VmHWM") - before, "weights": weights, "optimiser": state}


def alone(function: Callable[..., dict[str, int]], *arguments: object) -> dict[str, int]:
    """Calls a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """Measures, prints a table and, if asked to, writes a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512, 2048], help="pairs of a step")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    rows = []
    for batch_size in options.batches:
        for name, ways in WAYS.items():
            found = alone(run, "adamw", Phase(mlm=0, itm=0, itc=1), batch_size, ways)
            rows.append({"name": name, "batch": batch_size, **{key: value / 2**20 for key, value in found.items()}})
    for rule in ("adamw", "hf_adamw"):
        found = alone(run, rule, Phase(itc=1), MICRO, {})
        row = {key: value / 2**20 for key, value in found.items()}
        rows.append({"name": f"MLM + ITM + ITC, optimizer.rule {rule}", "batch": MICRO, **row})
    print(f"{'':48}{'batch':>7}{'peak MiB':>10}{'weights':>9}{'optimiser':>11}")
    for row in rows:
        print(f"{row['name']:48}{row['batch']:7}{row['peak']:10.0f}{row['weights']:9.1f}{row['optimiser']:11.1f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
