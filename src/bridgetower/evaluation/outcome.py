"""What an evaluation leaves: metrics, predictions by id, and the file that a test server takes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridgetower.files import json_text, write_json, write_text

if TYPE_CHECKING:
    from bridgetower.data.examples import PreparedImages

METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """An example whose answer is known, and what the model made of it.

    Attributes:
        images: Numbers of its images among those of the set.
        text: That the model read; empty if none.
        expected, given: The right answer and the model's, in words.
        score: From 0, wrong, to 1, right.
        miss: How bad it is; the worst misses have the largest values.
        probability: That the model gives to its answer; None where it gives none.
        found: Number of the image that was found; None where none is looked for.
        groups: Kinds that the example is of, by column.
    """

    id: str
    images: tuple[int, ...]
    text: str
    expected: str
    given: str
    score: float
    miss: float
    probability: float | None
    found: int | None = None
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was found out about a model.

    Attributes:
        metrics: By name; empty where the answers are not known.
        counts: Of what was judged.
        details: Further metrics, by group, such as the types of questions.
        predictions: One row per example, with its id.
        submission: Name and content of the file that a test server takes.
        notes: What cannot be given, and why.
        judge: Gives the examples whose answers are known, for a report of errors; None where there is none.
        images: That the judgements name.
    """

    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    details: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    predictions: Sequence[Mapping[str, Any]] = ()
    submission: tuple[str, str] | None = None
    notes: Sequence[str] = ()
    judge: Callable[[], list[Judgement]] | None = None
    images: PreparedImages | None = None

    def report(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content of `metrics.json`: what was measured and how, versions, counts, metrics."""
        versions = {name: version(name) for name in ("bridgetower", "torch")} | {"python": platform.python_version()}
        notes = {"notes": list(self.notes)} if self.notes else {}
        return {**about, **self.counts, **self.metrics, **self.details, **notes, "versions": versions}

    def write(self, folder: Path, about: Mapping[str, Any]) -> None:
        if self.predictions:
            lines = (json_text(row) + "\n" for row in self.predictions)
            write_text(folder / PREDICTIONS, "".join(lines))
        if self.submission is not None:
            name, content = self.submission
            write_text(folder / name, content)
        write_json(folder / METRICS, self.report(about))
