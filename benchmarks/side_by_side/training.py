"""Training steps beside the official way of composing them, of transformers' modules; and the memory they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bridgetower.data.batches.batch import CaptionBatch
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import itc_loss, random_pairs
from bridgetower.objectives.pretraining import PretrainingTask
from search import resident
from side_by_side.products import operations, rates
from side_by_side.rows import Row, timed
from side_by_side.setting import Setting
from side_by_side.timing import alternate

TOKENS, PADDED, MASKED = 14, 50, 2  # of a caption, as the official code pads it, and hidden ones
BATCH = 4
OFFICIAL = "official step of transformers' modules"


class Ours:
    """Our step."""

    def __init__(self, setting: Setting, phase: Phase) -> None:
        self.batch = batch_of(setting)
        self.module = PretrainingTask(
            setting.ours_for_training(), PretrainingConfig(phases=(phase,))
        )

    def losses(self) -> dict[str, Tensor]:
        """Of the phase."""
        return self.module(self.batch).terms


class Official:
    """A pass for each objective, texts padded to a fixed length, logits of every position."""

    def __init__(self, setting: Setting, phase: Phase) -> None:
        self.batch, self.phase = batch_of(setting), phase
        self.module = setting.theirs_for_training()
        padding = setting.config.text_config.pad_token_id
        self.ids = _widened(self.batch.input_ids, padding)
        self.masked = _widened(self.batch.masked_input_ids, padding)
        self.labels = _widened(self.batch.mlm_labels, -100)
        self.mask = (torch.arange(PADDED) < TOKENS).long().expand(BATCH, -1)

    def losses(self) -> dict[str, Tensor]:
        """Source: official `compute_mlm`, `compute_itm` and, for ITC, towers that run for themselves."""
        model, batch, pixel_values = (
            self.module.model,
            self.batch,
            cast(Tensor, self.batch.pixel_values),
        )
        backbone = model.bridgetower
        masked = backbone(self.masked, self.mask, pixel_values=pixel_values)
        logits = model.mlm_score(masked.text_features)
        pairs = random_pairs(batch.image_index, torch.Generator().manual_seed(batch.seed))
        matched = backbone(self.ids, self.mask, pixel_values=pixel_values[pairs.image_rows])
        losses = {
            "mlm": F.cross_entropy(logits.flatten(0, 1), self.labels.flatten()),
            "itm": F.cross_entropy(self.module.itm(matched.pooler_output), pairs.labels),
        }
        if self.phase.itc:
            text = backbone.text_model(self.ids, self.mask).last_hidden_state[:, 0]
            image = backbone.vision_model(pixel_values)[-1][:, 0]
            head = self.module.itc
            vectors = F.normalize(head.image(image), dim=-1), F.normalize(head.text(text), dim=-1)
            losses["itc"] = itc_loss(vectors, batch.image_index, head.logit_scale())
        return losses


def step(side: Ours | Official, half: bool = False) -> None:
    """Forward and backward, without the optimiser; no gradient stays in memory for the other way to carry."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        total = torch.stack(list(side.losses().values())).sum()
    total.backward()
    side.module.zero_grad(set_to_none=True)


def step_rows(setting: Setting, contrast: bool) -> Iterator[Row]:
    """Both precisions of ours beside the official way in float32."""
    phase = Phase(itc=1.0 if contrast else 0.0)
    ours, official = Ours(setting, phase), Official(setting, phase)
    off = _difference(ours, official)
    ways: dict[str, Callable[[], object]] = {
        "ours fp32": lambda: step(ours),
        "ours bf16": lambda: step(ours, half=True),
        OFFICIAL: lambda: step(official),
        f"{OFFICIAL}, bf16": lambda: step(official, half=True),
    }
    timings = alternate(ways, repetitions=min(3, setting.repetitions), warmup=1)
    seconds = {name: timing.seconds for name, timing in timings.items()}
    names = "mlm + itm + itc" if contrast else "mlm + itm"
    for precision, target in (
        ("fp32", 2.1 if contrast else 1.7),
        ("bf16", None if contrast else 4.0),
    ):
        way = f"ours {precision}"
        more: dict[str, Any] = {}
        if precision == "fp32":
            more = {"max_diff": off, **rates(ways[way], seconds[way])}
        details = {"seconds": seconds, "operations": operations(ways[way])}
        name = f"training step {names}, {precision}, {BATCH} pairs"
        yield timed(name, timings, way, OFFICIAL, target=target, details=details, **more)


def memory_row(setting: Setting) -> Iterator[Row]:
    """Highest memory of a process that runs two steps; each way in a process of its own."""
    peaks = {side: setting.apart(two_steps, setting, side) for side in ("ours", "theirs")}
    yield Row(
        name=f"peak memory of a training step, {BATCH} pairs",
        ours="ours fp32",
        peer=OFFICIAL,
        ours_s=peaks["ours"],
        peer_s=peaks["theirs"],
        unit="GiB",
        target=1 / 0.55,
    )


def two_steps(setting: Setting, side: str) -> float:
    """Returns the highest memory of this process after two steps of one way, in GiB."""
    way = (Ours if side == "ours" else Official)(setting, Phase())
    for _ in range(2):
        step(way)
    return resident("VmHWM") / 1024


def _difference(ours: Ours, official: Official) -> float:
    """Returns how far the losses are apart without dropout."""
    for side in (ours, official):
        side.module.eval()
    with torch.no_grad():
        mine, theirs = ours.losses(), official.losses()
    for side in (ours, official):
        side.module.train()
    return max(float((mine[name] - theirs[name]).abs()) for name in theirs)


def batch_of(setting: Setting) -> CaptionBatch:
    """Captions of `TOKENS` tokens, `MASKED` of them hidden."""
    inputs = setting.inputs(BATCH, TOKENS)
    ids = inputs["input_ids"]
    hidden = torch.arange(TOKENS).expand(BATCH, -1) % (TOKENS // MASKED) == 1
    return CaptionBatch(
        pixel_values=inputs["pixel_values"],
        input_ids=ids,
        attention_mask=None,
        masked_input_ids=torch.where(hidden, setting.config.text_config.vocab_size - 1, ids),
        mlm_labels=torch.where(hidden, ids, -100),
        image_index=torch.arange(BATCH),
    )


def _widened(ids: Tensor, fill: int) -> Tensor:
    return F.pad(ids, (0, PADDED - ids.shape[1]), value=fill)
