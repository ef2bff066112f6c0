"""What a validation split shows about matching the candidates of ITC: the weight of both, calibration, gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridgetower.checkpoints import ITC_ALONE, Calibration, Gain, Reranking
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import RECALL_KS, GroundTruth, RetrievalRecalls, hit_chances
from bridgetower.evaluation.pairs import CandidatePairs
from bridgetower.inference import combined_scores

ITC_WEIGHTS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, ITC_ALONE)
"""The weights that a fit tries."""

LEAST_IMAGES = 8
"""Images with different captions that calibration and gain need: four in each half."""

_Z = 1.96  # of a 95 % interval

BINS = 10
"""Of equal width, from 0 to 1."""


class Bin(NamedTuple):
    """Predictions whose probabilities are alike.

    Attributes:
        number: Of the bin, from 0.
        examples: In it.
        probability: Mean.
        right: Share of them, or mean score.
    """

    number: int
    examples: int
    probability: float
    right: float


def reliability(probabilities: Float[Tensor, " n"], right: Float[Tensor, " n"]) -> list[Bin]:
    """Groups predictions by their probability; bins without any are left out."""
    numbers = (probabilities.double() * BINS).long().clamp(max=BINS - 1)
    counts, said, given = (
        torch.bincount(numbers, weights=values.double(), minlength=BINS).tolist()
        for values in (torch.ones_like(right), probabilities, right)
    )
    return [
        Bin(number, int(count), said[number] / count, given[number] / count)
        for number, count in enumerate(counts)
        if count
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Returns the mean difference between probability and share of right predictions, weighed by examples."""
    return sum(one.examples * abs(one.probability - one.right) for one in bins) / sum(one.examples for one in bins)


def calibrate(
    log_odds: Float[Tensor, " n"], matching: Bool[Tensor, " n"], halves: Bool[Tensor, " n"]
) -> Calibration | None:
    """Fits the probability that a candidate matches."""
    sides = (halves, ~halves)
    if any(len(matching[side].unique()) < 2 for side in sides):
        return None
    after = torch.empty_like(log_odds)
    for side in sides:
        slope, intercept = _platt(log_odds[~side], matching[~side])
        after[side] = (slope * log_odds[side] + intercept).sigmoid()
    slope, intercept = _platt(log_odds, matching)
    errors = [expected_calibration_error(reliability(found, matching.float())) for found in (log_odds.sigmoid(), after)]
    return Calibration(
        slope=slope,
        intercept=intercept,
        pairs=len(matching),
        matching=int(matching.sum()),
        ece_before=errors[0],
        ece_after=errors[1],
    )


def _platt(log_odds: Float[Tensor, " n"], matching: Bool[Tensor, " n"]) -> tuple[float, float]:
    """Returns slope and intercept of a logistic regression; a slope below 0 is 0, and the share decides alone."""
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression().fit(log_odds.double().numpy()[:, None], matching.numpy())
    slope, intercept = float(found.coef_[0, 0]), float(found.intercept_[0])
    if slope > 0:
        return slope, intercept
    return 0.0, float(matching.double().mean().logit())


QueryHits = tuple[Float[Tensor, " i"], Float[Tensor, " t"]]
"""Recalls of images that look for texts and of texts that look for images, each the mean over `RECALL_KS`."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What the second stage ranks.

    Attributes:
        pairs: The candidates of images and of texts.
        itm: Matching score of each pair.
        truth: Which images and texts belong together.
        config: Protocol and folds.
    """

    pairs: CandidatePairs
    itm: Float[Tensor, " n"]
    truth: GroundTruth
    config: RetrievalConfig

    def scores(self, itc_weight: float) -> Float[Tensor, " n"]:
        """Returns what ranks the pairs with a weight of ITC."""
        return combined_scores(self.itm, self.pairs.cosine, itc_weight) if itc_weight else self.itm

    def recalls(self, itc_weight: float) -> RetrievalRecalls:
        """Returns the recalls of the ranking with a weight of ITC."""
        scores, fold_size = self.scores(itc_weight), self.config.fold_size
        return self.pairs.recalls(scores, self.truth, self.config.protocol, fold_size=fold_size)

    def error(self, reranking: Reranking) -> float:
        """Returns the expected calibration error of what is shown for the candidates of texts."""
        log_odds, matching, _ = self._of_texts()
        return expected_calibration_error(reliability(reranking.match(log_odds), matching.float()))

    def fitted(self) -> Reranking:
        """Returns the one of `ITC_WEIGHTS` with the best mean recall, of equal ones the middle, and what else is known.

        Calibration and gain are None with fewer than `LEAST_IMAGES` different images.
        """
        hits: dict[float, QueryHits] = {}
        for weight in ITC_WEIGHTS:
            both = self.pairs.places(self.scores(weight), self.truth, self.config.protocol)
            found = [torch.stack([hit_chances(places, k) for k in RECALL_KS]).mean(dim=0) for places in both]
            hits[weight] = found[0], found[1]
        images, texts = (torch.ones(len(side), dtype=torch.bool) for side in hits[0.0])
        weight = _best_weight(hits, images, texts)
        if len(self.truth.owners.unique()) < LEAST_IMAGES:
            return Reranking(itc_weight=weight)
        return Reranking(itc_weight=weight, calibration=calibrate(*self._of_texts()), gain=self._gain(hits))

    @cached_property
    def _halves(self) -> tuple[Bool[Tensor, " i"], Bool[Tensor, " t"]]:
        """Every other image with different captions, and its texts."""
        images = self.truth.owners.unique(return_inverse=True)[1] % 2 == 1
        return images, images[self.truth.text_image_index]

    def _of_texts(self) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"], Bool[Tensor, " n"]]:
        side = self.pairs.text_side
        return self.itm[side], self.pairs.belong(self.truth)[side], self._halves[1][self.pairs.text[side]]

    def _gain(self, hits: Mapping[float, QueryHits]) -> Gain:
        """Compares with the cosine on the same candidates; texts of one image count as one draw in the interval."""
        images, texts = self._halves
        difference = torch.empty(len(texts), dtype=torch.float64)
        for half in (True, False):
            weight = _best_weight(hits, images != half, texts != half)
            own = texts == half
            difference[own] = (hits[weight][1] - hits[ITC_ALONE][1])[own]
        mean = difference.mean()
        owner = self.truth.owners.unique(return_inverse=True)[1][self.truth.text_image_index]
        sums = torch.zeros(int(owner.max()) + 1, dtype=torch.float64).index_add_(0, owner, difference - mean)
        half_width = _Z * float((sums.square().sum() * len(sums) / (len(sums) - 1)).sqrt() / len(difference))
        return Gain(
            difference=float(mean), low=float(mean) - half_width, high=float(mean) + half_width, texts=len(difference)
        )


def _best_weight(hits: Mapping[float, QueryHits], images: Bool[Tensor, " i"], texts: Bool[Tensor, " t"]) -> float:
    """Returns the weight with the best mean recall of some queries in both directions, of equal ones the middle."""
    found = {weight: float(hits_[0][images].mean() + hits_[1][texts].mean()) for weight, hits_ in hits.items()}
    best = [weight for weight, recall in found.items() if recall == max(found.values())]
    return best[len(best) // 2]
