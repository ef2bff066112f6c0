"""Recalls of image-text retrieval, from scores that come in blocks or from the places of right answers."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

PAIRS_AT_ONCE = 2**22
"""Pairs that are compared at once: to count a row's, `sum` makes eight bytes of each."""

RECALL_KS = (1, 5, 10)
"""The ranks that the field reports; RSUM is the sum of both directions at these three."""

ScoresOf = Callable[[slice, Int[Tensor, " b"]], Float[Tensor, "i b"]]
"""Gives the scores of the images and the texts of these rows, the same at every call; higher is more alike."""


class GroundTruth(NamedTuple):
    """Which images and texts belong together.

    Attributes:
        text_image_index: Row of the image that each text belongs to.
        owners: Row of the image whose texts belong to each image: itself, or one that has the same captions.
    """

    text_image_index: Int[Tensor, " t"]
    owners: Int[Tensor, " i"]


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
    """Yields the rows of the images of each fold and of their texts, and which of these belong together.

    Without `fold_size` there is one fold.
    """
    index, owners = truth
    size = fold_size or len(owners)
    for start in range(0, len(owners), size):
        rows, texts = slice(start, start + size), (index // size == start // size).nonzero().squeeze(1)
        yield rows, texts, GroundTruth(index[texts] - start, owners[rows] - start)


def check_not_nan(values: Tensor, name: str) -> None:
    count = int(values.isnan().count_nonzero())
    if count:
        raise ValueError(f"{count} of {values.numel()} {name} are NaN; expected numbers, check the model's outputs")


def own_pairs(truth: GroundTruth) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Returns image and text of all pairs that belong together, by text."""
    index, owners = truth
    images, starts = owners.argsort(stable=True), torch.bincount(owners, minlength=len(owners)).cumsum(0)
    counts = torch.bincount(owners, minlength=len(owners))[index]
    texts = torch.arange(len(index)).repeat_interleave(counts)
    place = torch.arange(len(texts)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return images[(starts[index] - counts).repeat_interleave(counts) + place], texts


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

    Without ties this is the share of hits in `torch.topk`. Tied scores count by their chance of a hit when the tied
    items are ordered at random, so constant scores give exactly `chance_recalls` and the order of the rows never
    matters. Of a fold only its own images and texts count (COCO 1k: five folds).
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
    for rows, columns, own in folds(truth, fold_size):
        blocks = columns.split(max(1, pairs_at_once // len(own.owners)))
        found.append(_streamed_places(scores_of, rows, blocks, own))
    return recalls_of(found, ks)


def _streamed_places(
    scores_of: ScoresOf, rows: slice, blocks: Sequence[Int[Tensor, " b"]], truth: GroundTruth
) -> tuple[Places, Places]:
    """Reads the scores of own pairs first, and then counts which others are as high."""
    images, texts = own_pairs(truth)
    counts = len(truth.owners), len(truth.text_image_index)
    ends = torch.tensor([0, *map(len, blocks)]).cumsum(0).tolist()
    own = torch.empty(len(images))
    for block, start, end in zip(blocks, ends, ends[1:], strict=False):
        scores = scores_of(rows, block).float()
        check_not_nan(scores, "scores")
        pairs = slice(*torch.searchsorted(texts, torch.tensor([start, end])).tolist())
        own[pairs] = scores[images[pairs], texts[pairs] - start]
    best = [_best(own, queries, count) for queries, count in zip((images, texts), counts, strict=True)]
    better, tied = ([torch.zeros(count, dtype=torch.int64) for count in counts] for _ in range(2))
    for block, start, end in zip(blocks, ends, ends[1:], strict=False):
        scores = scores_of(rows, block).float()
        for_texts = best[1][start:end]
        better[0] += (scores > best[0][:, None]).sum(dim=1)
        tied[0] += (scores == best[0][:, None]).sum(dim=1)
        better[1][start:end] = (scores > for_texts).sum(dim=0)
        tied[1][start:end] = (scores == for_texts).sum(dim=0)
    num_best = [
        torch.bincount(queries[own == least[queries]], minlength=len(least))
        for queries, least in zip((images, texts), best, strict=True)
    ]
    return Places(better[0], tied[0], num_best[0]), Places(better[1], tied[1], num_best[1])


def _best(scores: Float[Tensor, " p"], queries: Int[Tensor, " p"], count: int) -> Float[Tensor, " q"]:
    return scores.new_full((count,), -torch.inf).scatter_reduce(0, queries, scores, "amax")


def chance_recalls(
    truth: GroundTruth, *, fold_size: int | None = None, ks: Sequence[int] = RECALL_KS
) -> RetrievalRecalls:
    """Expected recalls of a uniformly random ranking.

    With M items of which n are right: 1 − C(M−n, k)/C(M, k), averaged over queries. A rank beyond the number of items
    is a certain hit.
    """
    found = []
    for _, _, fold in folds(truth, fold_size):
        counts = len(fold.owners), len(fold.text_image_index)
        own = [torch.bincount(queries, minlength=count) for queries, count in zip(own_pairs(fold), counts, strict=True)]
        images, texts = (
            Places(torch.zeros_like(each), torch.full_like(each, count), each)
            for each, count in zip(own, counts[::-1], strict=True)
        )
        found.append((images, texts))
    return recalls_of(found, ks)
