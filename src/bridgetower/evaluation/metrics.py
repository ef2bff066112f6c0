"""Recalls of image-text retrieval, from scores that come in blocks or from the places of right answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.evaluation.places import (
    PAIRS_AT_ONCE,
    GroundTruth,
    Places,
    best_places,
    check_ks,
    check_not_nan,
    folds,
    hit_chances,
    own_pairs,
    tied_places,
)

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
    """Places of the images of a fold, and of its texts, which come in blocks."""
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
