"""The record of reranking in a checkpoint: weight of ITC, calibration and measured gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict, cast

from jaxtyping import Float
from torch import Tensor

from bridgetower.files import flattened
from bridgetower.plain import AT_LEAST_0, AT_LEAST_1, check_numbers, from_plain

# The name of the weight, as a metric and in configs.
ITC_WEIGHT = "itc_weight"
# The largest weight in a two-stage ranking: candidates are matched, but ordered by the cosine.
ITC_ALONE = 1e6


class Match(TypedDict, total=False):
    """How well a pair matches, from 0 to 1: a calibrated probability or, without a calibration, a score."""

    probability: float
    score: float


def match_text(probability: float | None = None, score: float | None = None) -> str:
    """Returns how well a pair matches in words: `12.3 %`, `score 0.123`, or nothing."""
    if probability is not None:
        return f"{100 * probability:.1f} %"
    if score is not None:
        return f"score {score:.3f}"
    return ""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a probability follows from the log-odds of the matching head: sigmoid(slope · log-odds + intercept).

    It is fitted to the candidates that ITC finds for the texts of a validation split (Platt scaling).
    """

    slope: float  # at least 0; 0: matching does not separate right candidates from wrong ones
    intercept: float
    pairs: int  # candidates, over all texts
    matching: int  # those of them that belong to their text
    ece_before: float  # expected calibration error of the sigmoid of the log-odds
    ece_after: float  # of the probability, by calibrations of the other half of the images each

    def __post_init__(self) -> None:
        counts = {"pairs": AT_LEAST_1, "matching": AT_LEAST_0}
        check_numbers(
            self, "calibration.", slope=AT_LEAST_0, ece_before=(0, 1), ece_after=(0, 1), **counts
        )

    def log_odds(self, log_odds: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return self.slope * log_odds + self.intercept


@dataclass(frozen=True, kw_only=True)
class Gain:
    """By how much matching the candidates ranks images better for a text than ITC alone, on a validation split.

    The measure is the mean of recall at 1, 5 and 10, text to image, as a fraction. The texts of each half of the images
    are ranked with the weight of ITC that is best on the other half.
    """

    difference: float  # of two stages less that of ITC alone
    low: float  # end of its 95 % interval
    high: float
    texts: int

    def __post_init__(self) -> None:
        check_numbers(self, "gain.", difference=(-1, 1), texts=AT_LEAST_1)


@dataclass(frozen=True, kw_only=True)
class Reranking:
    """Settings and measurements of the second stage of a search, which a checkpoint's config has as `reranking`."""

    # Weight of the cosine, which is added to the log-odds of a match. With 0, matching alone ranks candidates.
    itc_weight: float = 0.0
    # Without a calibration, outputs of the matching head are scores.
    calibration: Calibration | None = None
    # Gain of two stages over ITC alone, if it was measured.
    gain: Gain | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "reranking.", itc_weight=(0, ITC_ALONE))

    @property
    def helps(self) -> bool | None:
        """Whether two stages ranked better than ITC alone, with 95 % confidence, or None if it was not measured."""
        return None if self.gain is None else self.gain.low > 0

    @property
    def measure(self) -> Literal["probability", "score"]:
        """The name of what `match` returns."""
        return "score" if self.calibration is None else "probability"

    def match(self, log_odds: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Returns how well pairs match, from 0 to 1, as probabilities or scores."""
        if self.calibration is not None:
            log_odds = self.calibration.log_odds(log_odds)
        return log_odds.sigmoid()

    def matches(self, log_odds: Float[Tensor, " n"]) -> list[Match]:
        values = self.match(log_odds).tolist()
        return [cast(Match, {self.measure: value}) for value in values]

    def to_plain(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def metrics(self) -> dict[str, float]:
        """Returns all numbers under flat names, such as `calibration_slope`."""
        return {name.replace(".", "_"): number for name, number in flattened(self.to_plain())}

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float]) -> Reranking:
        """Builds a record from the names of `metrics` among other metrics."""
        fields = {
            "calibration": Calibration.__dataclass_fields__,
            "gain": Gain.__dataclass_fields__,
        }
        values: dict[str, Any] = {}
        if ITC_WEIGHT in metrics:
            values[ITC_WEIGHT] = metrics[ITC_WEIGHT]
        for name, number in metrics.items():
            record, _, field = name.partition("_")
            if field in fields.get(record, ()):
                values.setdefault(record, {})[field] = number
        return from_plain(cls, values, "reranking")


# The record of a checkpoint without one, such as a published checkpoint.
UNMEASURED = Reranking()
