"""Settings and results of evaluations. This module does not import torch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bridgetower.files import json_text, write_json, write_text
from bridgetower.plain import AT_LEAST_0, AT_LEAST_1, check_choice, check_numbers

if TYPE_CHECKING:
    from bridgetower.data.batches.examples import PreparedImages

Protocol = Literal["standard", "paper"]
Metrics = dict[str, float]
Details = dict[str, Metrics]
"""Metrics by group."""


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How retrieval is evaluated.

    Attributes:
        candidates: k of the first stage, per query; published: 128 on Flickr30k, 256 on COCO. 0 ranks by ITC alone.
        protocol: `standard` ranks each direction on its own candidates, by matching and ITC as the checkpoint weighs
            them. `paper` ranks both directions on the candidates of either, by the logit of a match alone. Of VQAv2,
            `paper` leaves out the questions to which no annotator gave an answer of the vocabulary.
        max_captions: Captions of each image that are queries; None takes all.
        fold_size: Number of images that are ranked together with their captions; 1000 on COCO 1k. Recalls are means
            over the folds. None ranks the whole set.
        batch_size: Items, pairs or examples at once.
    """

    candidates: int = 128
    protocol: Protocol = "standard"
    max_captions: int | None = None
    fold_size: int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_numbers(
            self,
            candidates=AT_LEAST_0,
            max_captions=AT_LEAST_1,
            fold_size=AT_LEAST_1,
            batch_size=AT_LEAST_1,
        )
        check_choice("protocol", self.protocol, Protocol)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of an evaluation that do not change its result."""

    # Folder in which retrieval keeps scores until it is finished, from which a killed run continues.
    work: Path | None = None
    # The scores are removed when this stack is closed. None: they are removed at the end of the evaluation.
    until_written: ExitStack | None = None
    num_workers: int = 0  # processes that decode; 0 decodes in this one
    progress: bool = False


DEFAULTS = EvaluationOptions()


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """An example whose answer is known, and what the model made of it."""

    id: str
    images: tuple[int, ...]  # their numbers among those of the set
    text: str  # that the model read; empty if none
    target: str  # the right answer, in words
    prediction: str  # the model's
    score: float  # from 0, wrong, to 1, right
    error: float  # the worst misses have the largest values
    probability: float | None  # that the model gives to its answer
    predicted_image: int | None = None  # its number, where an image is looked for
    # Kinds of the example, by column.
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of an evaluation."""

    metrics: Mapping[str, float]  # empty where the answers are not known
    counts: Mapping[str, int]  # of what was judged
    details: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # metrics by group
    predictions: Sequence[Mapping[str, Any]] = ()  # one row per example, with its id
    submission: tuple[str, str] | None = None  # name and content of the file for a test server
    notes: Sequence[str] = ()  # what cannot be given, and why
    judge: Callable[[], list[Judgement]] | None = None  # gives the examples whose answers are known
    images: PreparedImages | None = None  # that the judgements name

    def report(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content of `metrics.json`: what was measured and how, versions, counts, metrics."""
        versions = {name: version(name) for name in ("bridgetower", "torch")}
        versions["python"] = platform.python_version()
        report = {**settings, **self.counts, **self.metrics, **self.details}
        if self.notes:
            report["notes"] = list(self.notes)
        return {**report, "versions": versions}

    def write(self, folder: Path, settings: Mapping[str, Any]) -> None:
        if self.predictions:
            lines = (json_text(row) + "\n" for row in self.predictions)
            write_text(folder / "predictions.jsonl", "".join(lines))
        if self.submission is not None:
            name, content = self.submission
            write_text(folder / name, content)
        write_json(folder / "metrics.json", self.report(settings))
