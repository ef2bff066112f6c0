"""Recipes of the demo and of the benchmarks on generated scenes and flags, by task.

They are trained with `bridgetower train RECIPE --task-spec bridgetower_demo.recipes:TASK`, such as `VQA`.
"""

from collections.abc import Mapping
from dataclasses import replace

from bridgetower.data.config import DataConfig
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import FusionConfig, HeadsConfig, ModelConfig
from bridgetower.model.presets import BERT_BASE, NANO, VIT_B16, meter
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.tasks import table as tasks
from bridgetower.tasks.entries import VQA_NANO, Nlvr2Config, SnliVeConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig
from bridgetower.tasks.spec import TaskSpec

NUM_SCENE_ANSWERS = 14
"""Of the level `easy`; `medium` has 18, `hard` 22."""
NUM_FLAG_ANSWERS = 17

# For the two frozen towers of `bridgetower_demo.starter`, whose sizes their weights decide, on two CPU cores.
STARTER = ModelConfig(
    vision=replace(
        VIT_B16, image_size=84, patch_size=14, hidden_size=384, num_heads=6, intermediate_size=1536
    ),
    text=replace(BERT_BASE, hidden_size=384, num_layers=6, intermediate_size=1536, dropout=0.0),
    fusion=FusionConfig(
        hidden_size=192,
        num_layers=3,
        num_heads=6,
        intermediate_size=768,
        vision_layers=(8, 9, 10),
        text_layers=(4, 5, 6),
        dropout=0.0,
    ),
    heads=HeadsConfig(
        mlm=False,
        itm=False,
        itc="tower",
        itc_dropout=0.3,
        image_pooling="mean",
        text_pooling="mean",
    ),
)


STARTER_ITC = RunConfig(
    recipe="starter-itc",
    source="this project: the contrastive head on frozen towers, see docs/demo.md; give vision and text",
    task=PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=1),)),
    model=STARTER,
    freeze_towers=True,
    optimizer=OptimizerConfig(
        lr=1e-3, weight_decay=0.1, warmup=0.05, head_multiplier=1, fusion_multiplier=1
    ),
    data=DataConfig(max_length=48, background=(255, 255, 255), cache=True),
    evaluation=RetrievalConfig(candidates=10, max_captions=1),
    batch_size=256,
    max_steps=1_500,
    evaluate_every=250,
    select_by="itc_rsum",
)

STARTER_ITC_METER = replace(STARTER_ITC, recipe="starter-itc-meter", model=meter(STARTER))

STARTER_MATCHING = replace(
    STARTER_ITC,
    recipe="starter-matching",
    source="this project: the fusion encoder and matching, after starter-itc; see docs/demo.md",
    task=PretrainingConfig(
        phases=(
            Phase(until=0.8, mlm=0, itm=1, negatives="uniform"),
            Phase(until=1.0, mlm=0, itm=1, negatives="hard"),
        )
    ),
    model=replace(STARTER, heads=replace(STARTER.heads, itm=True)),
    optimizer=replace(STARTER_ITC.optimizer, weight_decay=0.05, warmup=0.1, clip_norm=1.0),
    data=replace(STARTER_ITC.data, one_set_per_batch=True),
    batch_size=32,
    align_first=300,
    max_steps=200,
    evaluate_every=50,
    checkpoint_every=50,
    select_by="rsum",
)

STARTER_MATCHING_METER = replace(
    STARTER_MATCHING, recipe="starter-matching-meter", model=meter(STARTER_MATCHING.model)
)

# Of generated scenes and flags: a shallow nano model, minutes on one core.
SCENES_MODEL = replace(
    NANO,
    vision=replace(NANO.vision, patch_size=12, num_layers=2),
    text=replace(NANO.text, num_layers=2),
    heads=HeadsConfig(mlm=False, itm=False),
)

SCENES_VQA = replace(
    VQA_NANO,
    recipe="scenes-vqa",
    source="this project: for scenes of the level easy; of others, set model.heads.vqa to the number of their answers",
    model=replace(SCENES_MODEL, heads=replace(SCENES_MODEL.heads, vqa=NUM_SCENE_ANSWERS)),
    data=DataConfig(max_length=32, cache=True),
    precision="bf16",
    max_epochs=None,
    evaluate_every=200,
    checkpoint_every=400,
)

SCENES_VQA_DEEP = replace(
    SCENES_VQA,
    recipe="scenes-vqa-deep",
    source="this project: scenes-vqa with deeper towers, where bridges help; see docs/experiments.md",
    model=SCENES_VQA.model.override(
        {"vision.num_layers": 6, "text.num_layers": 4, "fusion.num_layers": 3}
    ),
    max_steps=1_200,
    evaluate_every=100,
)

SCENES_VQA_DEEP_METER = replace(
    SCENES_VQA_DEEP, recipe="scenes-vqa-deep-meter", model=meter(SCENES_VQA_DEEP.model)
)

FLAG_QUESTIONS = replace(
    SCENES_VQA,
    recipe="flag-questions",
    source="this project: for flag-questions, from a model that has learnt about scenes",
    model=replace(SCENES_MODEL, heads=replace(SCENES_MODEL.heads, vqa=NUM_FLAG_ANSWERS)),
    optimizer=replace(SCENES_VQA.optimizer, lr=3e-4),
    data=replace(SCENES_VQA.data, augmentation="affine"),
    max_steps=240,
    evaluate_every=40,
    checkpoint_every=80,
)

STARTER_FLAG_QUESTIONS = replace(
    FLAG_QUESTIONS,
    recipe="starter-flag-questions",
    source="this project: for flag-questions, after starter-matching; see docs/demo.md",
    model=replace(STARTER, heads=replace(STARTER.heads, itc=None, vqa=NUM_FLAG_ANSWERS)),
    freeze_towers=True,
    optimizer=replace(SCENES_VQA.optimizer, lr=6e-4),
    data=replace(SCENES_VQA.data, background=(255, 255, 255)),
    max_steps=150,
    precision="fp32",
    evaluate_every=50,
    checkpoint_every=50,
)

SCENES_SNLI_VE = replace(
    SCENES_VQA,
    recipe="scenes-snli-ve",
    source="this project: for scenes of the kind snli-ve",
    task=SnliVeConfig(),
    model=replace(SCENES_MODEL, heads=replace(SCENES_MODEL.heads, snli_ve=True)),
    max_steps=1_200,
    select_by="accuracy",
)

SCENES_NLVR2 = replace(
    SCENES_SNLI_VE,
    recipe="scenes-nlvr2",
    source="this project: for scenes of the kind nlvr2, from a model that has learnt about questions",
    task=Nlvr2Config(),
    model=replace(
        SCENES_MODEL,
        heads=replace(SCENES_MODEL.heads, nlvr2=True),
        fusion=replace(SCENES_MODEL.fusion, num_token_types=3),
    ),
    optimizer=replace(
        SCENES_VQA.optimizer, lr=1e-4, warmup=0.1
    ),  # 5e-4 unlearns what the model starts with
    max_steps=800,
)

PRETRAINING = replace(
    tasks.TASKS["pretraining"],
    recipes=(STARTER_ITC, STARTER_ITC_METER, STARTER_MATCHING, STARTER_MATCHING_METER),
)
VQA = replace(
    tasks.TASKS["vqa"],
    recipes=(
        SCENES_VQA,
        SCENES_VQA_DEEP,
        SCENES_VQA_DEEP_METER,
        FLAG_QUESTIONS,
        STARTER_FLAG_QUESTIONS,
    ),
)
SNLI_VE = replace(tasks.TASKS["snli-ve"], recipes=(SCENES_SNLI_VE,))
NLVR2 = replace(tasks.TASKS["nlvr2"], recipes=(SCENES_NLVR2,))

RECIPES: Mapping[str, RunConfig] = {
    **tasks.RECIPES,
    **{
        recipe.recipe: recipe
        for spec in (PRETRAINING, VQA, SNLI_VE, NLVR2)
        for recipe in spec.recipes
    },
}


def task_of(config: RunConfig) -> TaskSpec | None:
    """Returns the task whose recipe a run is of; None for a task of the library."""
    specs = {spec.name: spec for spec in (PRETRAINING, VQA, SNLI_VE, NLVR2)}
    return None if config.recipe in tasks.RECIPES else specs[config.task.kind]
