"""Where right answers stand in a ranking, and checks of what is ranked."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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


def candidate_places(
    queries: Int[Tensor, " n"], scores: Float[Tensor, " n"], own: Bool[Tensor, " n"], num_queries: int
) -> Places:
    """Places of the best own candidate of each query, from all pairs of a query and a candidate.

    What is no candidate stands behind all candidates and is never a hit.
    """
    best = scores.new_full((num_queries,), -torch.inf).scatter_reduce(0, queries[own], scores[own], "amax")[queries]
    better, tied = scores > best, scores == best
    return Places(*(torch.bincount(queries[some], minlength=num_queries) for some in (better, tied, tied & own)))


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
