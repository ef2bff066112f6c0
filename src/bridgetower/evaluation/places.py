"""Where right answers stand in a ranking, and checks of what is ranked."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NON_CANDIDATE_SCORE = -100.0
"""What the official two-stage evaluation gives a pair that the first stage dropped; such a pair is never a hit."""

PAIRS_AT_ONCE = 2**22
"""Pairs that are compared at once: to count a row's, `sum` makes eight bytes of each."""


class Places(NamedTuple):
    """Where the best own item of each query stands; all fields are [queries]."""

    better: Int[Tensor, " q"]  # items that score strictly more
    tied: Int[Tensor, " q"]  # items that score the same, itself included
    own: Int[Tensor, " q"]  # own items among the tied
    can_hit: Bool[Tensor, " q"]


def best_places(scores: Float[Tensor, "q m"], queries: Int[Tensor, " p"], items: Int[Tensor, " p"]) -> Places:
    """Places of the best own item of each query, from all pairs of a query and an own item."""
    own = scores[queries, items]
    best = own.new_full((len(scores),), -torch.inf).scatter_reduce(0, queries, own, "amax")
    num_best = torch.bincount(queries[own == best[queries]], minlength=len(scores))
    return _places(scores, best, num_best)


def tied_places(queries: Int[Tensor, " p"], num_queries: int, num_items: int) -> Places:
    """Places where all items of a query score the same."""
    own = torch.bincount(queries, minlength=num_queries)
    return Places(better=torch.zeros_like(own), tied=torch.full_like(own, num_items), own=own, can_hit=own > 0)


def _places(rows: Float[Tensor, "q m"], best_own: Float[Tensor, " q"], own: Int[Tensor, " q"]) -> Places:
    size = max(1, PAIRS_AT_ONCE // rows.shape[1])
    better, tied = [], []
    for some, best in zip(rows.split(size), best_own[:, None].split(size), strict=True):
        better.append((some > best).sum(dim=1))
        tied.append((some == best).sum(dim=1))
    return Places(better=torch.cat(better), tied=torch.cat(tied), own=own, can_hit=best_own != NON_CANDIDATE_SCORE)


def expected_recall(places: Places, k: int) -> float:
    """Mean probability of a hit at k when tied items are ordered at random."""
    return hit_chances(places, k).mean().item()


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
    return (1.0 - miss) * places.can_hit


def both_places(
    scores: Float[Tensor, "i t"],
    text_image_index: Int[Tensor, " t"],
    owners: Int[Tensor, " i"] | None,
    text_to_image_scores: Float[Tensor, "i t"] | None,
) -> tuple[Places, Places]:
    """Places of images that look for texts and of texts that look for images, after checks."""
    other = scores if text_to_image_scores is None else text_to_image_scores
    _check_scores(scores, text_image_index)
    if other is not scores:
        _check_scores(other, text_image_index)
    if other.shape != scores.shape:
        raise ValueError(f"text_to_image_scores is {list(other.shape)}; expected {list(scores.shape)} as for scores")
    pairs = own_pairs(text_image_index, len(scores), owners)
    return best_places(scores, *pairs), best_places(other.T, *pairs[::-1])


def _check_scores(scores: Tensor, text_image_index: Tensor) -> None:
    if scores.ndim != 2 or scores.shape[1] != len(text_image_index):
        given = f"scores are {list(scores.shape)} for {len(text_image_index)} texts"
        raise ValueError(f"{given}; expected [images, texts] with one index per text")
    check_not_nan(scores, "scores")


def check_not_nan(values: Tensor, name: str) -> None:
    """Raises ValueError, with their number, if values are NaN."""
    count = int(values.isnan().count_nonzero())
    if count:
        raise ValueError(f"{count} of {values.numel()} {name} are NaN; expected numbers, check the model's outputs")


def own_pairs(
    text_image_index: Int[Tensor, " t"], num_images: int, owners: Int[Tensor, " i"] | None = None
) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Returns image and text of all pairs that belong together, after checks."""
    if len(text_image_index) == 0:
        raise ValueError("there are no texts; expected at least one")
    low, high = int(text_image_index.min()), int(text_image_index.max())
    if low < 0 or high >= num_images:
        raise ValueError(f"text_image_index goes from {low} to {high}; expected rows of the {num_images} images")
    images, texts = text_image_index, torch.arange(len(text_image_index))
    if owners is not None:
        counts = torch.bincount(text_image_index, minlength=num_images)
        images = torch.arange(num_images).repeat_interleave(counts[owners])
        first = (counts.cumsum(0) - counts)[owners] - (counts[owners].cumsum(0) - counts[owners])
        texts = text_image_index.argsort(stable=True)[torch.arange(len(images)) + first[images]]
    without = int((torch.bincount(images, minlength=num_images) == 0).sum())
    if without:
        raise ValueError(f"{without} of {num_images} images have no text; expected at least one each, leave them out")
    return images, texts


def check_ks(ks: Sequence[int]) -> None:
    """Raises ValueError unless there are ranks, from 1 up."""
    if not ks or min(ks) < 1:
        raise ValueError(f"k is {list(ks)}; expected ranks from 1 up")
