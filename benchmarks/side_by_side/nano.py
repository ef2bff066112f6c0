"""The training step of the nano model with the kernels for a CPU beside the same model in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from bridgetower.data.batches.batch import CaptionBatch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.presets import NANO
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.training.optim import build_optimizer, parameter_groups
from side_by_side.rows import Row, timed
from side_by_side.setting import Setting
from side_by_side.timing import alternate

TOKENS = 16
DROPOUT = 0.1
OURS, PLAIN = "ours", "the same model in plain PyTorch, AdamW by its defaults"


def nano_row(setting: Setting) -> Iterator[Row]:
    """Pairs per second of MLM + ITM + ITC in bfloat16, dropout included."""
    batch = _batch(4 if setting.quick else 64)
    steps, losses = {}, {}
    for name in (OURS, PLAIN):
        model = BridgeTower(
            NANO.override({"text.dropout": DROPOUT, "fusion.dropout": DROPOUT}),
            generator=torch.Generator().manual_seed(0),
        )
        if name == OURS:
            optimize_for_cpu(model)
        task = PretrainingTask(model, PretrainingConfig(phases=(Phase(itc=1.0),)))
        with torch.no_grad():
            losses[name] = _losses(task.eval(), batch)
        steps[name] = _step(task.train(), batch, _optimizer(model, ours=name == OURS))
    timings = alternate(steps, repetitions=setting.repetitions)
    off = max(float((loss - losses[PLAIN][name]).abs()) for name, loss in losses[OURS].items())
    details = {"pairs_per_second": len(batch) / timings[OURS].seconds}
    name = f"nano training step mlm + itm + itc, bf16, {len(batch)} pairs"
    yield timed(name, timings, OURS, PLAIN, target=1.6, max_diff=off, details=details)


def _losses(task: PretrainingTask, batch: CaptionBatch) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return task(batch).terms


def _optimizer(model: BridgeTower, *, ours: bool) -> Optimizer:
    """AdamW as `bridgetower train` runs it, or by PyTorch's defaults; the rate leaves the weights as they are."""
    config = OptimizerConfig(lr=1e-30)
    if ours:
        return build_optimizer(parameter_groups(model, config), config)
    return torch.optim.AdamW(model.parameters(), lr=config.lr)


def _step(task: PretrainingTask, batch: CaptionBatch, optimizer: Optimizer) -> Callable[[], None]:
    def step() -> None:
        torch.stack(list(_losses(task, batch).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _batch(size: int) -> CaptionBatch:
    generator, side = torch.Generator().manual_seed(0), NANO.vision.image_size
    ids = torch.randint(5, NANO.text.vocab_size, (size, TOKENS), generator=generator)
    return CaptionBatch(
        pixel_values=torch.randn(size, 3, side, side, generator=generator),
        input_ids=ids,
        attention_mask=None,
        masked_input_ids=ids,
        mlm_labels=torch.where(torch.arange(TOKENS) % 7 == 1, ids, -100),
        image_index=torch.arange(size),
    )
