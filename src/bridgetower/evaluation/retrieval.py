"""Image-text retrieval: contrastive recall, then matching of the candidates, with shared encodings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.checkpoints import ITC_ALONE
from bridgetower.data.captions import CaptionImages
from bridgetower.evaluation.class_metrics import accuracy
from bridgetower.evaluation.config import AS_USUAL, Means, RetrievalConfig
from bridgetower.evaluation.metrics import (
    GroundTruth,
    RetrievalRecalls,
    chance_recalls,
    fold_recalls,
    retrieval_recalls,
    streamed_recalls,
    topk_candidates,
    two_stage_scores,
)
from bridgetower.evaluation.scoring import PairScorer, pair_scorer
from bridgetower.inference import combined_scores
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.losses import similarity

ITC_WEIGHT = "itc_weight"
"""Name of the metric that a checkpoint stores."""

ITC_WEIGHTS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, ITC_ALONE)
"""The weights that a fit tries."""


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Scores and recalls of one model on one set.

    Attributes:
        image_vectors: Contrastive, of length one.
        text_vectors: The same of the texts that are ranked.
        itm: Matching score of the candidate pairs (`Scores.match`), NaN elsewhere; None without a matching head.
        matching_recalls: Of the ranking of the candidates by matching alone; None without a matching head.
        two_stage_recalls: Of their ranking by both, `inference.combined_scores`; by matching alone with protocol
            `paper`.
        itc_weight: Of the cosine in the two-stage ranking; None where there is none.
        itm_accuracy: Of each text with its own image and with a random other one; None without a matching head.
    """

    image_vectors: Float[Tensor, "i c"]
    text_vectors: Float[Tensor, "t c"]
    truth: GroundTruth
    itc_recalls: RetrievalRecalls
    chance: RetrievalRecalls
    itm: Float[Tensor, "i t"] | None = None
    matching_recalls: RetrievalRecalls | None = None
    two_stage_recalls: RetrievalRecalls | None = None
    itc_weight: float | None = None
    itm_accuracy: float | None = None

    @cached_property
    def similarity(self) -> Float[Tensor, "i t"]:
        """Cosines of the contrastive vectors, image by text: all of them, which large sets leave no memory for."""
        return similarity(self.image_vectors, self.text_vectors, torch.ones(()))

    def metrics(self) -> dict[str, float]:
        """Flat metrics: recalls `itc_…`, `matching_…`, `two_stage_…` and `chance_…`, the others, the last `rsum`."""
        stages = {"itc": self.itc_recalls, "matching": self.matching_recalls, "two_stage": self.two_stage_recalls}
        metrics = _flat({**stages, "chance": self.chance})
        others = {ITC_WEIGHT: self.itc_weight, "itm_accuracy": self.itm_accuracy}
        metrics |= {name: value for name, value in others.items() if value is not None}
        return metrics | {"rsum": (self.two_stage_recalls or self.itc_recalls).rsum}


@torch.inference_mode()
def evaluate_retrieval(
    model: BridgeTower,
    images: CaptionImages,
    config: RetrievalConfig,
    means: Means = AS_USUAL,
    *,
    itc_weight: float | None = 0.0,
) -> RetrievalResult:
    """Ranks all images for every caption and all captions for every image, or those of its fold.

    Images with the same captions count as one thing: their texts are ranked once, and each of them is right for these;
    not so with folds. Images are shared out over the processes of a distributed run; every process gets the same
    result.

    Args:
        model: With a contrastive head.
        images: With captions.
        config: Protocol, candidates, folds.
        means: What changes nothing in the result.
        itc_weight: Of the cosine in the two-stage ranking; None fits it to these images. Protocol `paper` reads
            none.

    Raises:
        ValueError: The model has no contrastive head, an image cannot be decoded, or the folds are not equal.
    """
    _check_folds(images, config)
    model.contrastive_head()
    with pair_scorer(model, images, config, means) as pairs:
        vectors, truth = pairs.vectors(), pairs.truth
        second: dict[str, Any] = {}
        if model.itm_head is not None and config.candidates:
            second = _second_stage(pairs, similarity(*vectors, torch.ones(())), config, itc_weight)
    return RetrievalResult(
        image_vectors=vectors[0],
        text_vectors=vectors[1],
        truth=truth,
        itc_recalls=_itc_recalls(*vectors, truth, config),
        chance=_chance(truth, config),
        **second,
    )


def _itc_recalls(
    images: Float[Tensor, "i c"], texts: Float[Tensor, "t c"], truth: GroundTruth, config: RetrievalConfig
) -> RetrievalRecalls:
    """Ranks by the cosine alone, of which no more is in memory than that of a block of texts, without folds."""
    if config.fold_size is not None:
        return _recalls(similarity(images, texts, torch.ones(())), truth, config)
    return streamed_recalls(
        lambda block: similarity(images, texts[block], torch.ones(())),
        len(images),
        truth.text_image_index,
        owners=truth.owners,
    )


def _second_stage(
    pairs: PairScorer, similarity: Float[Tensor, "i t"], config: RetrievalConfig, itc_weight: float | None
) -> dict[str, Any]:
    """Matches the candidates of the first stage; returns the fields of `RetrievalResult` that come of it."""
    sides = [_candidates(similarity, pairs.truth.text_image_index, config, dim=dim) for dim in (1, 0)]
    itm, matched = _matching(pairs, sides[0] | sides[1])
    candidates = Candidates(
        itm=itm, similarity=similarity, image_side=sides[0], text_side=sides[1], truth=pairs.truth, config=config
    )
    found: dict[str, Any] = {"itm": itm, "itm_accuracy": matched}
    found["matching_recalls"] = found["two_stage_recalls"] = candidates.recalls(0.0)
    if config.protocol == "honest":
        weight = candidates.fitted_weight() if itc_weight is None else itc_weight
        found["itc_weight"] = weight
        if weight:
            found["two_stage_recalls"] = candidates.recalls(weight)
    return found


@torch.inference_mode()
def evaluate_matching(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, means: Means = AS_USUAL
) -> float:
    """Accuracy of matching on each caption with its own image and with a random other one (the same at every call).

    It is what `evaluate_retrieval` reports as `itm_accuracy`, for models without contrastive head.

    Raises:
        ValueError: The model has no matching head, or an image cannot be decoded.
    """
    model.head("itm")
    with pair_scorer(model, images, config, means) as pairs:
        return _matching(pairs)[1]


@torch.inference_mode()
def evaluate_all_pairs(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, means: Means = AS_USUAL
) -> dict[str, float]:
    """Ranks all pairs, or those of each fold, by one score of the fusion encoder: retrieval without contrast.

    The score is that of the ranking head or, without one, of matching, `Scores.match`. Its cost grows with images times
    texts.

    Returns:
        Flat metrics: `one_stage_…` and `chance_…` recalls, and `rsum`.

    Raises:
        ValueError: The model has neither head, an image cannot be decoded, or the folds are not equal.
    """
    _check_folds(images, config)
    if model.rank_head is None:
        model.head("itm")
    head = model.itm_logits if model.rank_head is None else _ranking_logits(model)
    size = config.fold_size or len(images)
    with pair_scorer(model, images, config, means) as pairs:
        chosen = torch.arange(len(images))[:, None] // size == pairs.truth.text_image_index // size
        scores = pairs.score(chosen, head).match
    one_stage, chance = _recalls(scores, pairs.truth, config), _chance(pairs.truth, config)
    return _flat({"one_stage": one_stage, "chance": chance}) | {"rsum": one_stage.rsum}


def _ranking_logits(model: BridgeTower) -> Callable[[Tensor], Tensor]:
    """The score of the ranking head as the logit of a match, against 0."""

    def logits(pooled: Tensor) -> Tensor:
        scores = model.rank_scores(pooled)
        return torch.stack([torch.zeros_like(scores), scores], dim=1)

    return logits


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What the second stage ranks.

    Attributes:
        itm: Matching score of the candidate pairs.
        similarity: Cosine.
        image_side, text_side: True at the candidates of each image and of each text.
        truth: Which images and texts belong together.
        config: Protocol and folds.
    """

    itm: Float[Tensor, "i t"]
    similarity: Float[Tensor, "i t"]
    image_side: Bool[Tensor, "i t"]
    text_side: Bool[Tensor, "i t"]
    truth: GroundTruth
    config: RetrievalConfig

    def recalls(self, itc_weight: float) -> RetrievalRecalls:
        """Returns the recalls of the ranking with a weight of ITC."""
        scores = combined_scores(self.itm, self.similarity, itc_weight) if itc_weight else self.itm
        ranked = two_stage_scores(scores, self.image_side, self.text_side, protocol=self.config.protocol)
        return _recalls(ranked[0], self.truth, self.config, ranked[1])

    def fitted_weight(self) -> float:
        """Returns the one of `ITC_WEIGHTS` with the best mean recall, of equal ones the middle."""
        found = {weight: self.recalls(weight).rsum for weight in ITC_WEIGHTS}
        best = [weight for weight, rsum in found.items() if rsum == max(found.values())]
        return best[len(best) // 2]


def _candidates(
    similarity: Float[Tensor, "i t"], text_image_index: Int[Tensor, " t"], config: RetrievalConfig, *, dim: int
) -> Bool[Tensor, "i t"]:
    """Chooses the candidates of each query among the items of its fold."""
    size = config.fold_size or len(similarity)
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    for start in range(0, len(similarity), size):
        rows, texts = slice(start, start + size), (text_image_index // size == start // size).nonzero().squeeze(1)
        chosen[rows, texts] = topk_candidates(similarity[rows, texts], config.candidates, dim=dim)
    return chosen


def _recalls(
    scores: Float[Tensor, "i t"],
    truth: GroundTruth,
    config: RetrievalConfig,
    text_to_image: Float[Tensor, "i t"] | None = None,
) -> RetrievalRecalls:
    index, owners = truth
    if config.fold_size is None:
        return retrieval_recalls(scores, index, owners=owners, text_to_image_scores=text_to_image)
    return fold_recalls(scores, index, fold_size=config.fold_size, text_to_image_scores=text_to_image)


def _flat(stages: Mapping[str, RetrievalRecalls | None]) -> dict[str, float]:
    """The recalls of each stage that there is, under flat names."""
    return {
        f"{stage}_{name}": value
        for stage, recalls in stages.items()
        if recalls is not None
        for name, value in recalls.to_dict().items()
        if not name.startswith("num_")
    }


def _chance(truth: GroundTruth, config: RetrievalConfig) -> RetrievalRecalls:
    """Recalls of a random ranking."""
    index, owners = truth
    if config.fold_size is None:
        return chance_recalls(index, len(owners), owners=owners)
    return _recalls(torch.zeros(len(owners), len(index)), truth, config)  # tied items count by chance


def _check_folds(images: CaptionImages, config: RetrievalConfig) -> None:
    if config.fold_size is not None and len(images) % config.fold_size:
        raise ValueError(f"{len(images)} images do not split into folds of {config.fold_size}; expected a multiple")


def _matching(pairs: PairScorer, chosen: Bool[Tensor, "i t"] | None = None) -> tuple[Float[Tensor, "i t"], float]:
    """Scores the chosen pairs and the controls; returns the logits of a match, and the accuracy on the controls."""
    controls = _control_pairs(pairs.truth)
    scores = pairs.score(controls if chosen is None else chosen | controls)
    own = pairs.truth.owners[:, None] == pairs.truth.text_image_index
    return scores.match, accuracy(scores.accepted[controls].long(), own[controls].long())


def _control_pairs(truth: GroundTruth) -> Bool[Tensor, "i t"]:
    """Each text with its own image and with one that has other captions, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.arange(len(truth.owners))[:, None] == truth.text_image_index
    different, own = truth.text_image_index.unique(return_inverse=True)
    if len(different) > 1:
        shift = torch.randint(1, len(different), own.shape, generator=generator)
        pairs[different[(own + shift) % len(different)], torch.arange(len(own))] = True
    return pairs
