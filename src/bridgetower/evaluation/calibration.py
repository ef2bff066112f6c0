"""How far probabilities can be trusted, and probabilities from the log-odds of matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridgetower.checkpoints import Calibration

BINS = 10
"""Of equal width, from 0 to 1."""


class Bin(NamedTuple):
    """Predictions whose probabilities are alike.

    Attributes:
        number: Of the bin, from 0.
        examples: In it.
        probability: Mean.
        right: Share of them, or mean score.
    """

    number: int
    examples: int
    probability: float
    right: float


def reliability(probabilities: Float[Tensor, " n"], right: Float[Tensor, " n"]) -> list[Bin]:
    """Groups predictions by their probability; bins without any are left out."""
    numbers = (probabilities.double() * BINS).long().clamp(max=BINS - 1)
    counts, said, given = (
        torch.bincount(numbers, weights=values.double(), minlength=BINS).tolist()
        for values in (torch.ones_like(right), probabilities, right)
    )
    return [
        Bin(number, int(count), said[number] / count, given[number] / count)
        for number, count in enumerate(counts)
        if count
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Returns the mean difference between probability and share of right predictions, weighed by examples."""
    return sum(one.examples * abs(one.probability - one.right) for one in bins) / sum(one.examples for one in bins)


def calibrate(
    log_odds: Float[Tensor, " n"], matching: Bool[Tensor, " n"], halves: Bool[Tensor, " n"]
) -> Calibration | None:
    """Fits the probability that a candidate matches."""
    sides = (halves, ~halves)
    if any(len(matching[side].unique()) < 2 for side in sides):
        return None
    after = torch.empty_like(log_odds)
    for side in sides:
        slope, intercept = _platt(log_odds[~side], matching[~side])
        after[side] = (slope * log_odds[side] + intercept).sigmoid()
    slope, intercept = _platt(log_odds, matching)
    errors = [expected_calibration_error(reliability(found, matching.float())) for found in (log_odds.sigmoid(), after)]
    return Calibration(
        slope=slope,
        intercept=intercept,
        pairs=len(matching),
        matching=int(matching.sum()),
        ece_before=errors[0],
        ece_after=errors[1],
    )


def _platt(log_odds: Float[Tensor, " n"], matching: Bool[Tensor, " n"]) -> tuple[float, float]:
    """Returns slope and intercept of a logistic regression; a slope below 0 is 0, and the share decides alone."""
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression().fit(log_odds.double().numpy()[:, None], matching.numpy())
    slope, intercept = float(found.coef_[0, 0]), float(found.intercept_[0])
    if slope > 0:
        return slope, intercept
    return 0.0, float(matching.double().mean().logit())
