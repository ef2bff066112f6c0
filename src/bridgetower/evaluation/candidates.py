"""The candidates of two-stage retrieval, a list of pairs: how they are chosen, ranked, and weighed with ITC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.checkpoints import ITC_ALONE, Calibration, Gain, Reranking
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import (
    PAIRS_AT_ONCE,
    RECALL_KS,
    GroundTruth,
    Places,
    RetrievalRecalls,
    ScoresOf,
    check_not_nan,
    folds,
    hit_chances,
    recalls_of,
)
from bridgetower.inference import combined_scores

ITC_WEIGHTS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, ITC_ALONE)
"""The weights that a fit tries."""

LEAST_IMAGES = 8
"""Images with different captions that calibration and gain need: four in each half."""

BINS = 10
"""Of equal width, from 0 to 1."""

_Z = 1.96  # of a 95 % interval
_LOW_BITS = 2**32 - 1

QueryHits = tuple[Float[Tensor, " i"], Float[Tensor, " t"]]
"""Recalls of images that look for texts and of texts that look for images, each the mean over `RECALL_KS`."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Pairs by image, then by text, each once: candidates of images or texts, and others.

    Attributes:
        image, text: Their rows.
        image_side, text_side: Whether the pair is a candidate of its image, and of its text.
        cosine: NaN where it is neither.
        truth: Which images and texts belong together.
        config: Protocol and folds.
        itm: Matching score of each pair, once they are matched.
    """

    image: Int[Tensor, " n"]
    text: Int[Tensor, " n"]
    image_side: Bool[Tensor, " n"]
    text_side: Bool[Tensor, " n"]
    cosine: Float[Tensor, " n"]
    truth: GroundTruth
    config: RetrievalConfig
    itm: Float[Tensor, " n"] = field(default_factory=lambda: torch.empty(0))

    @property
    def sides(self) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
        """Which pairs rank texts for images, and which images for texts.

        `standard` ranks each direction on its own candidates. `paper` ranks both on those of either side: the official
        code takes the maximum of both sides' scores, where −100 stands for a pair that a side dropped (`objectives.py`,
        `compute_irtr_itm_itc_recall`).
        """
        if self.config.protocol == "paper":
            return (self.image_side | self.text_side,) * 2
        return self.image_side, self.text_side

    @cached_property
    def belong(self) -> Bool[Tensor, " n"]:
        return self.truth.owners[self.image] == self.truth.text_image_index[self.text]

    def scores(self, itc_weight: float) -> Float[Tensor, " n"]:
        return combined_scores(self.itm, self.cosine, itc_weight) if itc_weight else self.itm

    def places(self, itc_weight: float = 0.0) -> tuple[Places, Places]:
        """Returns where right answers stand in the ranking of candidates: texts for images, and images for texts."""
        found, counts = [], (len(self.truth.owners), len(self.truth.text_image_index))
        for queries, side, count in zip((self.image, self.text), self.sides, counts, strict=True):
            # What is no candidate stands behind all candidates and is never a hit.
            ranked, asking, right = self.scores(itc_weight)[side], queries[side], self.belong[side]
            check_not_nan(ranked, "candidate scores")
            worst = ranked.new_full((count,), -torch.inf)
            best = worst.scatter_reduce(0, asking[right], ranked[right], "amax")[asking]
            kinds = ranked > best, ranked == best, (ranked == best) & right
            found.append(Places(*(torch.bincount(asking[some], minlength=count) for some in kinds)))
        return found[0], found[1]

    def recalls(self, itc_weight: float = 0.0, ks: Sequence[int] = RECALL_KS) -> RetrievalRecalls:
        """Returns the recalls of the ranking of candidates; of folds, in which these were chosen, the mean."""
        images, texts = self.places(itc_weight)
        found = [
            (Places(*(each[rows] for each in images)), Places(*(each[columns] for each in texts)))
            for rows, columns, _ in folds(self.truth, self.config.fold_size)
        ]
        return recalls_of(found, ks)

    def error(self, reranking: Reranking) -> float:
        """Returns the expected calibration error of what is shown for the candidates of texts."""
        shown = reranking.match(self.itm[self.text_side])
        return expected_calibration_error(reliability(shown, self.belong[self.text_side].float()))

    def fitted(self) -> Reranking:
        """Returns the one of `ITC_WEIGHTS` with the best mean recall, of equal ones the middle, and what else is known.

        Calibration and gain are None with fewer than `LEAST_IMAGES` different images. Each half of them, every other
        image with its texts, is then judged by what the other half gives.
        """
        hits: dict[float, QueryHits] = {}
        for weight in ITC_WEIGHTS:
            found = [torch.stack([hit_chances(each, k) for k in RECALL_KS]).mean(dim=0) for each in self.places(weight)]
            hits[weight] = found[0], found[1]
        every = [torch.ones(len(side), dtype=torch.bool) for side in hits[0.0]]
        weight = _best_weight(hits, *every)
        different, group = self.truth.owners.unique(return_inverse=True)
        if len(different) < LEAST_IMAGES:
            return Reranking(itc_weight=weight)
        owner = group[self.truth.text_image_index]
        images, texts, side = group % 2 == 1, owner % 2 == 1, self.text_side
        calibration = calibrate(self.itm[side], self.belong[side], texts[self.text[side]])
        # The gain over the cosine on the same candidates; texts of one image count as one draw in the interval.
        difference = torch.empty(len(texts), dtype=torch.float64)
        for half in (True, False):
            other, own = _best_weight(hits, images != half, texts != half), texts == half
            difference[own] = (hits[other][1] - hits[ITC_ALONE][1])[own]
        mean = float(difference.mean())
        sums = torch.zeros(len(different), dtype=torch.float64).index_add_(0, owner, difference - mean)
        half_width = _Z * float((sums.square().sum() * len(sums) / (len(sums) - 1)).sqrt() / len(difference))
        gain = Gain(difference=mean, low=mean - half_width, high=mean + half_width, texts=len(difference))
        return Reranking(itc_weight=weight, calibration=calibration, gain=gain)


def _best_weight(hits: Mapping[float, QueryHits], images: Bool[Tensor, " i"], texts: Bool[Tensor, " t"]) -> float:
    """Returns the weight with the best mean recall of some queries in both directions, of equal ones the middle."""
    found = {weight: float(side[0][images].mean() + side[1][texts].mean()) for weight, side in hits.items()}
    best = [weight for weight, recall in found.items() if recall == max(found.values())]
    return best[len(best) // 2]


class Bin(NamedTuple):
    """Predictions of like probabilities: the number of the bin, of examples, the mean probability, the share right."""

    number: int
    examples: int
    probability: float
    right: float


def reliability(probabilities: Float[Tensor, " n"], right: Float[Tensor, " n"]) -> list[Bin]:
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


def candidate_pairs(
    scores_of: ScoresOf,
    truth: GroundTruth,
    config: RetrievalConfig,
    *,
    others: tuple[Int[Tensor, " m"], Int[Tensor, " m"]] | None = None,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> Candidates:
    """First stage of retrieval: the k most similar texts of each image and the k most similar images of each text.

    Of equally similar ones it takes those of the lower rows. Further pairs may be listed.
    """
    every_image, num_texts, k = torch.arange(len(truth.owners)), len(truth.text_image_index), config.candidates
    of_images, of_texts = [], []  # numbers of pairs, image · texts + text, and their cosines
    for rows, columns, _ in folds(truth, config.fold_size):
        images = every_image[rows]
        best = torch.empty(len(images), 0, dtype=torch.int64)
        for block in columns.split(max(1, pairs_at_once // len(images))):
            scores = scores_of(rows, block)
            check_not_nan(scores, "similarities")
            best = _highest(torch.cat([best, _highest(_keys(scores, block), k)], dim=1), k)
            found, cosines = _decoded(_highest(_keys(scores.T, images), k))
            of_texts.append(((found * num_texts + block[:, None]).flatten(), cosines.flatten()))
        found, cosines = _decoded(best)
        of_images.append(((images[:, None] * num_texts + found).flatten(), cosines.flatten()))
    sides = [[torch.cat(parts) for parts in zip(*side, strict=True)] for side in (of_images, of_texts)]
    further = [] if others is None else [others[0] * num_texts + others[1]]
    numbers = torch.cat([sides[0][0], sides[1][0], *further]).unique()
    cosine, flags = torch.full(numbers.shape, torch.nan), torch.zeros(2, len(numbers), dtype=torch.bool)
    for flag, (numbered, cosines) in zip(flags, sides, strict=True):
        places = torch.searchsorted(numbers, numbered)
        cosine[places], flag[places] = cosines, True
    return Candidates(
        image=numbers // num_texts,
        text=numbers % num_texts,
        image_side=flags[0],
        text_side=flags[1],
        cosine=cosine,
        truth=truth,
        config=config,
    )


def _keys(scores: Float[Tensor, "q m"], items: Int[Tensor, " m"]) -> Int[Tensor, "q m"]:
    """Whole numbers of a score and an item, in the order of the scores; of equal ones the lower item comes higher.

    The bits of a float32, as a whole number, are in its order, those of negative ones in reverse.
    """
    bits = _ordered((scores.float() + 0.0).view(torch.int32))  # adding makes 0.0 of -0.0
    return bits.long().bitwise_left_shift_(32).bitwise_or_(_LOW_BITS - items)


def _decoded(keys: Int[Tensor, "q k"]) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
    return _LOW_BITS - (keys & _LOW_BITS), _ordered((keys >> 32).int()).view(torch.float32)


def _ordered(bits: Int[Tensor, "*s"]) -> Int[Tensor, "*s"]:
    """Turns the order of the negative ones around; done twice, it changes nothing."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _highest(keys: Int[Tensor, "q m"], k: int) -> Int[Tensor, "q k"]:
    return keys.topk(min(k, keys.shape[1]), sorted=False).values
