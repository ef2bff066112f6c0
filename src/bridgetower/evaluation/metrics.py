"""Recalls of image-text retrieval, and the selection, weighing and calibration of its candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.checkpoints import ITC_ALONE, Calibration, Gain, Reranking
from bridgetower.evaluation.config import RetrievalConfig

PAIRS_AT_ONCE = 2**22
"""Pairs that are compared at once: to count a row's, `sum` makes eight bytes of each."""

RECALL_KS = (1, 5, 10)
"""The ranks that the field reports. RSUM is the sum of both directions at these three."""

ITC_WEIGHTS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, ITC_ALONE)
"""The weights that a fit tries."""

LEAST_IMAGES = 8
"""Images with different captions that calibration and gain need: four in each half."""

BINS = 10
"""Of equal width, from 0 to 1."""

_Z = 1.96  # of a 95 % interval

PairIndex = Int[Tensor, " n"]
"""The image or the text of each pair."""

PairScores = Float[Tensor, " n"]
PairMask = Bool[Tensor, " n"]

ScoresOf = Callable[[slice, Int[Tensor, " b"]], Float[Tensor, "i b"]]
"""Gives the scores of the images and the texts of these rows, the same at every call. Higher is more alike."""


class GroundTruth(NamedTuple):
    """Which images and texts belong together."""

    text_image_index: Int[Tensor, " t"]  # row of the image that each text belongs to
    # of the image whose texts belong to each image: itself, or one with the same captions
    owners: Int[Tensor, " i"]


class BestRanks(NamedTuple):
    """Where the best right item of each query stands. All fields are [queries]."""

    higher: Int[Tensor, " q"]  # items that score more
    tied: Int[Tensor, " q"]  # items that score the same, itself included
    right: Int[Tensor, " q"]  # right items among the tied; 0: the query can have no hit

    def rows(self, selected: slice | PairIndex) -> BestRanks:
        """Returns the ranks of some queries."""
        return BestRanks(self.higher[selected], self.tied[selected], self.right[selected])


def hit_chances(ranks: BestRanks, k: int) -> Float[Tensor, " q"]:
    """Probability of a hit at k of each query when tied items are ordered at random.

    The tied items fill the `room` ranks that the higher ones leave. Drawn without replacement, none of them is a right
    one with probability C(tied − right, room)/C(tied, room), here as a product, which is exact for 0 and 1.
    """
    room = (k - ranks.higher).clamp(min=0).minimum(ranks.tied)
    miss = torch.ones_like(room, dtype=torch.float64)
    for num_drawn in range(int(room.max())):
        wrong_left = (ranks.tied - ranks.right - num_drawn).clamp(min=0)
        tied_left = (ranks.tied - num_drawn).clamp(min=1)
        miss = torch.where(num_drawn < room, miss * wrong_left / tied_left, miss)
    return 1.0 - miss


def folds(
    truth: GroundTruth, fold_size: int | None
) -> Iterator[tuple[slice, Int[Tensor, " f"], GroundTruth]]:
    """Yields for each fold, or for all: the rows of its images, those of its texts, and which of these match."""
    index, owners = truth
    size = fold_size or len(owners)
    for start in range(0, len(owners), size):
        images = slice(start, start + size)
        texts = (index // size == start // size).nonzero().squeeze(1)
        fold = GroundTruth(index[texts] - start, owners[images] - start)
        yield images, texts, fold


def check_not_nan(values: Tensor, name: str) -> None:
    count = int(values.isnan().count_nonzero())
    if count:
        raise ValueError(
            f"{count} of {values.numel()} {name} are NaN; expected numbers, check the model's outputs"
        )


class RetrievalRecalls(NamedTuple):
    """Recall at k in both directions: k → share of queries with at least one right item among their top k."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    @property
    def rsum(self) -> float:
        """Sum of all recalls, 6 if perfect. At ranks 1, 5 and 10 the published RSUM is 100 times this."""
        return sum(self.image_to_text.values()) + sum(self.text_to_image.values())

    def named(self, stage: str) -> dict[str, float]:
        """Returns metrics: `STAGE_image_to_text_r1`, `STAGE_text_to_image_r1`, …, `STAGE_rsum`."""
        metrics: dict[str, float] = {}
        for direction in ("image_to_text", "text_to_image"):
            for k, recall in getattr(self, direction).items():
                metrics[f"{stage}_{direction}_r{k}"] = recall
        metrics[f"{stage}_rsum"] = self.rsum
        return metrics


def recalls_of(
    ranks_of_folds: Sequence[tuple[BestRanks, BestRanks]], ks: Sequence[int] = RECALL_KS
) -> RetrievalRecalls:
    """Recall at k of images that look for texts and of texts that look for images: the mean over equal folds.

    Without ties this is the share of hits in `torch.topk`. Tied scores count by their chance of a hit when they are
    ordered at random: constant scores give exactly `chance_recalls`, and the order of the rows never matters.
    """
    recalls = []
    for ranks in zip(*ranks_of_folds, strict=True):
        recall_of: dict[int, float] = {}
        for k in ks:
            recall_of[k] = fmean(hit_chances(fold, k).mean().item() for fold in ranks)
        recalls.append(recall_of)
    return RetrievalRecalls(*recalls)


def streamed_recalls(
    scores_of: ScoresOf,
    truth: GroundTruth,
    *,
    fold_size: int | None = None,
    ks: Sequence[int] = RECALL_KS,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> RetrievalRecalls:
    """Recalls of the ranking of all items, or those of a fold, with the scores of a block of texts in memory."""
    ranks_of_folds = []
    for images, texts, fold in folds(truth, fold_size):
        ranks_of_folds.append(_best_ranks(scores_of, images, texts, fold, pairs_at_once))
    return recalls_of(ranks_of_folds, ks)


def _best_ranks(
    scores_of: ScoresOf,
    images: slice,
    texts: Int[Tensor, " t"],
    fold: GroundTruth,
    pairs_at_once: int,
) -> tuple[BestRanks, BestRanks]:
    """Returns the ranks of the best right text of each image, and of the best right image of each text."""
    num_images = len(fold.owners)
    num_texts = len(texts)
    block_size = max(1, pairs_at_once // num_images)

    def blocks() -> Iterator[tuple[slice, Float[Tensor, "i b"], PairIndex, PairIndex]]:
        """Yields the columns of a block of texts, its scores, and the images and texts that belong together."""
        for start in range(0, num_texts, block_size):
            columns = slice(start, start + block_size)
            scores = scores_of(images, texts[columns]).float()
            belongs = fold.owners[:, None] == fold.text_image_index[columns]
            image, column = belongs.nonzero(as_tuple=True)
            yield columns, scores, image, column + start

    # All scores are read once for the best right ones.
    best_of_image = torch.full((num_images,), -torch.inf)
    best_of_text = torch.full((num_texts,), -torch.inf)
    for columns, scores, image, text in blocks():
        check_not_nan(scores, "scores")
        right_scores = scores[image, text - columns.start]
        best_of_image.scatter_reduce_(0, image, right_scores, "amax")
        best_of_text.scatter_reduce_(0, text, right_scores, "amax")

    # They are read again to count those that are higher or the same.
    image_ranks = _zero_ranks(num_images)
    text_ranks = _zero_ranks(num_texts)
    for columns, scores, image, text in blocks():
        right_scores = scores[image, text - columns.start]
        ties_of_image = image[right_scores == best_of_image[image]]
        ties_of_text = text[right_scores == best_of_text[text]]
        image_ranks.right.add_(torch.bincount(ties_of_image, minlength=num_images))
        text_ranks.right.add_(torch.bincount(ties_of_text, minlength=num_texts))

        best_of_row = best_of_image[:, None]
        image_ranks.higher.add_((scores > best_of_row).sum(dim=1))
        image_ranks.tied.add_((scores == best_of_row).sum(dim=1))
        text_ranks.higher[columns] = (scores > best_of_text[columns]).sum(dim=0)
        text_ranks.tied[columns] = (scores == best_of_text[columns]).sum(dim=0)
    return image_ranks, text_ranks


def _zero_ranks(count: int) -> BestRanks:
    return BestRanks(*(torch.zeros(count, dtype=torch.int64) for _ in BestRanks._fields))


def chance_recalls(
    truth: GroundTruth, *, fold_size: int | None = None, ks: Sequence[int] = RECALL_KS
) -> RetrievalRecalls:
    """Expected recalls of a random ranking.

    With M items of which n are right, it is the mean of 1 − C(M−n, k)/C(M, k).
    """
    ranks_of_folds = []
    for _, _, (index, owners) in folds(truth, fold_size):
        num_texts = torch.bincount(index, minlength=len(owners))[owners]
        num_images = torch.bincount(owners, minlength=len(owners))[index]
        ranks = []
        for right, num_items in ((num_texts, len(index)), (num_images, len(owners))):
            tied = torch.full_like(right, num_items)
            ranks.append(BestRanks(torch.zeros_like(right), tied, right))
        ranks_of_folds.append((ranks[0], ranks[1]))
    return recalls_of(ranks_of_folds, ks)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Pairs by image, then by text, each once: candidates of images or texts, and extra_pairs."""

    image: PairIndex
    text: PairIndex
    image_side: PairMask  # whether the pair is a candidate of its image
    text_side: PairMask  # and of its text
    cosine: PairScores  # NaN where it is neither
    truth: GroundTruth
    config: RetrievalConfig
    # matching score, once they are matched
    itm: PairScores = field(default_factory=lambda: torch.empty(0))

    @property
    def sides(self) -> tuple[PairMask, PairMask]:
        """Which pairs rank texts for images, and which images for texts.

        `standard` ranks each direction on its own candidates. `paper` ranks both on those of either side: the official
        code takes the maximum of both sides' scores, where −100 stands for a pair that a side dropped (`objectives.py`,
        `compute_irtr_itm_itc_recall`).
        """
        if self.config.protocol == "paper":
            return (self.image_side | self.text_side,) * 2
        return self.image_side, self.text_side

    @cached_property
    def belong(self) -> PairMask:
        return self.truth.owners[self.image] == self.truth.text_image_index[self.text]

    def scores(self, itc_weight: float) -> PairScores:
        return torch.add(self.itm, self.cosine, alpha=itc_weight) if itc_weight else self.itm

    def best_ranks(self, itc_weight: float = 0.0) -> tuple[BestRanks, BestRanks]:
        """Returns the ranks of right answers among candidates: of texts for images, and of images for texts."""
        image_side, text_side = self.sides
        image_ranks = self._ranks_of(self.image, image_side, len(self.truth.owners), itc_weight)
        text_ranks = self._ranks_of(
            self.text, text_side, len(self.truth.text_image_index), itc_weight
        )
        return image_ranks, text_ranks

    def _ranks_of(
        self,
        queries: PairIndex,
        side: PairMask,
        num_queries: int,
        itc_weight: float,
    ) -> BestRanks:
        """Ranks the candidates of queries. What is no candidate stands behind all of them and is never a hit."""
        scores = self.scores(itc_weight)[side]
        check_not_nan(scores, "candidate scores")
        query = queries[side]
        is_right = self.belong[side]
        lowest = scores.new_full((num_queries,), -torch.inf)
        best = lowest.scatter_reduce(0, query[is_right], scores[is_right], "amax")[query]
        is_tied = scores == best
        return BestRanks(
            higher=torch.bincount(query[scores > best], minlength=num_queries),
            tied=torch.bincount(query[is_tied], minlength=num_queries),
            right=torch.bincount(query[is_tied & is_right], minlength=num_queries),
        )

    def recalls(self, itc_weight: float = 0.0, ks: Sequence[int] = RECALL_KS) -> RetrievalRecalls:
        """Returns the recalls of the ranking of candidates, or their mean over the folds of the config."""
        image_ranks, text_ranks = self.best_ranks(itc_weight)
        ranks_of_folds = []
        for images, texts, _ in folds(self.truth, self.config.fold_size):
            ranks_of_folds.append((image_ranks.rows(images), text_ranks.rows(texts)))
        return recalls_of(ranks_of_folds, ks)

    def error(self, reranking: Reranking) -> float:
        """Returns the expected calibration error of the probabilities of a match of the candidates of texts."""
        probabilities = reranking.match(self.itm[self.text_side])
        bins = reliability(probabilities, self.belong[self.text_side].float())
        return expected_calibration_error(bins)

    def fitted(self) -> Reranking:
        """Returns the weight of ITC with the best mean recall, a calibration, and the gain over ITC alone.

        Of several weights that are equally good, the middle one is taken.
        """
        image_hits, text_hits = self._hits_by_weight()
        all_images = torch.ones(len(self.truth.owners), dtype=torch.bool)
        all_texts = torch.ones(len(self.truth.text_image_index), dtype=torch.bool)
        weight = _best_weight(image_hits, text_hits, all_images, all_texts)

        # What belongs to one image, or to images with the same captions, is a group. Half of the groups are odd.
        different_images, group = self.truth.owners.unique(return_inverse=True)
        if len(different_images) < LEAST_IMAGES:
            return Reranking(itc_weight=weight)
        group_of_text = group[self.truth.text_image_index]
        is_odd_image = group % 2 == 1
        is_odd_text = group_of_text % 2 == 1
        side = self.text_side
        is_odd_pair = is_odd_text[self.text[side]]
        calibration = calibrate(self.itm[side], self.belong[side], is_odd_pair)

        # The gain on each half, with the weight that is best on the other half.
        difference = torch.empty(len(all_texts), dtype=torch.float64)
        for half in (True, False):
            other_images = is_odd_image != half
            other_texts = is_odd_text != half
            other_weight = _best_weight(image_hits, text_hits, other_images, other_texts)
            texts = is_odd_text == half
            difference[texts] = (text_hits[other_weight] - text_hits[ITC_ALONE])[texts]

        # The interval of the mean gain, in which the texts of a group count as one draw.
        mean = float(difference.mean())
        num_groups = len(different_images)
        sums = torch.zeros(num_groups, dtype=torch.float64)
        sums.index_add_(0, group_of_text, difference - mean)
        variance = sums.square().sum() * num_groups / (num_groups - 1)
        half_width = _Z * float(variance.sqrt() / len(difference))
        gain = Gain(
            difference=mean, low=mean - half_width, high=mean + half_width, texts=len(difference)
        )
        return Reranking(itc_weight=weight, calibration=calibration, gain=gain)

    def _hits_by_weight(self) -> tuple[dict[float, Tensor], dict[float, Tensor]]:
        """Returns the mean recall over `RECALL_KS` of each image and of each text, by weight of ITC."""
        image_hits: dict[float, Tensor] = {}
        text_hits: dict[float, Tensor] = {}
        for weight in ITC_WEIGHTS:
            for hits, ranks in zip((image_hits, text_hits), self.best_ranks(weight), strict=True):
                chances = [hit_chances(ranks, k) for k in RECALL_KS]
                hits[weight] = torch.stack(chances).mean(dim=0)
        return image_hits, text_hits


def _best_weight(
    image_hits: Mapping[float, Tensor],
    text_hits: Mapping[float, Tensor],
    images: Bool[Tensor, " i"],
    texts: Bool[Tensor, " t"],
) -> float:
    """Returns the weight with the best recall of some queries, of equally good ones the middle one."""
    recalls = {
        weight: float(image_hits[weight][images].mean() + text_hits[weight][texts].mean())
        for weight in ITC_WEIGHTS
    }
    highest = max(recalls.values())
    best_weights = [weight for weight, recall in recalls.items() if recall == highest]
    return best_weights[len(best_weights) // 2]


class Bin(NamedTuple):
    """Predictions of similar probability."""

    number: int  # of the bin, from 0
    examples: int
    probability: float  # mean
    right: float  # share


def reliability(probabilities: PairScores, right: PairScores) -> list[Bin]:
    """Returns the bins that have examples."""
    numbers = (probabilities.double() * BINS).long().clamp(max=BINS - 1)
    bins = []
    for number in numbers.unique().tolist():
        in_bin = numbers == number
        probability = probabilities[in_bin].double().mean().item()
        share = right[in_bin].double().mean().item()
        bins.append(Bin(number, int(in_bin.sum()), probability, share))
    return bins


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Returns the mean difference between probability and share of right predictions, weighed by examples."""
    error = 0.0
    num_examples = 0
    for bin_ in bins:
        error += bin_.examples * abs(bin_.probability - bin_.right)
        num_examples += bin_.examples
    return error / num_examples


def calibrate(log_odds: PairScores, matching: PairMask, halves: PairMask) -> Calibration | None:
    """Fits Platt's calibration. Its error is measured on each half with a fit on the other half.

    Args:
        log_odds: Of a match, of each pair.
        matching: Whether the pair matches.
        halves: Which half the pair is in.

    Returns:
        None if a half has only pairs that match, or only extra_pairs.
    """
    if any(len(matching[half].unique()) < 2 for half in (halves, ~halves)):
        return None
    calibrated = torch.empty_like(log_odds)
    for half in (halves, ~halves):
        slope, intercept = _platt(log_odds[~half], matching[~half])
        calibrated[half] = (slope * log_odds[half] + intercept).sigmoid()
    slope, intercept = _platt(log_odds, matching)
    return Calibration(
        slope=slope,
        intercept=intercept,
        pairs=len(matching),
        matching=int(matching.sum()),
        ece_before=expected_calibration_error(reliability(log_odds.sigmoid(), matching.float())),
        ece_after=expected_calibration_error(reliability(calibrated, matching.float())),
    )


def _platt(log_odds: PairScores, matching: PairMask) -> tuple[float, float]:
    """Returns slope and intercept of a logistic regression, or without a positive slope 0 and the share of matches."""
    from sklearn.linear_model import LogisticRegression

    inputs = log_odds.double().numpy()[:, None]
    model = LogisticRegression().fit(inputs, matching.numpy())
    slope = float(model.coef_[0, 0])
    if slope <= 0:
        return 0.0, float(matching.double().mean().logit())
    return slope, float(model.intercept_[0])


def candidate_pairs(
    scores_of: ScoresOf,
    truth: GroundTruth,
    config: RetrievalConfig,
    *,
    extra_pairs: tuple[Int[Tensor, " m"], Int[Tensor, " m"]] | None = None,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> Candidates:
    """First stage of retrieval: the k most similar texts of each image and the k most similar images of each text.

    Args:
        extra_pairs: Images and texts of further pairs, which are no candidates of either.
    """
    all_images = torch.arange(len(truth.owners))
    num_texts = len(truth.text_image_index)
    k = config.candidates
    image_side = _Side()
    text_side = _Side()
    for rows, columns, _ in folds(truth, config.fold_size):
        images = all_images[rows]
        best_texts = torch.empty(len(images), 0, dtype=torch.int64)
        best_cosines = torch.empty(len(images), 0)
        for texts in columns.split(max(1, pairs_at_once // len(images))):
            scores = scores_of(rows, texts).float()
            check_not_nan(scores, "similarities")
            block_images = images.expand(len(texts), -1)
            best_images, cosines = _best(block_images, scores.T.contiguous(), k)
            text_side.add(best_images * num_texts + texts[:, None], cosines)
            block_texts = texts.expand(len(images), -1)
            seen_texts = torch.cat([best_texts, block_texts], dim=1)
            seen_cosines = torch.cat([best_cosines, scores], dim=1)
            best_texts, best_cosines = _best(seen_texts, seen_cosines, k)
        image_side.add(images[:, None] * num_texts + best_texts, best_cosines)

    # A pair's number is image · num_texts + text.
    numbers = [*image_side.numbers, *text_side.numbers]
    if extra_pairs is not None:
        extra_images, extra_texts = extra_pairs
        numbers.append(extra_images * num_texts + extra_texts)
    pairs = torch.cat(numbers).unique()
    cosine = torch.full(pairs.shape, torch.nan)
    return Candidates(
        image=pairs // num_texts,
        text=pairs % num_texts,
        image_side=image_side.write(pairs, cosine),
        text_side=text_side.write(pairs, cosine),
        cosine=cosine,
        truth=truth,
        config=config,
    )


class _Side:
    """Candidates of all images, or of all texts: the numbers of pairs and their cosines."""

    def __init__(self) -> None:
        self.numbers: list[PairIndex] = []
        self.cosines: list[PairScores] = []

    def add(self, numbers: Int[Tensor, "q k"], cosines: Float[Tensor, "q k"]) -> None:
        self.numbers.append(numbers.flatten())
        self.cosines.append(cosines.flatten())

    def write(self, sorted_numbers: PairIndex, cosine: PairScores) -> PairMask:
        """Writes the cosines of the pairs among all pairs, and returns which ones they are."""
        rows = torch.searchsorted(sorted_numbers, torch.cat(self.numbers))
        cosine[rows] = torch.cat(self.cosines)
        is_candidate = torch.zeros(len(sorted_numbers), dtype=torch.bool)
        is_candidate[rows] = True
        return is_candidate


def _best(
    items: Int[Tensor, "q m"], scores: Float[Tensor, "q m"], k: int
) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
    """Returns the k items of each row with the highest scores. Of equal ones the first are taken."""
    k = min(k, scores.shape[1])
    lowest = scores.topk(k, sorted=False).values.amin(dim=1, keepdim=True)
    is_higher = scores > lowest
    is_tied = scores == lowest
    num_tied = k - is_higher.sum(dim=1, keepdim=True)
    is_best = is_higher | (is_tied & (is_tied.cumsum(dim=1, dtype=torch.int32) <= num_tied))
    return items[is_best].view(-1, k), scores[is_best].view(-1, k)
