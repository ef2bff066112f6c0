"""What each kernel for CPUs saves: python benchmarks/cpu_kernels.py; prints a table.

Rows have all kernels or all but one: processor seconds of a training step of the nano model with dropout, in bfloat16
and in float32, the least of alternating repetitions; and MiB that a step of the base model with two layers in each
encoder keeps for the gradients of two pairs.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bridgetower.data.batches.batch import CaptionBatch
from bridgetower.model import cpu
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import ModelConfig
from bridgetower.model.presets import BASE, NANO
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask

TOKENS = 16
DROPOUT = {"text.dropout": 0.1, "fusion.dropout": 0.1}
LAYERS = {
    "vision.num_layers": 2,
    "text.num_layers": 2,
    "fusion.num_layers": 2,
    "heads.itc": "tower",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="of each step")
    parser.add_argument("--pairs", type=int, default=64, help="in a step of the nano model")
    options = parser.parse_args()
    modules = (None, *cpu._KERNELS)
    nano = NANO.override(DROPOUT)
    nano_batch = random_batch(nano, options.pairs)
    steps = {}
    for module in modules:
        task = pretraining_task(nano, module)
        steps[f"{name_of(module)} | bf16"] = partial(step, task, nano_batch, is_bf16=True)
        steps[f"{name_of(module)} | fp32"] = partial(step, task, nano_batch, is_bf16=False)
    seconds = dict.fromkeys(steps, math.inf)
    for _ in range(options.repetitions):
        for name, run in steps.items():
            started = time.process_time()
            run()
            seconds[name] = min(seconds[name], time.process_time() - started)

    base = BASE.override(LAYERS)
    base_batch = random_batch(base, 2)
    print("| kernels | bfloat16 [s] | float32 [s] | kept [MiB] |\n|---|---|---|---|")
    for module in modules:
        name = name_of(module)
        bf16 = seconds[f"{name} | bf16"]
        fp32 = seconds[f"{name} | fp32"]
        mib = kept_bytes(pretraining_task(base, module), base_batch) / 2**20
        print(f"| {name} | {bf16:.3f} | {fp32:.3f} | {mib:.0f} |", flush=True)


def name_of(module: type[nn.Module] | None) -> str:
    return "all" if module is None else f"all but {cpu._KERNELS[module].__name__}"


def pretraining_task(config: ModelConfig, left_out: type[nn.Module] | None) -> PretrainingTask:
    """Builds a task whose model has all kernels but the one for a module."""
    model = BridgeTower(config, generator=torch.Generator().manual_seed(0))
    with patch.dict(cpu._KERNELS):
        if left_out is not None:
            del cpu._KERNELS[left_out]
        cpu.optimize_for_cpu(model)
    return PretrainingTask(model, PretrainingConfig(phases=(Phase(itc=1.0),))).train()


def random_batch(config: ModelConfig, size: int) -> CaptionBatch:
    generator = torch.Generator().manual_seed(0)
    side = config.vision.image_size
    ids = torch.randint(5, config.text.vocab_size, (size, TOKENS), generator=generator)
    return CaptionBatch(
        pixel_values=torch.randn(size, 3, side, side, generator=generator),
        input_ids=ids,
        attention_mask=None,
        masked_input_ids=ids,
        mlm_labels=torch.where(torch.arange(TOKENS) % 7 == 1, ids, -100),
        image_index=torch.arange(size),
    )


def step(task: PretrainingTask, batch: CaptionBatch, *, is_bf16: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
        losses = task(batch)
    losses.total.backward()
    task.zero_grad(set_to_none=True)


def kept_bytes(task: PretrainingTask, batch: CaptionBatch) -> int:
    """Counts the bytes that a forward pass keeps for its gradients, besides the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in task.parameters()}
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # kept, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        task(batch)
    return sum(storage.nbytes() for storage in storages.values())


if __name__ == "__main__":
    main()
