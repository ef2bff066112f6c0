"""What an evaluation leaves: figures, predictions by id, and the file that a test server takes."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bridgetower.files import to_json, write_json, write_text

METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was found out about a model.

    Attributes:
        figures: By name; empty where the answers are not known.
        counts: Of what was judged.
        details: Further figures, by group, such as the types of questions.
        predictions: One row per example, with its id.
        submission: Name and content of the file that a test server takes.
    """

    figures: Mapping[str, float]
    counts: Mapping[str, int]
    details: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    predictions: Sequence[Mapping[str, Any]] = ()
    submission: tuple[str, str] | None = None

    def report(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content of `metrics.json`: what was measured and how, versions, counts, figures."""
        versions = {name: version(name) for name in ("bridgetower", "torch")} | {"python": platform.python_version()}
        return {**about, **self.counts, **self.figures, **self.details, "versions": versions}

    def write(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Writes `metrics.json`, and `predictions.jsonl` and the submission where there are any."""
        if self.predictions:
            lines = (to_json(row) + "\n" for row in self.predictions)
            write_text(folder / PREDICTIONS, "".join(lines))
        if self.submission is not None:
            name, content = self.submission
            write_text(folder / name, content)
        write_json(folder / METRICS, self.report(about))


def vqa_submission(answers: Mapping[int, str]) -> tuple[str, str]:
    """Returns the file that VQA's server takes: one JSON array of `question_id` and `answer`."""
    rows = [{"question_id": number, "answer": answer} for number, answer in answers.items()]
    return "submission.json", to_json(rows)


def nlvr2_submission(labels: Mapping[str, str]) -> tuple[str, str]:
    """Returns the file that NLVR2's evaluation takes: CSV lines of identifier and prediction, without header."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(labels.items())
    return "submission.csv", stream.getvalue()


def glue_submission(name: str, labels: Sequence[str]) -> tuple[str, str]:
    """Returns the file that GLUE's server takes: a header, then row number and prediction."""
    rows = (f"{index}\t{label}\n" for index, label in enumerate(labels))
    return name, "index\tprediction\n" + "".join(rows)
