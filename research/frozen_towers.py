"""Processor seconds of a training step with frozen towers against the same step with towers that run, on one thread.

    python research/frozen_towers.py

A set of 640 x 480 JPEGs with captions is generated. Each model takes steps of MLM + ITM and of ITC alone, one image
and one caption per pair, decoding included, in three ways: all weights trained; towers frozen, but run in every step;
towers frozen and read from the files of `--freeze-towers`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bridgetower.data.batches.batch import Batch, BatchDataset, BatchKey
from bridgetower.data.config import DataConfig
from bridgetower.data.sets.custom import PairsConfig
from bridgetower.model.config import FusionConfig, HeadsConfig, ModelConfig
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.presets import BASE, NANO
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.data_parallel import Replicated
from bridgetower.training.frozen import frozen_examples
from bridgetower.training.optim import build_optimizer, parameter_groups
from bridgetower.training.setup import build_task, starting_checkpoint
from bridgetower.training.step import run_step

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from memory import make_set

PICTURES = 72
ITC = HeadsConfig(itc="tower")
NARROW = FusionConfig(hidden_size=256, num_layers=2, num_heads=4, intermediate_size=1024)
MODELS: dict[str, tuple[ModelConfig, int]] = {  # and the pairs of a step
    "nano": (NANO, 64),
    "base towers, fusion encoder of 6 layers of 768": (replace(BASE, heads=ITC), 4),
    "base towers, fusion encoder of 2 layers of 256": (replace(BASE, heads=ITC, fusion=NARROW), 4),
}
PHASES = {"MLM + ITM": Phase(), "ITC": Phase(mlm=0, itm=0, itc=1)}


def batches(examples: BatchDataset, size: int) -> Iterator[Batch]:
    """Batches without end."""
    number = 0
    while True:
        yield examples[
            BatchKey(
                tuple((number * size + place) % len(examples) for place in range(size)), number
            )
        ]
        number += 1


def step_seconds(config: RunConfig, dataset_out: Path, way: str, repeats: int) -> float:
    """Builds the run in one of the three ways and returns the median processor time of a step."""
    checkpoint = starting_checkpoint(config)
    model = checkpoint.model().train()
    optimize_for_cpu(model)
    work = build_task(config, checkpoint, model)
    if way == "files":
        cache = dataset_out / "features"
        work = replace(work, examples=frozen_examples(work, cache, progress=False))
    elif way == "frozen":
        model.vision.requires_grad_(False)
        model.text.requires_grad_(False)
    optimizer = build_optimizer(parameter_groups(model, config.optimizer), config.optimizer)
    task = Replicated(work.task)
    source, times = batches(work.examples, config.batch_size), []
    for step in range(repeats + 1):
        started = time.process_time()
        run_step(task, work, optimizer, source, step)
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def measure(folder: Path, name: str, phases: list[str], repeats: int) -> list[dict[str, Any]]:
    """Returns the rows of one model."""
    model, batch_size = MODELS[name]
    rows = []
    data = DataConfig(folders=(str(folder / "set"),), max_length=50)
    for phase_name in phases:
        task = PretrainingConfig(phases=(PHASES[phase_name],))
        config = RunConfig(
            task=task,
            model=model,
            data=data,
            batch_size=batch_size,
            max_steps=100,
            device="cpu",
            freeze_towers=True,
            select_by="itm_accuracy",
        )
        out = folder / name.replace(" ", "-") / phase_name
        out.mkdir(parents=True)
        seconds = {
            way: step_seconds(config, out, way, repeats) for way in ("all", "frozen", "files")
        }
        rows.append({"name": name, "objectives": phase_name, "pairs": batch_size, **seconds})
    return rows


def main() -> None:
    """Measures, prints a table and, if asked to, writes a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{'':48}{'':12}{'all':>8}{'frozen':>8}{'files':>8}{'all/files':>11}{'frozen/files':>14}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_set(
            folder, PICTURES, (640, 480), PairsConfig(test_fraction=0.05, validation_fraction=0.05)
        )
        for model in options.models:
            for row in measure(folder, model, options.phases, options.repeats):
                rows.append(row)
                print(
                    f"{row['name']:48}{row['objectives']:12}{row['all']:8.3f}{row['frozen']:8.3f}{row['files']:8.3f}"
                    f"{row['all'] / row['files']:11.1f}{row['frozen'] / row['files']:14.1f}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
