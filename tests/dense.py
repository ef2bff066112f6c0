"""Retrieval on whole tables, image by text, query by query: slow and plain, to compare with."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bridgetower.evaluation.config import Protocol, RetrievalConfig
from bridgetower.evaluation.metrics import RECALL_KS, Candidates, GroundTruth, RetrievalRecalls, ScoresOf
from bridgetower.evaluation.retrieval import RetrievalResult

DROPPED = -100.0
"""What the official code gives a pair that the first stage dropped."""


def truth_of(index: Tensor, owners: Tensor | None = None) -> GroundTruth:
    """The truth where images have texts of their own, unless owners are given."""
    return GroundTruth(index, torch.arange(int(index.max()) + 1) if owners is None else owners)


def scores_of(table: Tensor) -> ScoresOf:
    """Gives a table block by block."""
    return lambda rows, texts: table[rows][:, texts]


def listed(
    truth: GroundTruth, image_side: Tensor, text_side: Tensor | None = None, cosine: Tensor | None = None
) -> Candidates:
    """The list of the pairs that two tables are true at; without the second one, the first is of both sides."""
    text_side = image_side if text_side is None else text_side
    cosine = torch.zeros(image_side.shape) if cosine is None else cosine
    at = (image_side | text_side).nonzero(as_tuple=True)
    sides = {"image_side": image_side[at], "text_side": text_side[at]}
    return Candidates(image=at[0], text=at[1], cosine=cosine[at], truth=truth, config=RetrievalConfig(), **sides)


def ranked(pairs: Candidates, scores: Tensor, protocol: Protocol = "standard") -> Candidates:
    """Candidates with scores of their pairs, or of a table, by a protocol."""
    scores = scores[pairs.image, pairs.text] if scores.ndim == 2 else scores
    return replace(pairs, itm=scores, config=replace(pairs.config, protocol=protocol))


def table(pairs: Candidates, values: Tensor, other: float = torch.nan) -> Tensor:
    """The values of a list, image by text."""
    found = torch.full((len(pairs.truth.owners), len(pairs.truth.text_image_index)), other, dtype=values.dtype)
    found[pairs.image, pairs.text] = values
    return found


def similarity(result: RetrievalResult) -> Tensor:
    """All cosines of an evaluation."""
    return result.image_vectors @ result.text_vectors.T


def itm(result: RetrievalResult) -> Tensor:
    """All matching scores of an evaluation, NaN where nothing was matched."""
    assert result.candidates is not None
    return table(result.candidates, result.candidates.itm)


def topk(cosine: Tensor, k: int, dim: int) -> Tensor:
    """True at the k highest along a dimension, of equal ones at the first."""
    best = cosine.sort(dim=dim, descending=True, stable=True).indices.narrow(dim, 0, min(k, cosine.shape[dim]))
    return torch.zeros(cosine.shape, dtype=torch.bool).scatter(dim, best, value=True)


def two_stage_scores(
    scores: Tensor, image_side: Tensor, text_side: Tensor, protocol: Protocol
) -> tuple[Tensor, Tensor]:
    """What ranks texts for images, and images for texts: the maximum of both sides with protocol `paper`."""
    sides = [torch.where(side, scores, DROPPED) for side in (image_side, text_side)]
    if protocol == "paper":
        return (torch.maximum(*sides),) * 2
    return sides[0], sides[1]


def recalls(
    for_images: Tensor, for_texts: Tensor, truth: GroundTruth, ks: Sequence[int] = RECALL_KS
) -> RetrievalRecalls:
    """Recalls of tables without folds."""
    own = truth.owners[:, None] == truth.text_image_index
    directions = [
        {k: math.fsum(hit_chance(*query, k) for query in zip(rows, right, strict=True)) / len(rows) for k in ks}
        for rows, right in ((for_images.tolist(), own.tolist()), (for_texts.T.tolist(), own.T.tolist()))
    ]
    return RetrievalRecalls(*directions)


def hit_chance(scores: Sequence[float], own: Sequence[bool], k: int) -> float:
    """Chance of an own item among the first k; one that was dropped is no hit."""
    best = max((score for score, is_own in zip(scores, own, strict=True) if is_own), default=DROPPED)
    if best == DROPPED:
        return 0.0
    better, tied = sum(score > best for score in scores), scores.count(best)
    others = tied - sum(is_own and score == best for score, is_own in zip(scores, own, strict=True))
    room = min(max(k - better, 0), tied)
    return 1 - math.comb(others, room) / math.comb(tied, room)
