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
"""Pairs that are compared at once. The sum that counts them takes eight bytes for each."""

RECALL_KS = (1, 5, 10)
"""The ranks that the field reports. RSUM is the sum of both directions at these three."""

ITC_WEIGHTS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, ITC_ALONE)
"""The weights that a fit tries."""

LEAST_IMAGES = 8
"""Images with different captions that calibration and gain need: four in each half."""

BINS = 10
"""Number of bins of probabilities, of equal width."""

_Z = 1.96  # of a 95 % interval

PairIndex = Int[Tensor, " n"]
"""The image or the text of each pair."""

PairScores = Float[Tensor, " n"]
PairMask = Bool[Tensor, " n"]
Ranks = Int[Tensor, " q"]
"""A number for each query."""

ScoresOf = Callable[[slice, PairIndex], Float[Tensor, "i b"]]
"""Gives the scores of the images and the texts of these rows, the same at every call. Higher is more alike."""


class GroundTruth(NamedTuple):
    """Which images and texts belong together."""

    text_image_index: Int[Tensor, " t"]  # row of the image that each text belongs to
    # of the image whose texts belong to each image: itself, or one with the same captions
    owners: Int[Tensor, " i"]

    @property
    def num_images(self) -> int:
        return len(self.owners)

    @property
    def num_texts(self) -> int:
        return len(self.text_image_index)

    def is_match(self, image: PairIndex, text: PairIndex) -> PairMask:
        return self.owners[image] == self.text_image_index[text]


class BestRanks(NamedTuple):
    """Where the best right item of each query stands."""

    higher: Ranks  # items that score more
    tied: Ranks  # items that score the same, the best right item included
    right: Ranks  # right items among the tied; 0: the query can have no hit

    @classmethod
    def zeros(cls, num_queries: int) -> BestRanks:
        counts = torch.zeros(3, num_queries, dtype=torch.int64)
        return cls(*counts)

    @classmethod
    def all_tied(cls, right: Ranks, num_items: int) -> BestRanks:
        """Returns the ranks where all items have the same score."""
        return cls(torch.zeros_like(right), torch.full_like(right, num_items), right)

    def rows(self, queries: slice | PairIndex) -> BestRanks:
        """Returns the ranks of some queries."""
        return BestRanks(self.higher[queries], self.tied[queries], self.right[queries])


class QueryRanks(NamedTuple):
    """Ranks in both directions."""

    images: BestRanks  # of images that look for texts
    texts: BestRanks  # of texts that look for images


def hit_chances(ranks: BestRanks, k: int) -> Float[Tensor, " q"]:
    """Probability of a hit at k of each query when tied items are ordered at random.

    The tied items fill the `room` ranks that the higher ones leave. Drawn without replacement, none of them is a right
    one with probability C(tied − right, room)/C(tied, room), here as a product, which is exact for 0 and 1.
    """
    free_ranks = (k - ranks.higher).clamp(min=0)
    room = free_ranks.minimum(ranks.tied)
    miss = torch.ones_like(room, dtype=torch.float64)
    for num_drawn in range(int(room.max())):
        tied_left = ranks.tied - num_drawn
        wrong_left = (tied_left - ranks.right).clamp(min=0)
        next_miss = miss * wrong_left / tied_left.clamp(min=1)
        miss = torch.where(num_drawn < room, next_miss, miss)
    return 1.0 - miss


class Fold(NamedTuple):
    """Images and texts that are ranked together."""

    images: slice  # their rows
    texts: PairIndex  # their rows
    truth: GroundTruth  # in rows of the fold


def folds(truth: GroundTruth, fold_size: int | None) -> Iterator[Fold]:
    """Yields the folds of some images each, or one of all."""
    size = fold_size or truth.num_images
    fold_of_text = truth.text_image_index // size
    for number, start in enumerate(range(0, truth.num_images, size)):
        images = slice(start, start + size)
        texts = (fold_of_text == number).nonzero().squeeze(1)
        image_index = truth.text_image_index[texts] - start
        owners = truth.owners[images] - start
        yield Fold(images, texts, GroundTruth(image_index, owners))


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

    def metrics(self, stage: str) -> dict[str, float]:
        """Returns `STAGE_image_to_text_r1`, `STAGE_text_to_image_r1`, …, `STAGE_rsum`."""
        metrics: dict[str, float] = {}
        for direction in ("image_to_text", "text_to_image"):
            for k, recall in getattr(self, direction).items():
                metrics[f"{stage}_{direction}_r{k}"] = recall
        metrics[f"{stage}_rsum"] = self.rsum
        return metrics


def recalls_of(
    ranks_of_folds: Sequence[QueryRanks], ks: Sequence[int] = RECALL_KS
) -> RetrievalRecalls:
    """Recall at k of images that look for texts and of texts that look for images: the mean over equal folds.

    Without ties this is the share of hits in `torch.topk`. Tied scores count by their chance of a hit when they are
    ordered at random: constant scores give exactly `chance_recalls`, and the order of the rows never matters.
    """
    recalls = []
    for ranks_by_fold in zip(*ranks_of_folds, strict=True):
        recall_at: dict[int, float] = {}
        for k in ks:
            fold_recalls = [hit_chances(ranks, k).mean().item() for ranks in ranks_by_fold]
            recall_at[k] = fmean(fold_recalls)
        recalls.append(recall_at)
    return RetrievalRecalls(*recalls)


def streamed_recalls(
    scores_of: ScoresOf,
    truth: GroundTruth,
    *,
    fold_size: int | None = None,
    ks: Sequence[int] = RECALL_KS,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> RetrievalRecalls:
    """Recalls of the ranking of all items, or of the items of a fold. Only a block of the scores is in memory."""
    ranks_of_folds = []
    for fold in folds(truth, fold_size):
        num_columns = max(1, pairs_at_once // fold.truth.num_images)
        ranks_of_folds.append(_best_ranks(scores_of, fold, num_columns))
    return recalls_of(ranks_of_folds, ks)


class _Block(NamedTuple):
    """Scores of the images of a fold with some of its texts, and the pairs among them that match."""

    columns: slice  # texts of the fold
    scores: Float[Tensor, "i b"]
    image: PairIndex  # of each match
    text: PairIndex
    match_scores: PairScores


def _score_blocks(scores_of: ScoresOf, fold: Fold, num_columns: int) -> Iterator[_Block]:
    owner_of_row = fold.truth.owners[:, None]
    owner_of_text = fold.truth.text_image_index
    for start in range(0, len(fold.texts), num_columns):
        columns = slice(start, start + num_columns)
        scores = scores_of(fold.images, fold.texts[columns]).float()
        is_match = owner_of_row == owner_of_text[columns]
        image, column = is_match.nonzero(as_tuple=True)
        yield _Block(columns, scores, image, column + start, scores[image, column])


def _best_ranks(scores_of: ScoresOf, fold: Fold, num_columns: int) -> QueryRanks:
    """Returns the ranks of the best right text of each image, and of the best right image of each text."""
    num_images = fold.truth.num_images
    num_texts = fold.truth.num_texts

    # All scores are read once for the best right ones.
    best_of_image = torch.full((num_images,), -torch.inf)
    best_of_text = torch.full((num_texts,), -torch.inf)
    for block in _score_blocks(scores_of, fold, num_columns):
        check_not_nan(block.scores, "scores")
        best_of_image.scatter_reduce_(0, block.image, block.match_scores, "amax")
        best_of_text.scatter_reduce_(0, block.text, block.match_scores, "amax")

    # They are read again to count the scores that are higher or the same.
    image_ranks = BestRanks.zeros(num_images)
    text_ranks = BestRanks.zeros(num_texts)
    for block in _score_blocks(scores_of, fold, num_columns):
        best_of_row = best_of_image[:, None]
        image_ranks.higher.add_((block.scores > best_of_row).sum(dim=1))
        image_ranks.tied.add_((block.scores == best_of_row).sum(dim=1))
        tied_images = block.image[block.match_scores == best_of_image[block.image]]
        image_ranks.right.add_(torch.bincount(tied_images, minlength=num_images))

        best_of_column = best_of_text[block.columns]
        text_ranks.higher[block.columns] = (block.scores > best_of_column).sum(dim=0)
        text_ranks.tied[block.columns] = (block.scores == best_of_column).sum(dim=0)
        tied_texts = block.text[block.match_scores == best_of_text[block.text]]
        text_ranks.right.add_(torch.bincount(tied_texts, minlength=num_texts))
    return QueryRanks(image_ranks, text_ranks)


def chance_recalls(
    truth: GroundTruth, *, fold_size: int | None = None, ks: Sequence[int] = RECALL_KS
) -> RetrievalRecalls:
    """Expected recalls of a random ranking.

    With M items of which n are right, it is the mean of 1 − C(M−n, k)/C(M, k).
    """
    ranks_of_folds = []
    for _, _, fold in folds(truth, fold_size):
        texts_by_owner = fold.text_image_index.bincount(minlength=fold.num_images)
        images_by_owner = fold.owners.bincount(minlength=fold.num_images)
        image_ranks = BestRanks.all_tied(texts_by_owner[fold.owners], fold.num_texts)
        text_ranks = BestRanks.all_tied(images_by_owner[fold.text_image_index], fold.num_images)
        ranks_of_folds.append(QueryRanks(image_ranks, text_ranks))
    return recalls_of(ranks_of_folds, ks)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Pairs by image, then by text, each once: the candidates of images and of texts, and further pairs."""

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

        `standard` ranks each direction on its own candidates. `paper` ranks both on the candidates of either side: the
        official code takes the maximum of both sides' scores, where −100 stands for a pair that a side dropped
        (`objectives.py`, `compute_irtr_itm_itc_recall`).
        """
        if self.config.protocol == "paper":
            either_side = self.image_side | self.text_side
            return either_side, either_side
        return self.image_side, self.text_side

    @cached_property
    def is_match(self) -> PairMask:
        return self.truth.is_match(self.image, self.text)

    def scores(self, itc_weight: float) -> PairScores:
        if itc_weight == 0:  # 0 times a cosine that is NaN would be NaN
            return self.itm
        return torch.add(self.itm, self.cosine, alpha=itc_weight)

    def best_ranks(self, itc_weight: float = 0.0) -> QueryRanks:
        """Returns the ranks of right answers among candidates."""
        image_side, text_side = self.sides
        scores = self.scores(itc_weight)
        image_ranks = self._ranks(self.image, self.truth.num_images, image_side, scores)
        text_ranks = self._ranks(self.text, self.truth.num_texts, text_side, scores)
        return QueryRanks(image_ranks, text_ranks)

    def _ranks(
        self, query_of_pair: PairIndex, num_queries: int, side: PairMask, scores: PairScores
    ) -> BestRanks:
        """Ranks the candidates of queries. Other items stand behind all of them and are never a hit."""
        scores = scores[side]
        check_not_nan(scores, "candidate scores")
        query = query_of_pair[side]
        is_match = self.is_match[side]
        best_of_query = scores.new_full((num_queries,), -torch.inf)
        best_of_query.scatter_reduce_(0, query[is_match], scores[is_match], "amax")
        best = best_of_query[query]
        is_tied = scores == best
        return BestRanks(
            higher=query[scores > best].bincount(minlength=num_queries),
            tied=query[is_tied].bincount(minlength=num_queries),
            right=query[is_tied & is_match].bincount(minlength=num_queries),
        )

    def recalls(self, itc_weight: float = 0.0, ks: Sequence[int] = RECALL_KS) -> RetrievalRecalls:
        """Returns the recalls of the ranking of candidates, or their mean over the folds of the config."""
        ranks = self.best_ranks(itc_weight)
        ranks_of_folds = []
        for fold in folds(self.truth, self.config.fold_size):
            image_ranks = ranks.images.rows(fold.images)
            text_ranks = ranks.texts.rows(fold.texts)
            ranks_of_folds.append(QueryRanks(image_ranks, text_ranks))
        return recalls_of(ranks_of_folds, ks)

    def calibration_error(self, reranking: Reranking) -> float:
        """Returns the expected calibration error of the probabilities of a match of the candidates of texts."""
        probabilities = reranking.match(self.itm[self.text_side])
        is_match = self.is_match[self.text_side]
        return expected_calibration_error(reliability(probabilities, is_match.float()))

    def fit_reranking(self) -> Reranking:
        """Returns the weight of ITC with the best mean recall, a calibration, and the gain over ITC alone.

        Of several weights that are equally good, the middle one is taken.
        """
        hits_by_weight = {weight: self._hits(weight) for weight in ITC_WEIGHTS}
        everything = slice(None)
        itc_weight = _best_weight(hits_by_weight, everything, everything)

        # The texts of an image, or of images with the same captions, are a group. Every other group is in the odd half.
        different_images, group = self.truth.owners.unique(return_inverse=True)
        num_groups = len(different_images)
        if num_groups < LEAST_IMAGES:
            return Reranking(itc_weight=itc_weight)
        group_of_text = group[self.truth.text_image_index]
        is_odd_image = group % 2 == 1
        is_odd_text = group_of_text % 2 == 1
        side = self.text_side
        is_odd_pair = is_odd_text[self.text[side]]
        calibration = calibrate(self.itm[side], self.is_match[side], is_odd_pair)

        # The gain of each half, with the weight that is best on the other half.
        gains = torch.empty(self.truth.num_texts, dtype=torch.float64)
        for half in (True, False):
            other_weight = _best_weight(hits_by_weight, is_odd_image != half, is_odd_text != half)
            gains_of_all = hits_by_weight[other_weight].texts - hits_by_weight[ITC_ALONE].texts
            texts = is_odd_text == half
            gains[texts] = gains_of_all[texts]

        # The interval of the mean gain, in which the texts of a group count as one draw.
        mean = float(gains.mean())
        sums = torch.zeros(num_groups, dtype=torch.float64)
        sums.index_add_(0, group_of_text, gains - mean)
        variance = sums.square().sum() * num_groups / (num_groups - 1)
        half_width = _Z * float(variance.sqrt() / len(gains))
        gain = Gain(
            difference=mean, low=mean - half_width, high=mean + half_width, texts=len(gains)
        )
        return Reranking(itc_weight=itc_weight, calibration=calibration, gain=gain)

    def _hits(self, itc_weight: float) -> _Hits:
        hits = []
        for ranks in self.best_ranks(itc_weight):
            chances = [hit_chances(ranks, k) for k in RECALL_KS]
            hits.append(torch.stack(chances).mean(dim=0))
        return _Hits(*hits)


class _Hits(NamedTuple):
    """Mean recall over `RECALL_KS` of each image and of each text."""

    images: Float[Tensor, " i"]
    texts: Float[Tensor, " t"]


def _best_weight(
    hits_by_weight: Mapping[float, _Hits], images: slice | PairMask, texts: slice | PairMask
) -> float:
    """Returns the weight with the best recall of some queries, of equally good ones the middle one."""
    recalls = {}
    for weight, hits in hits_by_weight.items():
        recalls[weight] = float(hits.images[images].mean() + hits.texts[texts].mean())
    highest = max(recalls.values())
    best_weights = [weight for weight in recalls if recalls[weight] == highest]
    return best_weights[len(best_weights) // 2]


class Bin(NamedTuple):
    """Predictions of similar probability."""

    number: int  # of the bin, from 0
    examples: int
    probability: float  # mean
    right: float  # share


def reliability(probabilities: PairScores, right: PairScores) -> list[Bin]:
    """Returns the bins that have examples."""
    bin_of_example = (probabilities.double() * BINS).long().clamp(max=BINS - 1)
    bins = []
    for number in bin_of_example.unique().tolist():
        is_in_bin = bin_of_example == number
        mean = probabilities[is_in_bin].double().mean().item()
        share = right[is_in_bin].double().mean().item()
        bins.append(Bin(number, int(is_in_bin.sum()), mean, share))
    return bins


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Returns the mean difference between probability and share of right predictions, weighed by examples."""
    error = 0.0
    num_examples = 0
    for bin_ in bins:
        difference = abs(bin_.probability - bin_.right)
        error += bin_.examples * difference
        num_examples += bin_.examples
    return error / num_examples


def calibrate(log_odds: PairScores, matching: PairMask, halves: PairMask) -> Calibration | None:
    """Fits Platt's calibration. Its error is measured on each half with a fit on the other half.

    Args:
        log_odds: Of a match, of each pair.
        matching: Whether the pair matches.
        halves: Which half the pair is in.

    Returns:
        None if a half has only pairs that match, or only pairs that do not.
    """
    for half in (halves, ~halves):
        if len(matching[half].unique()) < 2:
            return None
    calibrated = torch.empty_like(log_odds)
    for half in (halves, ~halves):
        other_half = ~half
        slope, intercept = _platt(log_odds[other_half], matching[other_half])
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
    """Returns slope and intercept of a logistic regression.

    Without a positive slope they are 0 and the log-odds of the share of matches.
    """
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
    extra_pairs: tuple[PairIndex, PairIndex] | None = None,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> Candidates:
    """First stage of retrieval: the k most similar texts of each image and the k most similar images of each text.

    Args:
        extra_pairs: Images and texts of further pairs, which are no candidates.
    """
    all_images = torch.arange(truth.num_images)
    k = config.candidates
    image_side = _Side(truth.num_texts)
    text_side = _Side(truth.num_texts)
    for fold in folds(truth, config.fold_size):
        images = all_images[fold.images]
        num_images = len(images)
        best_texts = torch.empty(num_images, 0, dtype=torch.int64)
        best_cosines = torch.empty(num_images, 0)
        for texts in fold.texts.split(max(1, pairs_at_once // num_images)):
            cosines = scores_of(fold.images, texts).float()
            check_not_nan(cosines, "similarities")
            # The best images of these texts.
            images_of_texts = images.expand(len(texts), -1)
            best_images, image_cosines = _best(images_of_texts, cosines.T.contiguous(), k)
            text_side.add(best_images, texts[:, None], image_cosines)
            # The best texts up to here.
            texts_of_images = torch.cat([best_texts, texts.expand(num_images, -1)], dim=1)
            text_cosines = torch.cat([best_cosines, cosines], dim=1)
            best_texts, best_cosines = _best(texts_of_images, text_cosines, k)
        image_side.add(images[:, None], best_texts, best_cosines)

    numbers = image_side.numbers + text_side.numbers
    if extra_pairs is not None:
        extra_images, extra_texts = extra_pairs
        numbers.append(extra_images * truth.num_texts + extra_texts)
    pairs = torch.cat(numbers).unique()
    cosine = torch.full(pairs.shape, torch.nan)
    return Candidates(
        image=pairs // truth.num_texts,
        text=pairs % truth.num_texts,
        image_side=image_side.write(pairs, cosine),
        text_side=text_side.write(pairs, cosine),
        cosine=cosine,
        truth=truth,
        config=config,
    )


class _Side:
    """Candidates of all images, or of all texts. The number of a pair is image · num_texts + text."""

    def __init__(self, num_texts: int) -> None:
        self.num_texts = num_texts
        self.numbers: list[PairIndex] = []
        self.cosines: list[PairScores] = []

    def add(self, images: Tensor, texts: Tensor, cosines: Tensor) -> None:
        numbers = images * self.num_texts + texts
        self.numbers.append(numbers.flatten())
        self.cosines.append(cosines.flatten())

    def write(self, all_numbers: PairIndex, cosine: PairScores) -> PairMask:
        """Writes the cosines of the candidates beside the sorted numbers of all pairs. Returns which are candidates."""
        rows = torch.searchsorted(all_numbers, torch.cat(self.numbers))
        cosine[rows] = torch.cat(self.cosines)
        is_candidate = torch.zeros(len(all_numbers), dtype=torch.bool)
        is_candidate[rows] = True
        return is_candidate


def _best(
    items: Int[Tensor, "q m"], scores: Float[Tensor, "q m"], k: int
) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
    """Returns the k items of each row with the highest scores, and their scores. Of equal ones the first are taken."""
    k = min(k, scores.shape[1])
    lowest = scores.topk(k, sorted=False).values.amin(dim=1, keepdim=True)
    is_higher = scores > lowest
    is_tied = scores == lowest
    num_tied = k - is_higher.sum(dim=1, keepdim=True)
    tie_number = is_tied.cumsum(dim=1, dtype=torch.int32)
    is_best = is_higher | (is_tied & (tie_number <= num_tied))
    return items[is_best].view(-1, k), scores[is_best].view(-1, k)
