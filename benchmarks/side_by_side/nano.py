"""The training step of the nano model beside the same model on PyTorch's own attention, dropout and products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bridgetower.data.batch import CaptionBatch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.init import init_weights
from bridgetower.model.presets import NANO
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from side_by_side.rows import Row
from side_by_side.setting import Setting
from side_by_side.timing import alternate

TOKENS = 16
DROPOUT = 0.1


def nano_row(setting: Setting) -> Iterator[Row]:
    """Pairs per second of MLM + ITM + ITC in bfloat16, dropout included."""
    batch = _batch(4 if setting.quick else 64)
    model = BridgeTower(NANO.override({"text.dropout": DROPOUT, "fusion.dropout": DROPOUT}))
    init_weights(model, torch.Generator().manual_seed(0))
    task = PretrainingTask(model, PretrainingConfig(phases=(Phase(itc=1.0),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def losses() -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return task(batch).parts

    def ours() -> None:
        torch.stack(list(losses().values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def plain() -> None:
        with plain_pytorch():
            ours()

    task.eval()
    with torch.no_grad():
        mine = losses()
        with plain_pytorch():
            theirs = losses()
    task.train()
    timings = alternate({"ours": ours, "plain": plain}, repetitions=setting.repetitions)
    yield Row(
        name=f"nano training step mlm + itm + itc, bf16, {len(batch)} pairs",
        ours="ours",
        peer="the same model with PyTorch's attention, nn.Dropout and nn.Linear",
        ours_s=timings["ours"].seconds,
        peer_s=timings["plain"].seconds,
        disturbed=any(timing.disturbed for timing in timings.values()),
        target=1.5,
        max_diff=max(float((mine[name] - theirs[name]).abs()) for name in mine),
        details={"pairs_per_second": len(batch) / timings["ours"].seconds},
    )


def plain_pytorch() -> ExitStack:
    """Lets the model's building blocks compute as PyTorch's own do."""
    stack = ExitStack()
    for module in ("layers", "fusion", "heads", "text"):
        stack.enter_context(patch(f"bridgetower.model.{module}.dropout", F.dropout))
    stack.enter_context(patch("bridgetower.model.layers.attend", _attend))
    stack.enter_context(patch("bridgetower.model.linear.in_onednn", lambda hidden, weight: False))
    return stack


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, num_heads: int, mask: Tensor | None, dropout: float
) -> Tensor:
    heads = [tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tensor in (query, key, value)]
    hidden = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(*heads, attn_mask=hidden, dropout_p=dropout).transpose(1, 2).flatten(2)


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
