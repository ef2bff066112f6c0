"""Training recipes as values that cite their source; importable without torch."""

from bridgetower.training.recipes.pretraining import (
    PRETRAIN_BASE,
    PRETRAIN_BASE_ITC,
    PRETRAIN_LARGE,
    PRETRAIN_NANO,
    PRETRAIN_NANO_METER,
    PRETRAIN_NANO_METER_NORMS,
)
from bridgetower.training.recipes.retrieval import RETRIEVAL_COCO, RETRIEVAL_FLICKR30K, RETRIEVAL_FLICKR30K_RANKING
from bridgetower.training.recipes.scenes import FLAG_QUESTIONS, SCENES_NLVR2, SCENES_SNLI_VE, SCENES_VQA
from bridgetower.training.recipes.single_tower import CIFAR, GLUE
from bridgetower.training.recipes.statements import NLVR2, SNLI_VE
from bridgetower.training.recipes.vqa import (
    VQAV2_BASE,
    VQAV2_BASE_NO_PRETRAINING,
    VQAV2_LARGE,
    VQAV2_LARGE_NO_PRETRAINING,
)

_FINE_TUNING = (
    RETRIEVAL_FLICKR30K,
    RETRIEVAL_COCO,
    RETRIEVAL_FLICKR30K_RANKING,
    VQAV2_BASE,
    VQAV2_LARGE,
    VQAV2_BASE_NO_PRETRAINING,
    VQAV2_LARGE_NO_PRETRAINING,
    SNLI_VE,
    NLVR2,
    *CIFAR,
    *GLUE,
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
        SCENES_VQA,
        SCENES_SNLI_VE,
        SCENES_NLVR2,
        FLAG_QUESTIONS,
        *_FINE_TUNING,
    )
}

FINE_TUNING = tuple(recipe.recipe for recipe in _FINE_TUNING)
"""Recipes that make sense only with an `init`."""
