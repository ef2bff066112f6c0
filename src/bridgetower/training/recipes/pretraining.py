"""Pre-training: the paper's recipes, and one for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from bridgetower.data.config import DataConfig
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE, LARGE, NANO, meter, meter_with_norms
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig
from bridgetower.training.recipes.shared import PAPER_OPTIMIZER

PRETRAIN_BASE = RunConfig(
    recipe="pretrain-base",
    source="paper, appendix 'Implementation Details': MLM + ITM, 100k steps of 4096 pairs, with the official mean of "
    "MLM over each micro-batch; give init_vision and init_text, or the towers start from random weights",
    task=PretrainingConfig(phases=(Phase(mlm=1, itm=1),), mlm_normalization="official"),
    model=BASE,
    optimizer=PAPER_OPTIMIZER,
    data=DataConfig(max_length=50, num_workers=4),
    batch_size=4096,
    micro_batch_size=32,
    max_steps=100_000,
    precision="bf16",
    evaluate_every=10_000,
    select_by="itm_accuracy",
)

PRETRAIN_LARGE = replace(PRETRAIN_BASE, recipe="pretrain-large", model=LARGE, micro_batch_size=8)

PRETRAIN_BASE_ITC = replace(
    PRETRAIN_BASE,
    recipe="pretrain-base-itc",
    source="official script: MLM, with a mean over each micro-batch, + ITM + ITC with hard negatives; give init_vision "
    "and init_text, or the towers start from random weights",
    task=PretrainingConfig(phases=(Phase(mlm=1, itm=1, itc=1, negatives="hard"),), mlm_normalization="official"),
    model=replace(BASE, heads=HeadsConfig(itc="tower")),
    select_by="rsum",
)

PRETRAIN_NANO = RunConfig(
    recipe="pretrain-nano",
    source="this project: chosen on the validation splits of the emoji and flags sets, see docs/demo.md",
    task=PretrainingConfig(
        phases=(
            Phase(until=0.4, mlm=0, itm=0, itc=1),
            Phase(until=1.0, mlm=1, itm=1, itc=1),
        )
    ),
    model=NANO,
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.05, warmup=0.05, head_multiplier=1, fusion_multiplier=1),
    data=DataConfig(augmentation="affine", max_length=40, background=(255, 255, 255), cache=True),
    evaluation=RetrievalConfig(candidates=16, max_captions=1),
    batch_size=128,
    max_steps=600,
    evaluate_every=100,
    checkpoint_every=100,
    select_by="itc_rsum",
)

PRETRAIN_NANO_METER = replace(PRETRAIN_NANO, recipe="pretrain-nano-meter", model=meter(NANO))

PRETRAIN_NANO_METER_NORMS = replace(PRETRAIN_NANO, recipe="pretrain-nano-meter-norms", model=meter_with_norms(NANO))
