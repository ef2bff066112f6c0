"""Recalls of image-text retrieval, from scores that come in blocks or from the places of right answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

PAIRS_AT_ONCE = 2**22
"""Pairs that are compared at once: to count a row's, `sum` makes eight bytes of each."""


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


def best_places(scores: Float[Tensor, "q m"], queries: Int[Tensor, " p"], items: Int[Tensor, " p"]) -> Places:
    """Places of the best own item of each query, from all pairs of a query and an own item."""
    own = scores[queries, items]
    best = own.new_full((len(scores),), -torch.inf).scatter_reduce(0, queries, own, "amax")
    size = max(1, PAIRS_AT_ONCE // scores.shape[1])
    better, tied = [], []
    for rows, least in zip(scores.split(size), best[:, None].split(size), strict=True):
        better.append((rows > least).sum(dim=1))
        tied.append((rows == least).sum(dim=1))
    num_best = torch.bincount(queries[own == best[queries]], minlength=len(scores))
    return Places(better=torch.cat(better), tied=torch.cat(tied), own=num_best)


def tied_places(queries: Int[Tensor, " p"], num_queries: int, num_items: int) -> Places:
    """Places where all items of a query score the same."""
    own = torch.bincount(queries, minlength=num_queries)
    return Places(better=torch.zeros_like(own), tied=torch.full_like(own, num_items), own=own)


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
    num_images = len(owners)
    if len(index) == 0:
        raise ValueError("there are no texts; expected at least one")
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= num_images:
        raise ValueError(f"text_image_index goes from {low} to {high}; expected rows of the {num_images} images")
    size = fold_size or num_images
    for start in range(0, num_images, size):
        rows, texts = slice(start, start + size), (index // size == start // size).nonzero().squeeze(1)
        yield rows, texts, GroundTruth(index[texts] - start, owners[rows] - start)


def check_not_nan(values: Tensor, name: str) -> None:
    """Raises ValueError, with their number, if values are NaN."""
    count = int(values.isnan().count_nonzero())
    if count:
        raise ValueError(f"{count} of {values.numel()} {name} are NaN; expected numbers, check the model's outputs")


def own_pairs(truth: GroundTruth) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Returns image and text of all pairs that belong together, by image, after checks."""
    index, owners = truth
    num_images = len(owners)
    counts = torch.bincount(index, minlength=num_images)
    images = torch.arange(num_images).repeat_interleave(counts[owners])
    first = (counts.cumsum(0) - counts)[owners] - (counts[owners].cumsum(0) - counts[owners])
    texts = index.argsort(stable=True)[torch.arange(len(images)) + first[images]]
    without = int((counts[owners] == 0).sum())
    if without:
        raise ValueError(f"{without} of {num_images} images have no text; expected at least one each, leave them out")
    return images, texts


def check_ks(ks: Sequence[int]) -> None:
    """Raises ValueError unless there are ranks, from 1 up."""
    if not ks or min(ks) < 1:
        raise ValueError(f"k is {list(ks)}; expected ranks from 1 up")


RECALL_KS = (1, 5, 10)
"""The ranks that the field reports; RSUM is the sum of both directions at these three."""

ScoresOf = Callable[[slice, Int[Tensor, " b"]], Float[Tensor, "i b"]]
"""Gives the scores of the images and the texts of these rows, the same at every call; higher is more alike."""


@dataclass(frozen=True, kw_only=True)
class RetrievalRecalls:
    """Recall at k in both directions, as fractions.

    Attributes:
        image_to_text: k → share of images with at least one own caption among their top k texts.
        text_to_image: k → share of texts with their own image among their top k images.
        num_images: Images that were queries, over all folds.
        num_texts: Texts that were queries, over all folds.
        num_folds: Equal folds that the recalls are a mean of; the candidates of a query are those of its fold.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    num_images: int
    num_texts: int
    num_folds: int = 1

    def __post_init__(self) -> None:
        if self.image_to_text.keys() != self.text_to_image.keys():
            given = f"{list(self.image_to_text)} and {list(self.text_to_image)}"
            raise ValueError(f"the two directions have recalls at {given}; expected the same ranks in both")
        for k, recall in (*self.image_to_text.items(), *self.text_to_image.items()):
            if not 0.0 <= recall <= 1.0:
                raise ValueError(f"recall at {k} is {recall}; expected a fraction between 0 and 1")

    @property
    def rsum(self) -> float:
        """Sum of all recalls; at ranks 1, 5 and 10 the published RSUM in percent is 100 times this (6: perfect)."""
        return sum(self.image_to_text.values()) + sum(self.text_to_image.values())

    def to_dict(self) -> dict[str, float | int]:
        """Flat, JSON-ready form: `image_to_text_r1`, `text_to_image_r1`, …, `rsum` and the counts."""
        recalls = {f"image_to_text_r{k}": recall for k, recall in self.image_to_text.items()}
        recalls |= {f"text_to_image_r{k}": recall for k, recall in self.text_to_image.items()}
        counts = {"num_images": self.num_images, "num_texts": self.num_texts, "num_folds": self.num_folds}
        return recalls | {"rsum": self.rsum} | counts


def recalls_of(images: Places, texts: Places, ks: Sequence[int] = RECALL_KS) -> RetrievalRecalls:
    """Recall at k of images that look for texts and of texts that look for images.

    Without ties this is the share of hits in `torch.topk`. Tied scores count by their chance of a hit when the tied
    items are ordered at random, so constant scores give exactly `chance_recalls` and the order of the rows never
    matters.
    """
    check_ks(ks)
    return RetrievalRecalls(
        image_to_text={k: hit_chances(images, k).mean().item() for k in ks},
        text_to_image={k: hit_chances(texts, k).mean().item() for k in ks},
        num_images=len(images.own),
        num_texts=len(texts.own),
    )


def mean_recalls(found: Sequence[RetrievalRecalls]) -> RetrievalRecalls:
    """Mean of the recalls of equal folds, each with its own images and texts only (COCO 1k: five folds)."""
    return RetrievalRecalls(
        image_to_text={k: sum(fold.image_to_text[k] for fold in found) / len(found) for k in found[0].image_to_text},
        text_to_image={k: sum(fold.text_to_image[k] for fold in found) / len(found) for k in found[0].text_to_image},
        num_images=sum(fold.num_images for fold in found),
        num_texts=sum(fold.num_texts for fold in found),
        num_folds=len(found),
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
        found.append(recalls_of(*_streamed_places(scores_of, rows, blocks, own), ks))
    return mean_recalls(found)


def _streamed_places(
    scores_of: ScoresOf, rows: slice, blocks: Sequence[Int[Tensor, " b"]], truth: GroundTruth
) -> tuple[Places, Places]:
    images, texts = own_pairs(truth)
    order = texts.argsort(stable=True)
    images, texts = images[order], texts[order]
    starts = torch.tensor([0, *map(len, blocks)]).cumsum(0)
    bounds = [slice(*ends) for ends in pairwise(torch.searchsorted(texts, starts).tolist())]
    parts = list(zip(blocks, starts.tolist(), bounds, strict=False))
    own, of_texts = torch.empty(len(images)), []
    for block, start, pairs in parts:
        scores = scores_of(rows, block)
        check_not_nan(scores, "scores")
        own[pairs] = scores[images[pairs], texts[pairs] - start].float()
        of_texts.append(best_places(scores.T, texts[pairs] - start, images[pairs]))
    num_images = len(truth.owners)
    best = own.new_full((num_images,), -torch.inf).scatter_reduce(0, images, own, "amax")
    better, tied = torch.zeros(num_images, dtype=torch.int64), torch.zeros(num_images, dtype=torch.int64)
    for block in blocks:
        scores = scores_of(rows, block)
        better += (scores > best[:, None]).sum(dim=1)
        tied += (scores == best[:, None]).sum(dim=1)
    num_best = torch.bincount(images[own == best[images]], minlength=num_images)
    return Places(better=better, tied=tied, own=num_best), Places(*map(torch.cat, zip(*of_texts, strict=True)))


def chance_recalls(
    truth: GroundTruth, *, fold_size: int | None = None, ks: Sequence[int] = RECALL_KS
) -> RetrievalRecalls:
    """Expected recalls of a uniformly random ranking.

    With M items of which n are right: 1 − C(M−n, k)/C(M, k), averaged over queries. A rank beyond the number of items
    is a certain hit.
    """
    found = []
    for _, _, (index, owners) in folds(truth, fold_size):
        images, texts = own_pairs(GroundTruth(index, owners))
        counts = len(owners), len(index)
        found.append(recalls_of(tied_places(images, *counts), tied_places(texts, *counts[::-1]), ks))
    return mean_recalls(found)
