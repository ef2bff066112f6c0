"""Image-text retrieval and matching metrics: pure functions on whole score matrices, image by text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.evaluation.config import Protocol
from bridgetower.evaluation.places import (
    NON_CANDIDATE_SCORE,
    PAIRS_AT_ONCE,
    Places,
    best_places,
    both_places,
    check_ks,
    check_not_nan,
    expected_recall,
    hit_chances,
    own_pairs,
    tied_places,
)

RECALL_KS = (1, 5, 10)
"""The ranks that the field reports; RSUM is the sum of both directions at these three."""


class GroundTruth(NamedTuple):
    """Which images and texts belong together.

    Attributes:
        text_image_index: Row of the image that each text belongs to.
        owners: Row of the image whose texts belong to each image: itself, or one that has the same captions.
    """

    text_image_index: Int[Tensor, " t"]
    owners: Int[Tensor, " i"]


class QueryHits(NamedTuple):
    """Recalls of single queries.

    Attributes:
        images: Of images that look for texts.
        texts: Of texts that look for images.
    """

    images: Float[Tensor, " i"]
    texts: Float[Tensor, " t"]


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
        """Checks that both directions hold the same ranks and that every recall is a fraction."""
        if self.image_to_text.keys() != self.text_to_image.keys():
            given = f"{list(self.image_to_text)} and {list(self.text_to_image)}"
            raise ValueError(f"the two directions have recalls at {given}; expected the same ranks in both")
        for k, recall in (*self.image_to_text.items(), *self.text_to_image.items()):
            if not 0.0 <= recall <= 1.0:
                raise ValueError(f"recall at {k} is {recall}; expected a fraction between 0 and 1")

    @property
    def rsum(self) -> float:
        """Sum of all recalls in percent; the published RSUM when the ranks are 1, 5 and 10 (at most 600)."""
        return 100.0 * (sum(self.image_to_text.values()) + sum(self.text_to_image.values()))

    def to_dict(self) -> dict[str, float | int]:
        """Flat, JSON-ready form: `image_to_text_r1`, `text_to_image_r1`, …, `rsum` and the counts."""
        recalls = {f"image_to_text_r{k}": recall for k, recall in self.image_to_text.items()}
        recalls |= {f"text_to_image_r{k}": recall for k, recall in self.text_to_image.items()}
        counts = {"num_images": self.num_images, "num_texts": self.num_texts, "num_folds": self.num_folds}
        return recalls | {"rsum": self.rsum} | counts


def retrieval_recalls(
    scores: Float[Tensor, "i t"],
    text_image_index: Int[Tensor, " t"],
    *,
    owners: Int[Tensor, " i"] | None = None,
    text_to_image_scores: Float[Tensor, "i t"] | None = None,
    ks: Sequence[int] = RECALL_KS,
) -> RetrievalRecalls:
    """Recall at k of images that look for texts and of texts that look for images.

    Without ties this is the share of hits in `torch.topk`. Tied scores count by their chance of a hit when the tied
    items are ordered at random, so constant scores give exactly `chance_recalls` and the order of the rows never
    matters. An item that scores `NON_CANDIDATE_SCORE` is never a hit, whatever it is tied with.

    Args:
        scores: Higher is more alike; used for both directions unless `text_to_image_scores` is given.
        text_image_index: Row of the image that each text belongs to; every image needs at least one text.
        owners: Row of the image whose texts belong to each image as well, such as another drawing of the same thing;
            None: each has its own.
        text_to_image_scores: Scores of the text→image direction, where the two directions differ.
        ks: Ranks to report; a rank beyond the number of items means all items.

    Raises:
        ValueError: NaN scores, an image without text, an index out of range, shapes that do not fit, k < 1.
    """
    check_ks(ks)
    images, texts = both_places(scores, text_image_index, owners, text_to_image_scores)
    return RetrievalRecalls(
        image_to_text={k: expected_recall(images, k) for k in ks},
        text_to_image={k: expected_recall(texts, k) for k in ks},
        num_images=scores.shape[0],
        num_texts=scores.shape[1],
    )


def query_hits(
    scores: Float[Tensor, "i t"],
    text_image_index: Int[Tensor, " t"],
    *,
    owners: Int[Tensor, " i"] | None = None,
    text_to_image_scores: Float[Tensor, "i t"] | None = None,
) -> QueryHits:
    """Returns the recalls of `retrieval_recalls` query by query, each the mean over `RECALL_KS`."""
    images, texts = both_places(scores, text_image_index, owners, text_to_image_scores)
    return QueryHits(
        *(torch.stack([hit_chances(places, k) for k in RECALL_KS]).mean(dim=0) for places in (images, texts))
    )


def folds(
    text_image_index: Int[Tensor, " t"], num_images: int, fold_size: int | None
) -> Iterator[tuple[slice, Int[Tensor, " f"]]]:
    """Yields the rows of the images of each fold and of their texts; without `fold_size` there is one."""
    size = fold_size or num_images
    for start in range(0, num_images, size):
        yield slice(start, start + size), (text_image_index // size == start // size).nonzero().squeeze(1)


def streamed_recalls(
    scores_of: Callable[[slice], Float[Tensor, "i b"]],
    num_images: int,
    text_image_index: Int[Tensor, " t"],
    *,
    owners: Int[Tensor, " i"] | None = None,
    ks: Sequence[int] = RECALL_KS,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> RetrievalRecalls:
    """Does as `retrieval_recalls`, with the scores of a block of texts in memory instead of those of all.

    Args:
        scores_of: Returns the scores of all images with a block of texts; it is called twice with each, and gives the
            same.
        num_images: Rows of a block.
        text_image_index: Row of the image that each text belongs to; every image needs at least one text.
        owners: As for `retrieval_recalls`.
        ks: Ranks to report.
        pairs_at_once: About how many scores a block has.

    Raises:
        ValueError: As `retrieval_recalls`.
    """
    check_ks(ks)
    images, texts = own_pairs(text_image_index, num_images, owners)
    order = texts.argsort(stable=True)
    images, texts = images[order], texts[order]
    size = max(1, pairs_at_once // num_images)
    starts = range(0, len(text_image_index), size)
    bounds = torch.searchsorted(texts, torch.tensor([*starts, len(text_image_index)])).tolist()
    blocks = [(slice(start, start + size), slice(*ends)) for start, ends in zip(starts, pairwise(bounds), strict=True)]
    own, places = torch.empty(len(images)), []
    for block, pairs in blocks:
        scores = scores_of(block)
        check_not_nan(scores, "scores")
        own[pairs] = scores[images[pairs], texts[pairs] - block.start].float()
        places.append(best_places(scores.T, texts[pairs] - block.start, images[pairs]))
    best = own.new_full((num_images,), -torch.inf).scatter_reduce(0, images, own, "amax")
    better, tied = torch.zeros(num_images, dtype=torch.int64), torch.zeros(num_images, dtype=torch.int64)
    for block, _ in blocks:
        scores = scores_of(block)
        better += (scores > best[:, None]).sum(dim=1)
        tied += (scores == best[:, None]).sum(dim=1)
    num_best = torch.bincount(images[own == best[images]], minlength=num_images)
    of_images = Places(better=better, tied=tied, own=num_best, can_hit=best != NON_CANDIDATE_SCORE)
    of_texts = Places(*(torch.cat(parts) for parts in zip(*places, strict=True)))
    return RetrievalRecalls(
        image_to_text={k: expected_recall(of_images, k) for k in ks},
        text_to_image={k: expected_recall(of_texts, k) for k in ks},
        num_images=num_images,
        num_texts=len(text_image_index),
    )


def fold_recalls(
    scores: Float[Tensor, "i t"],
    text_image_index: Int[Tensor, " t"],
    *,
    fold_size: int = 1000,
    text_to_image_scores: Float[Tensor, "i t"] | None = None,
    ks: Sequence[int] = RECALL_KS,
) -> RetrievalRecalls:
    """Mean recalls over consecutive folds of `fold_size` images, each with its own texts only (COCO 1k: five folds).

    Two-stage scores are only right here if their candidates were chosen within each fold.

    Raises:
        ValueError: The number of images is no multiple of `fold_size`, or as for `retrieval_recalls`.
    """
    num_images = len(scores)
    if fold_size < 1 or num_images == 0 or num_images % fold_size:
        raise ValueError(f"{num_images} images do not split into folds of {fold_size}; expected a multiple")
    own_pairs(text_image_index, num_images)
    found = []
    for rows, texts in folds(text_image_index, num_images, fold_size):
        other = None if text_to_image_scores is None else text_to_image_scores[rows, texts]
        index = text_image_index[texts] - rows.start
        found.append(retrieval_recalls(scores[rows, texts], index, text_to_image_scores=other, ks=ks))
    return RetrievalRecalls(
        image_to_text={k: sum(fold.image_to_text[k] for fold in found) / len(found) for k in ks},
        text_to_image={k: sum(fold.text_to_image[k] for fold in found) / len(found) for k in ks},
        num_images=num_images,
        num_texts=len(text_image_index),
        num_folds=len(found),
    )


def chance_recalls(
    text_image_index: Int[Tensor, " t"],
    num_images: int,
    *,
    owners: Int[Tensor, " i"] | None = None,
    ks: Sequence[int] = RECALL_KS,
) -> RetrievalRecalls:
    """Expected recalls of a uniformly random ranking.

    With M items of which n are right: 1 − C(M−n, k)/C(M, k), averaged over queries. A rank beyond the number of items
    is a certain hit.

    Raises:
        ValueError: An image without text, an index out of range, k < 1.
    """
    pairs = own_pairs(text_image_index, num_images, owners)
    check_ks(ks)
    num_texts = len(text_image_index)
    images, texts = tied_places(pairs[0], num_images, num_texts), tied_places(pairs[1], num_texts, num_images)
    return RetrievalRecalls(
        image_to_text={k: expected_recall(images, k) for k in ks},
        text_to_image={k: expected_recall(texts, k) for k in ks},
        num_images=num_images,
        num_texts=num_texts,
    )


def topk_candidates(similarity: Float[Tensor, "i t"], k: int, *, dim: int) -> Bool[Tensor, "i t"]:
    """First retrieval stage: True at the k most similar pairs along `dim`.

    Args:
        similarity: Image by text, such as the cosine of the contrastive features.
        k: Candidates per query; more than there are means all (published: 128 on Flickr30k, 256 on COCO).
        dim: 1 for the texts of each image (image side), 0 for the images of each text (text side).

    Raises:
        ValueError: NaN similarities, k < 1.
    """
    check_ks([k])
    check_not_nan(similarity, "similarities")
    best = similarity.topk(min(k, similarity.shape[dim]), dim=dim).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(dim, best, value=True)


def two_stage_scores(
    itm: Float[Tensor, "i t"],
    image_side: Bool[Tensor, "i t"],
    text_side: Bool[Tensor, "i t"],
    *,
    protocol: Protocol,
) -> tuple[Float[Tensor, "i t"], Float[Tensor, "i t"]]:
    """Second retrieval stage: the scores that rank image→text and text→image, from the scores of candidate pairs.

    `honest` ranks each direction on its own candidates only. `paper` ranks both on the elementwise maximum of the
    image-side and the text-side scores, so that a query also ranks pairs that only the other side chose (official
    `objectives.py`, `compute_irtr_itm_itc_recall`). All other pairs get `NON_CANDIDATE_SCORE`.

    Args:
        itm: Matching score (logit of class 1) of every candidate pair; other entries are not read and may be NaN.
        image_side: True at the candidates of each image.
        text_side: True at the candidates of each text.
        protocol: `honest` or `paper`.

    Returns:
        Scores for image→text and for text→image.

    Raises:
        ValueError: NaN at a candidate, a candidate at or below `NON_CANDIDATE_SCORE`, unknown protocol, shapes.
    """
    if not itm.shape == image_side.shape == text_side.shape:
        shapes = [list(tensor.shape) for tensor in (itm, image_side, text_side)]
        raise ValueError(f"itm, image_side and text_side have shapes {shapes}; expected the same for all three")
    either = image_side | text_side
    candidates = itm[either]
    check_not_nan(candidates, "candidate scores")
    too_low = int((candidates <= NON_CANDIDATE_SCORE).sum())
    if too_low:
        raise ValueError(f"{too_low} candidate scores are {NON_CANDIDATE_SCORE} or less; expected more than that")
    if protocol == "paper":
        image_side = text_side = either
    elif protocol != "honest":
        raise ValueError(f"protocol is {protocol!r}; expected 'honest' or 'paper'")
    return (
        torch.where(image_side, itm, NON_CANDIDATE_SCORE),
        torch.where(text_side, itm, NON_CANDIDATE_SCORE),
    )
