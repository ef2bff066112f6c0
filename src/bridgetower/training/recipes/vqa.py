"""Visual question answering on VQAv2, with and without pre-training."""

from dataclasses import replace

from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE, LARGE
from bridgetower.objectives.config import VqaConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.recipes.shared import CLIP_VIEWS, PAPER_OPTIMIZER, QUESTION_VIEWS

NUM_ANSWERS = 3129
_HEADS = HeadsConfig(mlm=False, itm=False, vqa=NUM_ANSWERS, hidden_scale=2.0)

VQAV2_BASE = RunConfig(
    recipe="vqav2-base",
    source="paper, appendix, and official script for VQAv2; give a pre-trained init. The paper trains on "
    "--data.train-splits train validation",
    task=VqaConfig(),
    model=replace(BASE, heads=_HEADS).override({"vision.image_size": 576}),
    image_size=576,
    optimizer=replace(PAPER_OPTIMIZER, lr=1e-5, warmup=0.06, weight_decay=0.05, head_multiplier=50),
    data=QUESTION_VIEWS,
    batch_size=512,
    micro_batch_size=16,
    max_epochs=10,
    precision="bf16",
    evaluate_every=2_000,
    select_by="vqa_score",
)

VQAV2_LARGE = replace(
    VQAV2_BASE,
    recipe="vqav2-large",
    model=replace(LARGE, heads=_HEADS).override({"vision.image_size": 574}),
    image_size=574,
    optimizer=replace(VQAV2_BASE.optimizer, lr=4e-6),
    micro_batch_size=4,
)

VQAV2_BASE_NO_PRETRAINING = replace(
    VQAV2_BASE,
    recipe="vqav2-base-no-pretraining",
    source="paper, appendix, and official script for VQAv2 without pre-training; give init_vision "
    "and init_text. The paper trains on --data.train-splits train validation",
    model=replace(VQAV2_BASE.model, heads=replace(_HEADS, hidden_scale=1.0)),
    optimizer=replace(PAPER_OPTIMIZER, lr=2e-5, head_multiplier=50),
    data=CLIP_VIEWS,
)

VQAV2_LARGE_NO_PRETRAINING = replace(
    VQAV2_BASE_NO_PRETRAINING,
    recipe="vqav2-large-no-pretraining",
    model=replace(VQAV2_LARGE.model, heads=replace(_HEADS, hidden_scale=1.0)),
    image_size=574,
    optimizer=replace(PAPER_OPTIMIZER, lr=1e-5, head_multiplier=50),
    micro_batch_size=4,
)
