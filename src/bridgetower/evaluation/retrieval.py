"""Image-text retrieval: contrastive recall, then matching of the candidates, with shared encodings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.checkpoints import ITC_WEIGHT, UNMEASURED, Reranking
from bridgetower.data.captions import CaptionImages
from bridgetower.evaluation.class_metrics import accuracy
from bridgetower.evaluation.config import AS_USUAL, Means, RetrievalConfig
from bridgetower.evaluation.metrics import (
    GroundTruth,
    RetrievalRecalls,
    chance_recalls,
    folds,
    streamed_recalls,
    topk_candidates,
)
from bridgetower.evaluation.reranking import Candidates, ranked_recalls
from bridgetower.evaluation.scoring import PairScorer, pair_scorer
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.losses import similarity


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
        reranking: With which candidates were ranked; None where they were not, and with protocol `paper`.
        ece: Expected calibration error of `Reranking.match` on the candidates of texts; None likewise.
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
    reranking: Reranking | None = None
    ece: float | None = None
    itm_accuracy: float | None = None

    @cached_property
    def similarity(self) -> Float[Tensor, "i t"]:
        """Cosines of the contrastive vectors, image by text: all of them, which large sets leave no memory for."""
        return similarity(self.image_vectors, self.text_vectors, torch.ones(()))

    def metrics(self) -> dict[str, float]:
        """Flat metrics: recalls `itc_…`, `matching_…`, `two_stage_…` and `chance_…`, the others, the last `rsum`."""
        stages = {"itc": self.itc_recalls, "matching": self.matching_recalls, "two_stage": self.two_stage_recalls}
        metrics = _flat({**stages, "chance": self.chance})
        weight = None if self.reranking is None else self.reranking.itc_weight
        others = {ITC_WEIGHT: weight, "ece": self.ece, "itm_accuracy": self.itm_accuracy}
        metrics |= {name: value for name, value in others.items() if value is not None}
        return metrics | {"rsum": (self.two_stage_recalls or self.itc_recalls).rsum}


@torch.inference_mode()
def evaluate_retrieval(
    model: BridgeTower,
    images: CaptionImages,
    config: RetrievalConfig,
    means: Means = AS_USUAL,
    *,
    reranking: Reranking | None = UNMEASURED,
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
        reranking: Of the checkpoint; None fits it to these images. Protocol `paper` reads none.

    Raises:
        ValueError: The model has no contrastive head, an image cannot be decoded, or the folds are not equal.
    """
    _check_folds(images, config)
    model.contrastive_head()
    with pair_scorer(model, images, config, means) as pairs:
        vectors, truth = pairs.vectors(), pairs.truth
        second: dict[str, Any] = {}
        if model.itm_head is not None and config.candidates:
            second = _second_stage(pairs, similarity(*vectors, torch.ones(())), config, reranking)
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
        return ranked_recalls(similarity(images, texts, torch.ones(())), None, truth, config)
    return streamed_recalls(
        lambda block: similarity(images, texts[block], torch.ones(())),
        len(images),
        truth.text_image_index,
        owners=truth.owners,
    )


def _second_stage(
    pairs: PairScorer, similarity: Float[Tensor, "i t"], config: RetrievalConfig, reranking: Reranking | None
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
        used = candidates.fitted() if reranking is None else reranking
        found |= {"reranking": used, "ece": candidates.error(used)}
        if used.itc_weight:
            found["two_stage_recalls"] = candidates.recalls(used.itc_weight)
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
    one_stage, chance = ranked_recalls(scores, None, pairs.truth, config), _chance(pairs.truth, config)
    return _flat({"one_stage": one_stage, "chance": chance}) | {"rsum": one_stage.rsum}


def _ranking_logits(model: BridgeTower) -> Callable[[Tensor], Tensor]:
    """The score of the ranking head as the logit of a match, against 0."""

    def logits(pooled: Tensor) -> Tensor:
        scores = model.rank_scores(pooled)
        return torch.stack([torch.zeros_like(scores), scores], dim=1)

    return logits


def _candidates(
    similarity: Float[Tensor, "i t"], text_image_index: Int[Tensor, " t"], config: RetrievalConfig, *, dim: int
) -> Bool[Tensor, "i t"]:
    """Chooses the candidates of each query among the items of its fold."""
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    for rows, texts in folds(text_image_index, len(similarity), config.fold_size):
        chosen[rows, texts] = topk_candidates(similarity[rows, texts], config.candidates, dim=dim)
    return chosen


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
    return ranked_recalls(torch.zeros(len(owners), len(index)), None, truth, config)  # tied items count by chance


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
