"""Retrieval on whole tables, image by text, query by query: slow and plain, to compare with."""

import math
from dataclasses import replace

import torch

from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import RECALL_KS, Candidates, GroundTruth, RetrievalRecalls

DROPPED = -100.0
"""What the official code gives a pair that the first stage dropped."""


def truth_of(index, owners=None):
    """The truth where images have texts of their own, unless owners are given."""
    return GroundTruth(index, torch.arange(int(index.max()) + 1) if owners is None else owners)


def block_scores(table):
    """Gives a table block by block."""
    return lambda rows, texts: table[rows][:, texts]


def list_pairs(truth, image_side, text_side=None, cosine=None):
    """The list of the pairs that two tables are true at. Without the second one, the first is of both sides."""
    text_side = image_side if text_side is None else text_side
    cosine = torch.zeros(image_side.shape) if cosine is None else cosine
    at = (image_side | text_side).nonzero(as_tuple=True)
    sides = {"image_side": image_side[at], "text_side": text_side[at]}
    return Candidates(
        image=at[0], text=at[1], cosine=cosine[at], truth=truth, config=RetrievalConfig(), **sides
    )


def with_scores(pairs, scores, protocol="standard"):
    """Candidates with scores of their pairs, or of a table, by a protocol."""
    scores = scores[pairs.image, pairs.text] if scores.ndim == 2 else scores
    return replace(pairs, itm=scores, config=replace(pairs.config, protocol=protocol))


def score_table(pairs, values, other=torch.nan):
    scores = torch.full(
        (len(pairs.truth.owners), len(pairs.truth.text_image_index)), other, dtype=values.dtype
    )
    scores[pairs.image, pairs.text] = values
    return scores


def cosine_table(result):
    return result.image_vectors @ result.text_vectors.T


def itm_table(result):
    """All matching scores of an evaluation, NaN where nothing was matched."""
    return score_table(result.candidates, result.candidates.itm)


def topk_mask(cosine, k, dim):
    """True at the k highest along a dimension, of equal ones at the first."""
    best = cosine.sort(dim=dim, descending=True, stable=True).indices.narrow(
        dim, 0, min(k, cosine.shape[dim])
    )
    return torch.zeros(cosine.shape, dtype=torch.bool).scatter(dim, best, value=True)


def plain_two_stage(scores, image_side, text_side, protocol):
    """What ranks texts for images, and images for texts: the maximum of both sides with protocol `paper`."""
    sides = [torch.where(side, scores, DROPPED) for side in (image_side, text_side)]
    if protocol == "paper":
        return (torch.maximum(*sides),) * 2
    return sides[0], sides[1]


def plain_recalls(for_images, for_texts, truth, ks=RECALL_KS):
    is_own = truth.owners[:, None] == truth.text_image_index
    directions = [
        {
            k: math.fsum(hit_chance(*query, k) for query in zip(rows, right, strict=True))
            / len(rows)
            for k in ks
        }
        for rows, right in (
            (for_images.tolist(), is_own.tolist()),
            (for_texts.T.tolist(), is_own.T.tolist()),
        )
    ]
    return RetrievalRecalls(*directions)


def hit_chance(scores, is_own, k):
    """Chance of an own item among the first k. One that was dropped is no hit."""
    best = max(
        (score for score, is_own in zip(scores, is_own, strict=True) if is_own), default=DROPPED
    )
    if best == DROPPED:
        return 0.0
    better = sum(score > best for score in scores)
    tied = scores.count(best)
    num_wrong = tied - sum(
        is_own and score == best for score, is_own in zip(scores, is_own, strict=True)
    )
    room = min(max(k - better, 0), tied)
    return 1 - math.comb(num_wrong, room) / math.comb(tied, room)
