"""The candidates of the first stage of retrieval: a list of pairs, where a table of all pairs would not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.evaluation.config import Protocol
from bridgetower.evaluation.metrics import (
    PAIRS_AT_ONCE,
    RECALL_KS,
    GroundTruth,
    Places,
    RetrievalRecalls,
    ScoresOf,
    check_ks,
    check_not_nan,
    folds,
    mean_recalls,
    recalls_of,
)

_LOW_BITS = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class CandidatePairs:
    """Pairs by image, then by text, each once: candidates of images or texts, and others.

    Attributes:
        image, text: Their rows.
        image_side, text_side: Whether the pair is a candidate of its image, and of its text.
        cosine: NaN where it is neither.
    """

    image: Int[Tensor, " n"]
    text: Int[Tensor, " n"]
    image_side: Bool[Tensor, " n"]
    text_side: Bool[Tensor, " n"]
    cosine: Float[Tensor, " n"]

    def sides(self, protocol: Protocol) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
        """Returns which pairs rank texts for images, and which images for texts.

        `standard` ranks each direction on its own candidates. `paper` ranks both on those of either side: the official
        code takes the maximum of both sides' scores, where −100 stands for a pair that a side dropped (`objectives.py`,
        `compute_irtr_itm_itc_recall`).
        """
        if protocol == "paper":
            return (self.image_side | self.text_side,) * 2
        return self.image_side, self.text_side

    def belong(self, truth: GroundTruth) -> Bool[Tensor, " n"]:
        """Returns which pairs belong together."""
        return truth.owners[self.image] == truth.text_image_index[self.text]

    def places(self, scores: Float[Tensor, " n"], truth: GroundTruth, protocol: Protocol) -> tuple[Places, Places]:
        """Returns where right answers stand in the ranking of candidates: texts for images, and images for texts."""
        own, (for_images, for_texts) = self.belong(truth), self.sides(protocol)

        def of(queries: Int[Tensor, " n"], side: Bool[Tensor, " n"], count: int) -> Places:
            """What is no candidate stands behind all candidates and is never a hit."""
            ranked, queries, right = scores[side], queries[side], own[side]
            check_not_nan(ranked, "candidate scores")
            worst = ranked.new_full((count,), -torch.inf)
            best = worst.scatter_reduce(0, queries[right], ranked[right], "amax")[queries]
            better, tied = ranked > best, ranked == best
            return Places(*(torch.bincount(queries[some], minlength=count) for some in (better, tied, tied & right)))

        return of(self.image, for_images, len(truth.owners)), of(self.text, for_texts, len(truth.text_image_index))

    def recalls(
        self,
        scores: Float[Tensor, " n"],
        truth: GroundTruth,
        protocol: Protocol,
        *,
        fold_size: int | None = None,
        ks: Sequence[int] = RECALL_KS,
    ) -> RetrievalRecalls:
        """Returns the recalls of the ranking of candidates; of folds, in which these were chosen, the mean."""
        images, texts = self.places(scores, truth, protocol)
        found = []
        for rows, columns, _ in folds(truth, fold_size):
            fold = Places(*(field[rows] for field in images)), Places(*(field[columns] for field in texts))
            found.append(recalls_of(*fold, ks))
        return mean_recalls(found)


def candidate_pairs(
    scores_of: ScoresOf,
    truth: GroundTruth,
    k: int,
    *,
    fold_size: int | None = None,
    others: tuple[Int[Tensor, " m"], Int[Tensor, " m"]] | None = None,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> CandidatePairs:
    """First stage of retrieval: the k most similar texts of each image and the k most similar images of each text.

    Of equally similar ones it takes those of the lower rows.
    """
    check_ks([k])
    every_image, num_texts = torch.arange(len(truth.owners)), len(truth.text_image_index)
    of_images, of_texts = [], []
    for rows, columns, _ in folds(truth, fold_size):
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
    return _listed(of_images, of_texts, num_texts, others)


_Part = tuple[Int[Tensor, " m"], Float[Tensor, " m"]]
"""Numbers of pairs, image · texts + text, and their cosines."""


def _listed(
    of_images: Sequence[_Part], of_texts: Sequence[_Part], num_texts: int, others: tuple[Tensor, Tensor] | None
) -> CandidatePairs:
    sides = [[torch.cat(parts) for parts in zip(*side, strict=True)] for side in (of_images, of_texts)]
    further = [] if others is None else [others[0] * num_texts + others[1]]
    numbers = torch.cat([sides[0][0], sides[1][0], *further]).unique()
    cosine = torch.full(numbers.shape, torch.nan)
    flags = torch.zeros(2, len(numbers), dtype=torch.bool)
    for flag, (found, cosines) in zip(flags, sides, strict=True):
        places = torch.searchsorted(numbers, found)
        cosine[places], flag[places] = cosines, True
    image_side, text_side = flags
    return CandidatePairs(
        image=numbers // num_texts,
        text=numbers % num_texts,
        image_side=image_side,
        text_side=text_side,
        cosine=cosine,
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
