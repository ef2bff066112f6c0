"""Questions and statements about generated scenes and flags, with a shallow nano model: minutes on one core."""

from dataclasses import replace

from bridgetower.data.config import DataConfig
from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import NANO
from bridgetower.objectives.config import Nlvr2Config, SnliVeConfig, VqaConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig

NUM_ANSWERS = 14
"""Of the level `easy`; `medium` has 18, `hard` 22."""

NUM_FLAG_ANSWERS = 17

_MODEL = replace(NANO, vision=replace(NANO.vision, patch_size=12, num_layers=2), text=replace(NANO.text, num_layers=2))
_HEADS = HeadsConfig(mlm=False, itm=False)

SCENES_VQA = RunConfig(
    recipe="scenes-vqa",
    source="this project: for sets of `bridgetower prepare scenes` of the level easy; of others, set model.heads.vqa "
    "to the number of their answers",
    task=VqaConfig(),
    model=replace(_MODEL, heads=replace(_HEADS, vqa=NUM_ANSWERS)),
    optimizer=OptimizerConfig(
        lr=5e-4, weight_decay=0.05, warmup=0.05, head_multiplier=1, fusion_multiplier=1, clip_norm=1.0
    ),
    data=DataConfig(max_length=32, cache=True),
    batch_size=64,
    max_steps=2_000,
    precision="bf16",
    evaluate_every=200,
    checkpoint_every=400,
    select_by="vqa_score",
)

FLAG_QUESTIONS = replace(
    SCENES_VQA,
    recipe="flag-questions",
    source="this project: for `bridgetower prepare flag-questions`, from a model that has learnt about scenes",
    model=replace(_MODEL, heads=replace(_HEADS, vqa=NUM_FLAG_ANSWERS)),
    optimizer=replace(SCENES_VQA.optimizer, lr=3e-4),
    data=replace(SCENES_VQA.data, augmentation="affine"),
    max_steps=240,
    evaluate_every=40,
    checkpoint_every=80,
)

SCENES_SNLI_VE = replace(
    SCENES_VQA,
    recipe="scenes-snli-ve",
    source="this project: for sets of `bridgetower prepare scenes --kind snli-ve`",
    task=SnliVeConfig(),
    model=replace(_MODEL, heads=replace(_HEADS, snli_ve=True)),
    max_steps=1_200,
    select_by="accuracy",
)

SCENES_NLVR2 = replace(
    SCENES_SNLI_VE,
    recipe="scenes-nlvr2",
    source="this project: for sets of `bridgetower prepare scenes --kind nlvr2`, from a model that has learnt about "
    "questions",
    task=Nlvr2Config(),
    model=replace(_MODEL, heads=replace(_HEADS, nlvr2=True), fusion=replace(_MODEL.fusion, num_token_types=3)),
    optimizer=replace(SCENES_VQA.optimizer, lr=1e-4, warmup=0.1),  # 5e-4 unlearns what the model starts with
    max_steps=800,
)
