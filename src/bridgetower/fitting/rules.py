"""The rules by which `fit` chooses splits and settings. Their table is in docs/fit.md, with what was measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from bridgetower.data.sets.prepared_set import fold_names
from bridgetower.model.config import HeadsConfig
from bridgetower.tasks.run_config import Precision, RunConfig
from bridgetower.tasks.table import RECIPES

Trained = Literal["fusion", "top", "all"]
"""What is trained: fusion encoder and heads on cached features, also the top layers of the towers, or all weights."""

FOLDS = 5
FOLDS_BELOW = 500
"""With fewer images, each is tested once, by cross-validation."""
LEAST_TESTED = 100  # images of a test split, if a fifth of all are so many
PATIENCE = 3  # evaluations without a better score, after which a run ends

_TOP_LAYERS = 2
_LARGEST_BATCH = 64
_BATCHES_PER_EPOCH = 8  # at least, in a small set
_STEPS = 400  # of a run, if that is neither too few nor too many epochs
_EPOCHS = (4, 40)

# Learning rate of the towers by what is trained; the fusion encoder and the heads have a multiple of it.
_RATES: Mapping[Trained, float] = {"fusion": 5e-5, "top": 2e-5, "all": 1e-5}


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Splits of a set by their use.

    Attributes:
        train: Splits to train the model on.
        validation: Split that chooses the best checkpoint; empty if there is none.
        test: Split that is measured; empty for a cross-validation.
        folds: Number of folds; 0 without a cross-validation.
        fractions: Shares of the images for validation and test that are drawn; empty if the source has the splits.
        reason: Why these were chosen, in words.
    """

    train: tuple[str, ...] = ("train",)
    validation: str = ""
    test: str = ""
    folds: int = 0
    fractions: tuple[float, ...] = ()
    reason: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a set that `prepare` writes with these splits."""
        if self.folds:
            return {"folds": self.folds}
        if self.fractions:
            validation, test = self.fractions
            return {"validation_fraction": validation, "test_fraction": test}
        return {}


def choose_splits(num_images: int, of_source: Counter[str]) -> Splits:
    """Returns the splits of a source, or drawn ones.

    Args:
        num_images: Different images of the source.
        of_source: Rows by the split that the source gives; the empty split is none.

    Raises:
        ValueError: The source has splits that do not allow a measurement, or fewer images than folds.
    """
    names = set(of_source) - {""}
    if names and "" not in of_source:
        if "train" not in names or len(names) == 1:
            raise ValueError(
                f"the source has only the split {', '.join(sorted(names))}; expected train and test, or no splits"
            )
        if {"validation", "test"} <= names:
            return Splits(validation="validation", test="test", reason="those of the source")
        test, missing = ("test", "validation") if "test" in names else ("validation", "test")
        return Splits(
            test=test,
            reason=f"those of the source, which has no {missing}: "
            f"all epochs are trained, and {test} is measured once",
        )
    if num_images < 2 * FOLDS:
        raise ValueError(
            f"there are {num_images} images; expected at least {2 * FOLDS}, of which a few are tested"
        )
    if num_images < FOLDS_BELOW:
        return Splits(
            train=tuple(fold_names(FOLDS)),
            folds=FOLDS,
            reason=f"{num_images} images are too few for a test split: {FOLDS} models are each trained on "
            f"{FOLDS - 1} of {FOLDS} folds and tested on the other one; the last model is trained on all",
        )
    test_fraction = min(0.2, max(0.1, LEAST_TESTED / num_images))
    return Splits(
        validation="validation",
        test="test",
        fractions=(0.1, round(test_fraction, 3)),
        reason=f"10 % of the images for validation and {100 * test_fraction:.0f} % for test, by a hash of each",
    )


def recipe_of(kind: str, heads: HeadsConfig | None) -> RunConfig:
    """Returns the recipe for a kind of set, from a model with these heads or from random weights.

    Raises:
        ValueError: There is no recipe from random weights.
    """
    if heads is None:
        names = {"pairs": "pretrain-nano", "vqa": "vqa-nano"}
        if kind not in names:
            raise ValueError(
                f"there is no recipe from random weights for {kind}; give init, a model to start from"
            )
        return RECIPES[names[kind]]
    if kind == "pairs":
        return RECIPES["contrastive-large" if heads.itc == "fused" else "retrieval-flickr30k"]
    names = {
        "vqa": "vqav2-base",
        "entailment": "snli-ve",
        "image-pairs": "nlvr2",
        "classification": "classification",
        "regression": "regression",
    }
    return RECIPES[names[kind]]


def choose_trained(device: str) -> Trained:
    """Returns what is trained."""
    return "fusion" if device == "cpu" else "all"


def chosen_config(
    recipe: RunConfig,
    splits: Splits,
    *,
    num_examples: int,
    trained: Trained,
    init: str | None,
    folder: str,
    precision: Precision,
    max_length: int | None,
) -> RunConfig:
    """Returns the run for a set.

    Args:
        recipe: Where the run starts from.
        splits: Splits of the set.
        num_examples: Entries of the splits that are trained on.
        trained: What is trained.
        init: The model to start from; None: random weights.
        folder: Of the set.
        precision: Of the forward pass.
        max_length: Tokens that the text tower takes; None: of a new model.
    """
    # The largest power of two that gives an epoch several batches.
    batch_size = 1
    while 2 * batch_size <= min(_LARGEST_BATCH, num_examples / _BATCHES_PER_EPOCH):
        batch_size *= 2
    steps_per_epoch = num_examples // batch_size
    least, most = _EPOCHS
    epochs = min(most, max(least, math.ceil(_STEPS / steps_per_epoch)))
    data = replace(
        recipe.data,
        folders=(folder,),
        train_splits=splits.train,
        validation_split=splits.validation or splits.test or splits.train[0],
        max_length=min(recipe.data.max_length, max_length or recipe.data.max_length),
        num_workers=0,
    )
    optimizer = recipe.optimizer
    values: dict[str, Any] = {}
    if init is not None:
        # Images as the model knows them; varied images are no use to features that are computed once.
        data = replace(data.as_evaluated(), profile=None)
        optimizer = replace(optimizer, lr=_RATES[trained], rule="adamw", clip_norm=1.0)
        values |= {"image_size": None, "freeze_towers": trained != "all"}
        values["train_top"] = _TOP_LAYERS if trained == "top" else None
    evaluation = recipe.evaluation
    if recipe.task.reads == "captions":
        evaluation = replace(evaluation, candidates=16)
    return replace(
        recipe,
        init=init,
        data=data,
        optimizer=optimizer,
        evaluation=evaluation,
        batch_size=batch_size,
        micro_batch_size=None,
        max_steps=None,
        max_epochs=epochs,
        precision=precision,
        evaluate_every="epoch" if splits.validation else None,
        patience=PATIENCE if splits.validation else None,
        log_every=max(1, steps_per_epoch // 4),
        **values,
    )
