"""Scores of tested examples with intervals by a bootstrap over images, and the baselines beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

import numpy as np

from bridgetower.data.sets.answers import normalise_answer
from bridgetower.data.sets.prepared_set import PreparedSet
from bridgetower.data.sets.schema import Schema
from bridgetower.evaluation.class_metrics import vqa_score
from bridgetower.evaluation.config import Judgement, Outcome

DRAWS = 2000  # of the bootstrap
RECALL_RANK = 5
"""A text is found if its image is among so many."""

Row = Mapping[str, Any]
"""An example of a prepared set: its id, the numbers of its images, and its entry."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The score of each tested example by its id, and the image that it belongs to."""

    values: Mapping[str, float]
    images: Mapping[str, int]

    def interval(self) -> Interval:
        return interval_of(list(self.values.values()), [self.images[name] for name in self.values])

    def less(self, baseline: Scores) -> Interval:
        """Returns the mean difference from the scores of another model for the same examples."""
        differences = [value - baseline.values[name] for name, value in self.values.items()]
        return interval_of(differences, [self.images[name] for name in self.values])


def interval_of(values: Sequence[float], images: Sequence[int], seed: int = 0) -> Interval:
    """Returns the mean of values, and its interval over draws of images, each of which brings all of its values."""
    # The sum and the number of the values of each image.
    _, rows = np.unique(images, return_inverse=True)
    counts = np.bincount(rows)
    sums = np.bincount(rows, weights=values)

    # How often each draw has each image.
    generator = np.random.default_rng(seed)
    num_images = len(counts)
    shares = np.full(num_images, 1 / num_images)
    weights = generator.multinomial(num_images, shares, DRAWS)
    means = weights @ sums / (weights @ counts)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(mean=float(np.mean(values)), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is reported of a kind of set.

    Attributes:
        name: In words.
        unit: "%" for a share, "" for a number.
        is_error: Whether lower is better.
        judged: Returns the score of a judgement; None where there are no judgements.
        constant: Returns the score of an answer for an entry; None where no answer fits all.
        target: Returns the answer of a training entry that a constant answer is chosen from; None if it has none.
        chance: Returns the mean score of a guess.
    """

    name: str
    unit: str = "%"
    is_error: bool = False
    judged: Callable[[Judgement], float] = lambda judgement: judgement.score
    target: Callable[[Any], Any] | None = None
    constant: Callable[[Any, Any], float] | None = None
    chance: Callable[[Sequence[Any], Sequence[str]], float | None] = lambda entries, names: None


def labels_text(entry: Row) -> str | None:
    return ", ".join(sorted(entry["labels"])) or "none" if entry["labelled"] else None


def most_frequent_answer(entry: Row) -> str | None:
    answers = Counter(map(normalise_answer, entry["answers"]))
    return answers.most_common(1)[0][0] if answers else None


def chance_of_answers(entries: Sequence[Row], names: Sequence[str]) -> float:
    vocabulary = set(names)
    scores = []
    for entry in entries:
        answers = {normalise_answer(answer) for answer in entry["answers"]} & vocabulary
        scores.append(sum(vqa_score(answer, entry["answers"]) for answer in answers) / len(names))
    return sum(scores) / len(scores)


def chance_of_classes(entries: Sequence[Row], names: Sequence[str]) -> float | None:
    has_one_label = all(len(entry["labels"]) == 1 for entry in entries if entry["labelled"])
    return 1 / len(names) if has_one_label else None


def _number(entry: Row) -> float | None:
    return float(entry["labels"][0]) if entry["labels"] else None


_STATEMENTS = Metric(
    name="accuracy",
    target=lambda entry: entry["label"] or None,
    constant=lambda entry, label: float(entry["label"] == label),
    chance=lambda entries, names: 1 / len(names),
)
METRICS: Mapping[str, Metric] = {
    "pairs": Metric(
        name=f"texts whose image is among the first {RECALL_RANK}",
        judged=lambda judgement: float(judgement.error < RECALL_RANK),  # its rank minus one
    ),
    "vqa": Metric(
        name="VQA score",
        target=most_frequent_answer,
        constant=lambda entry, answer: vqa_score(answer, entry["answers"]),
        chance=chance_of_answers,
    ),
    "entailment": _STATEMENTS,
    "image-pairs": _STATEMENTS,
    "classification": Metric(
        name="accuracy",
        target=labels_text,
        constant=lambda entry, labels: float(labels_text(entry) == labels),
        chance=chance_of_classes,
    ),
    "regression": Metric(
        name="mean absolute error",
        unit="",
        is_error=True,
        judged=lambda judgement: judgement.error,
        target=_number,
        constant=lambda entry, number: abs(float(entry["labels"][0]) - number),
    ),
}
"""By the kind of set."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Scores beside those of the model, and the difference of the model from them."""

    name: str
    interval: Interval
    difference: Interval
    is_improved: bool


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit has reached on examples that the model was not trained on.

    Attributes:
        metric: Its name in words.
        unit: "%" for a share, "" for a number.
        is_error: Whether lower is better.
        num_examples: Tested examples.
        num_images: Their images.
        model: The scores of the model.
        baselines: The model before, and the most frequent answer, where there are such.
        chance: The mean score of a guess; None where a guess means nothing.
        verdict: What this says, in a sentence.
    """

    metric: str
    unit: str
    is_error: bool
    num_examples: int
    num_images: int
    model: Interval
    baselines: tuple[Baseline, ...]
    chance: float | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON holds it."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Returns names and values of the result, for a table."""
        rows = [("model", self._text(self.model))]
        rows += [(baseline.name, self._text(baseline.interval)) for baseline in self.baselines]
        if self.chance is not None:
            rows.append(("guessing", format_score(self.chance, self.unit)))
        return rows

    def _text(self, interval: Interval) -> str:
        low = format_score(interval.low, self.unit)
        high = format_score(interval.high, self.unit)
        return f"{format_score(interval.mean, self.unit)} ({low} to {high})"


def format_score(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.3g}"


@dataclass
class HeldOutExamples:
    """The rows of tested splits by the id of their entry, and the answers of the training entries."""

    kind: str
    rows: Mapping[str, Row]
    training: Sequence[Any]

    @classmethod
    def read(
        cls, kind: str, folder: str, schema: Schema, tested: Sequence[str], trained: Sequence[str]
    ) -> HeldOutExamples:
        rows: dict[str, Row] = {}
        for row in PreparedSet(folder, tested, schema).scan():
            entry = row["entry"]
            if schema.id is not None:
                rows[str(entry[schema.id])] = row
        training = [row["entry"] for row in PreparedSet(folder, trained, schema).scan()]
        return cls(kind, rows, training)

    def judgements(self, outcome: Outcome) -> list[Judgement]:
        """Returns the examples whose answers are known. Numbers are right if their error is at most the median."""
        if outcome.judge is not None:
            return outcome.judge()
        judgements = []
        for prediction in outcome.predictions:
            name = str(prediction["id"])
            row = self.rows[name]
            target = _number(row["entry"])
            if target is not None:
                judgements.append(
                    Judgement(
                        id=name,
                        images=tuple(row["images"]),
                        text=row["entry"]["text"],
                        target=f"{target:g}",
                        prediction=f"{prediction['number']:.3g}",
                        score=0.0,
                        error=abs(target - prediction["number"]),
                        probability=None,
                    )
                )
        middle = median(judgement.error for judgement in judgements) if judgements else 0.0
        return [replace(entry, score=float(entry.error <= middle)) for entry in judgements]

    def scores(self, outcome: Outcome) -> Scores:
        """Returns the score of each example whose answer is known."""
        metric = METRICS[self.kind]
        values: dict[str, float] = {}
        images: dict[str, int] = {}
        for judgement in self.judgements(outcome):
            # A caption has no id of its own.
            name = f"{judgement.id}\n{judgement.text}" if self.kind == "pairs" else judgement.id
            values[name] = metric.judged(judgement)
            images[name] = judgement.images[0] if judgement.images else -1 - len(images)
        return Scores(values=values, images=images)

    def constant_scores(self, scores: Scores) -> tuple[str, Scores] | None:
        """Returns the answer that fits most training entries with its scores, or None where no answer fits all."""
        metric = METRICS[self.kind]
        if metric.target is None or metric.constant is None:
            return None
        targets = [target for target in map(metric.target, self.training) if target is not None]
        if not targets:
            return None
        answer = median(targets) if metric.is_error else Counter(targets).most_common(1)[0][0]
        values = {name: metric.constant(self.rows[name]["entry"], answer) for name in scores.values}
        noun = "median" if metric.is_error else "most frequent answer"
        return f"{noun} of training, {answer}", Scores(values=values, images=scores.images)

    def chance(self, names: Sequence[str], outcomes: Sequence[Outcome]) -> float | None:
        """Returns the mean score of a guess among the names of the classes or, of texts, among the images."""
        if self.kind == "pairs":
            metric = f"chance_text_to_image_r{RECALL_RANK}"
            return fmean(outcome.metrics[metric] for outcome in outcomes)
        entries = [row["entry"] for row in self.rows.values()]
        return METRICS[self.kind].chance(entries, names)


def joined_scores(scores: Sequence[Scores]) -> Scores:
    """Returns the scores of all folds together. Their examples and images differ."""
    values: dict[str, float] = {}
    images: dict[str, int] = {}
    for fold in scores:
        values |= fold.values
        images |= fold.images
    return Scores(values=values, images=images)


def result_of(
    kind: str,
    scores: Scores,
    baselines: Sequence[tuple[str, Scores]],
    chance: float | None,
) -> FitResult:
    """Compares the scores of a model with those of its baselines, by the interval of the difference."""
    metric = METRICS[kind]
    compared = []
    sentences = []
    for name, baseline in baselines:
        difference = scores.less(baseline)
        is_improved = difference.high < 0 if metric.is_error else difference.low > 0
        compared.append(
            Baseline(
                name=name,
                interval=baseline.interval(),
                difference=difference,
                is_improved=is_improved,
            )
        )
        low, high = (
            format_score(value, metric.unit) for value in (difference.low, difference.high)
        )
        between = f"the difference is between {low} and {high}"
        if is_improved:
            sentences.append(f"Better than {name}: {between}.")
        else:
            sentences.append(f"No improvement over {name} is shown: {between}.")
    model = scores.interval()
    if not baselines and chance is not None:
        words = "Better than" if model.low > chance else "No improvement over"
        sentences.append(f"{words} guessing, {format_score(chance, metric.unit)}.")
    return FitResult(
        metric=metric.name,
        unit=metric.unit,
        is_error=metric.is_error,
        num_examples=len(scores.values),
        num_images=len(set(scores.images.values())),
        model=model,
        baselines=tuple(compared),
        chance=chance,
        verdict=" ".join(sentences),
    )
