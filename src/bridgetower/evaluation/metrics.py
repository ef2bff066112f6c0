"""Recalls of image-text retrieval; how candidates are chosen, weighed and calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.checkpoints import ITC_ALONE, Calibration, Gain, Reranking
from bridgetower.evaluation.config import RetrievalConfig

PAIRS_AT_ONCE = 2**22
"""Pairs that are compared at once: to count a row's, `sum` makes eight bytes of each."""

RECALL_KS = (1, 5, 10)
"""The ranks that the field reports; RSUM is the sum of both directions at these three."""

ITC_WEIGHTS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, ITC_ALONE)
"""The weights that a fit tries."""

LEAST_IMAGES = 8
"""Images with different captions that calibration and gain need: four in each half."""

BINS = 10
"""Of equal width, from 0 to 1."""

_Z = 1.96  # of a 95 % interval
_LOW_BITS = 2**32 - 1

ScoresOf = Callable[[slice, Int[Tensor, " b"]], Float[Tensor, "i b"]]
"""Gives the scores of the images and the texts of these rows, the same at every call; higher is more alike."""


class GroundTruth(NamedTuple):
    """Which images and texts belong together."""

    text_image_index: Int[Tensor, " t"]  # row of the image that each text belongs to
    owners: Int[Tensor, " i"]  # of the image whose texts belong to each image: itself, or one with the same captions


class Places(NamedTuple):
    """Where the best own item of each query stands; all fields are [queries]."""

    better: Int[Tensor, " q"]  # items that score strictly more
    tied: Int[Tensor, " q"]  # items that score the same, itself included
    own: Int[Tensor, " q"]  # own items among the tied; 0: the query can have no hit


def hit_chances(places: Places, k: int) -> Float[Tensor, " q"]:
    """Probability of a hit at k of each query when tied items are ordered at random.

    The tied items fill the `room` places that the better ones leave; drawn without replacement, none of them is an
    own one with probability C(tied − own, room)/C(tied, room), here as a product, which is exact for 0 and 1.
    """
    room = (k - places.better).clamp(min=0).minimum(places.tied)
    miss = torch.ones_like(room, dtype=torch.float64)
    for drawn in range(int(room.max())):
        strangers = (places.tied - places.own - drawn).clamp(min=0)
        left = (places.tied - drawn).clamp(min=1)
        miss = torch.where(drawn < room, miss * strangers / left, miss)
    return 1.0 - miss


def folds(truth: GroundTruth, fold_size: int | None) -> Iterator[tuple[slice, Int[Tensor, " f"], GroundTruth]]:
    """Yields the rows of the images of each fold, or of all, and of their texts, and which of these belong together."""
    index, owners = truth
    size = fold_size or len(owners)
    for start in range(0, len(owners), size):
        rows, texts = slice(start, start + size), (index // size == start // size).nonzero().squeeze(1)
        yield rows, texts, GroundTruth(index[texts] - start, owners[rows] - start)


def check_not_nan(values: Tensor, name: str) -> None:
    count = int(values.isnan().count_nonzero())
    if count:
        raise ValueError(f"{count} of {values.numel()} {name} are NaN; expected numbers, check the model's outputs")


class RetrievalRecalls(NamedTuple):
    """Recall at k in both directions: k → share of queries with at least one own item among their top k."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    @property
    def rsum(self) -> float:
        """Sum of all recalls; at ranks 1, 5 and 10 the published RSUM in percent is 100 times this (6: perfect)."""
        return sum(self.image_to_text.values()) + sum(self.text_to_image.values())

    def named(self, stage: str) -> dict[str, float]:
        """Returns metrics: `STAGE_image_to_text_r1`, `STAGE_text_to_image_r1`, …, `STAGE_rsum`."""
        recalls = {f"{stage}_{side}_r{k}": share for side in self._fields for k, share in getattr(self, side).items()}
        return recalls | {f"{stage}_rsum": self.rsum}


def recalls_of(found: Sequence[tuple[Places, Places]], ks: Sequence[int] = RECALL_KS) -> RetrievalRecalls:
    """Recall at k of images that look for texts and of texts that look for images: the mean over equal folds.

    Without ties this is the share of hits in `torch.topk`; tied scores count by their chance of a hit when they are
    ordered at random, so constant scores give exactly `chance_recalls` and the order of the rows never matters.
    """
    return RetrievalRecalls(
        *(
            {k: sum(hit_chances(places, k).mean().item() for places in side) / len(side) for k in ks}
            for side in zip(*found, strict=True)
        )
    )


def streamed_recalls(
    scores_of: ScoresOf,
    truth: GroundTruth,
    *,
    fold_size: int | None = None,
    ks: Sequence[int] = RECALL_KS,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> RetrievalRecalls:
    """Recalls of the ranking of all items, or those of a fold, with the scores of a block of texts in memory."""
    found = []
    for rows, columns, fold in folds(truth, fold_size):
        counts = len(fold.owners), len(columns)
        best = [torch.full((count,), -torch.inf) for count in counts]
        places = [Places(*(torch.zeros(count, dtype=torch.int64) for _ in range(3))) for count in counts]
        size = max(1, pairs_at_once // counts[0])
        for is_counted in (False, True):  # how many are as high as the best own item, once that is known
            for block, texts in zip(columns.split(size), torch.arange(counts[1]).split(size), strict=True):
                scores = scores_of(rows, block).float()
                image, text = (fold.owners[:, None] == fold.text_image_index[texts]).nonzero(as_tuple=True)
                own, asking = scores[image, text], (image, texts[text])
                if not is_counted:
                    check_not_nan(scores, "scores")
                    for highest, queries in zip(best, asking, strict=True):
                        highest.scatter_reduce_(0, queries, own, "amax")
                    continue
                for place, highest, queries in zip(places, best, asking, strict=True):
                    place.own.add_(torch.bincount(queries[own == highest[queries]], minlength=len(highest)))
                places[0].better.add_((scores > best[0][:, None]).sum(dim=1))
                places[0].tied.add_((scores == best[0][:, None]).sum(dim=1))
                places[1].better[texts] = (scores > best[1][texts]).sum(dim=0)
                places[1].tied[texts] = (scores == best[1][texts]).sum(dim=0)
        found.append((places[0], places[1]))
    return recalls_of(found, ks)


def chance_recalls(
    truth: GroundTruth, *, fold_size: int | None = None, ks: Sequence[int] = RECALL_KS
) -> RetrievalRecalls:
    """Expected recalls of a random ranking: with M items of which n are right, the mean of 1 − C(M−n, k)/C(M, k)."""
    found = []
    for _, _, (index, owners) in folds(truth, fold_size):
        own = torch.bincount(index, minlength=len(owners))[owners], torch.bincount(owners, minlength=len(owners))[index]
        images, texts = (
            Places(torch.zeros_like(each), torch.full_like(each, count), each)
            for each, count in zip(own, (len(index), len(owners)), strict=True)
        )
        found.append((images, texts))
    return recalls_of(found, ks)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Pairs by image, then by text, each once: candidates of images or texts, and others."""

    image: Int[Tensor, " n"]
    text: Int[Tensor, " n"]
    image_side: Bool[Tensor, " n"]  # whether the pair is a candidate of its image
    text_side: Bool[Tensor, " n"]  # and of its text
    cosine: Float[Tensor, " n"]  # NaN where it is neither
    truth: GroundTruth
    config: RetrievalConfig
    itm: Float[Tensor, " n"] = field(default_factory=lambda: torch.empty(0))  # matching score, once they are matched

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
        return torch.add(self.itm, self.cosine, alpha=itc_weight) if itc_weight else self.itm

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
        """Returns that of `ITC_WEIGHTS` with the best mean recall, of equal ones the middle, and what else is known."""
        hits = {
            weight: [torch.stack([hit_chances(each, k) for k in RECALL_KS]).mean(dim=0) for each in self.places(weight)]
            for weight in ITC_WEIGHTS
        }

        def best_weight(images: Bool[Tensor, " i"], texts: Bool[Tensor, " t"]) -> float:  # of these queries
            found = {weight: float(side[0][images].mean() + side[1][texts].mean()) for weight, side in hits.items()}
            best = [weight for weight, recall in found.items() if recall == max(found.values())]
            return best[len(best) // 2]

        every = [torch.ones(len(side), dtype=torch.bool) for side in hits[0.0]]
        weight = best_weight(*every)
        different, group = self.truth.owners.unique(return_inverse=True)
        if len(different) < LEAST_IMAGES:
            return Reranking(itc_weight=weight)
        owner = group[self.truth.text_image_index]
        images, texts, side = group % 2 == 1, owner % 2 == 1, self.text_side
        calibration = calibrate(self.itm[side], self.belong[side], texts[self.text[side]])
        # The gain over the cosine on the same candidates; texts of one image count as one draw in the interval.
        difference = torch.empty(len(texts), dtype=torch.float64)
        for half in (True, False):
            other, own = best_weight(images != half, texts != half), texts == half
            difference[own] = (hits[other][1] - hits[ITC_ALONE][1])[own]
        mean = float(difference.mean())
        sums = torch.zeros(len(different), dtype=torch.float64).index_add_(0, owner, difference - mean)
        half_width = _Z * float((sums.square().sum() * len(sums) / (len(sums) - 1)).sqrt() / len(difference))
        gain = Gain(difference=mean, low=mean - half_width, high=mean + half_width, texts=len(difference))
        return Reranking(itc_weight=weight, calibration=calibration, gain=gain)


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
    from sklearn.linear_model import LogisticRegression

    sides = (halves, ~halves)
    if any(len(matching[side].unique()) < 2 for side in sides):
        return None

    def platt(odds: Float[Tensor, " n"], right: Bool[Tensor, " n"]) -> tuple[float, float]:
        found = LogisticRegression().fit(odds.double().numpy()[:, None], right.numpy())
        slope, intercept = float(found.coef_[0, 0]), float(found.intercept_[0])
        return (slope, intercept) if slope > 0 else (0.0, float(right.double().mean().logit()))  # the share alone

    after = torch.empty_like(log_odds)
    for side in sides:
        slope, intercept = platt(log_odds[~side], matching[~side])
        after[side] = (slope * log_odds[side] + intercept).sigmoid()
    slope, intercept = platt(log_odds, matching)
    errors = [expected_calibration_error(reliability(found, matching.float())) for found in (log_odds.sigmoid(), after)]
    return Calibration(
        slope=slope,
        intercept=intercept,
        pairs=len(matching),
        matching=int(matching.sum()),
        ece_before=errors[0],
        ece_after=errors[1],
    )


def candidate_pairs(
    scores_of: ScoresOf,
    truth: GroundTruth,
    config: RetrievalConfig,
    *,
    others: tuple[Int[Tensor, " m"], Int[Tensor, " m"]] | None = None,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> Candidates:
    """First stage of retrieval: the k most similar texts of each image and the k most similar images of each text."""
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
    """Whole numbers of a score and an item, in the order of the scores; of equal ones the lower item comes higher."""
    bits = _ordered((scores.float() + 0.0).view(torch.int32))  # adding makes 0.0 of -0.0
    return bits.long().bitwise_left_shift_(32).bitwise_or_(_LOW_BITS - items)


def _decoded(keys: Int[Tensor, "q k"]) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
    return _LOW_BITS - (keys & _LOW_BITS), _ordered((keys >> 32).int()).view(torch.float32)


def _ordered(bits: Int[Tensor, "*s"]) -> Int[Tensor, "*s"]:
    """Bits of float32 are, as whole numbers, in its order, those of negative ones in reverse: turns these around."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _highest(keys: Int[Tensor, "q m"], k: int) -> Int[Tensor, "q k"]:
    return keys.topk(min(k, keys.shape[1]), sorted=False).values
