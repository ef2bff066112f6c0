"""Training recipes as values that cite their source; importable without torch."""

from __future__ import annotations

from dataclasses import replace

from bridgetower.data.config import DataConfig
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE, LARGE, NANO, meter, meter_with_norms
from bridgetower.tasks.config import Phase, PretrainingConfig, RankingConfig
from bridgetower.training.config import OptimizerConfig, RunConfig

_PAPER_OPTIMIZER = OptimizerConfig(
    lr=1e-5, weight_decay=0.01, warmup=0.1, head_multiplier=5, fusion_multiplier=5, rule="official"
)

PRETRAIN_BASE = RunConfig(
    recipe="pretrain-base",
    source="paper, appendix 'Implementation Details': MLM + ITM, 100k steps of 4096 pairs; give init_vision and "
    "init_text, or the towers start from random weights",
    task=PretrainingConfig(phases=(Phase(mlm=1, itm=1),)),
    model=BASE,
    optimizer=_PAPER_OPTIMIZER,
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
    source="official script: MLM + ITM + ITC with hard negatives; give init_vision and init_text, or the towers start "
    "from random weights",
    task=PretrainingConfig(phases=(Phase(mlm=1, itm=1, itc=1, negatives="hard"),)),
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

# Official `blip_randaug_wc` in training and squashed pictures in evaluation.
COLOUR_VIEWS = DataConfig(
    profile="official-finetune",
    random_crop=0.5,
    flip=True,
    rand_augment="colour",
    rand_magnitude=7,
    max_length=50,
    num_workers=4,
)

_RETRIEVAL_TASK = PretrainingConfig(phases=(Phase(mlm=0, itm=1, itc=1, negatives="hard"),))

RETRIEVAL_FLICKR30K = RunConfig(
    recipe="retrieval-flickr30k",
    source="paper, appendix, and official script for Flickr30k: ITC + ITM; give a pre-trained init",
    task=_RETRIEVAL_TASK,
    model=replace(BASE, heads=HeadsConfig(mlm=False, itc="tower")).override({"vision.image_size": 384}),
    image_size=384,
    optimizer=replace(_PAPER_OPTIMIZER, lr=5e-6, warmup=0.05),
    data=replace(COLOUR_VIEWS, max_length=40),
    evaluation=RetrievalConfig(candidates=128),
    batch_size=512,
    micro_batch_size=32,
    max_epochs=20,
    precision="bf16",
    evaluate_every=1_000,
)

RETRIEVAL_COCO = replace(
    RETRIEVAL_FLICKR30K,
    recipe="retrieval-coco",
    source="paper, appendix, and official script for COCO: ITC + ITM; give a pre-trained init",
    optimizer=replace(_PAPER_OPTIMIZER, lr=4.5e-6, warmup=0.1),
    evaluation=RetrievalConfig(candidates=256),
    batch_size=256,
    max_epochs=30,
    evaluate_every=10_000,
)

RETRIEVAL_FLICKR30K_RANKING = replace(
    RETRIEVAL_FLICKR30K,
    recipe="retrieval-flickr30k-ranking",
    source="paper, appendix, and official script for Flickr30k: ITM alone, the true text among 15 false ones; give a "
    "pre-trained init",
    task=RankingConfig(false_texts=15),
    model=replace(BASE, heads=HeadsConfig(mlm=False, rank=True)).override({"vision.image_size": 384}),
    optimizer=replace(_PAPER_OPTIMIZER, lr=1.1e-5, warmup=0.1),
    batch_size=2048,
    micro_batch_size=4,
    evaluate_every=0,
)

RECIPES = {
    recipe.recipe: recipe
    for recipe in (
        PRETRAIN_BASE,
        PRETRAIN_BASE_ITC,
        PRETRAIN_LARGE,
        PRETRAIN_NANO,
        PRETRAIN_NANO_METER,
        PRETRAIN_NANO_METER_NORMS,
        RETRIEVAL_FLICKR30K,
        RETRIEVAL_COCO,
        RETRIEVAL_FLICKR30K_RANKING,
    )
}

# Recipes that make sense only with a pre-trained `init`.
FINE_TUNING = (RETRIEVAL_FLICKR30K.recipe, RETRIEVAL_COCO.recipe, RETRIEVAL_FLICKR30K_RANKING.recipe)
