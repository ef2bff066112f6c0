"""Statements about one image (SNLI-VE) and about two (NLVR2)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bridgetower.data.schema import NLVR2 as IMAGE_PAIRS
from bridgetower.data.schema import SNLI_VE as SINGLE_IMAGES
from bridgetower.data.schema import Schema, nlvr2_sentence
from bridgetower.evaluation.outcome import Outcome, counts
from bridgetower.model.config import HeadsConfig
from bridgetower.objectives.config import NotAnOption, TaskConfig
from bridgetower.tasks.recipes import BASE_AT_384, COLOUR_VIEWS, PAPER_OPTIMIZER
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec

if TYPE_CHECKING:
    from bridgetower.data.examples import EntryDataset
    from bridgetower.evaluation.predictions import Predictions


@dataclass(frozen=True, kw_only=True)
class SnliVeConfig(TaskConfig):
    """Does an image contradict a statement, leave it open, or entail it?

    Attributes:
        kind: Name of the task in a saved run; no option of the command.
    """

    metrics = ("accuracy",)

    kind: NotAnOption = "snli-ve"


@dataclass(frozen=True, kw_only=True)
class Nlvr2Config(TaskConfig):
    """Is a statement about two images true?

    Attributes:
        kind: Name of the task in a saved run; no option of the command.
    """

    metrics = ("accuracy",)

    kind: NotAnOption = "nlvr2"


def statements(source: ExampleSource, schema: Schema) -> EntryDataset:
    """Opens statements with their images."""
    from bridgetower.data.examples import ClassEncoder, EntryDataset

    return EntryDataset(
        source.images(schema),
        ClassEncoder(schema.labels),
        labelled=source.use != "test",
        unique=source.use == "test",
    )


def _evaluate(evaluation: Evaluation) -> Outcome:
    examples, predictions = evaluation.examples, evaluation.predictions()
    entries, is_nlvr2 = list(examples), examples.schema is IMAGE_PAIRS
    labels = [evaluation.names[number] for number in predictions.classes.tolist()]
    rows = [
        {"statement_id": entry["statement_id"], "label": label, "probability": probability}
        for entry, label, probability in zip(entries, labels, predictions.probabilities.tolist(), strict=True)
    ]
    num_labelled = sum(bool(entry["label"]) for entry in entries)
    by_id = dict(zip([entry["statement_id"] for entry in entries], labels, strict=True))
    unknown = [name for name in by_id if is_nlvr2 and nlvr2_sentence(name) is None]
    return Outcome(
        metrics=statement_metrics(examples, predictions) if num_labelled else {},
        counts=counts("num_statements", len(entries), "num_labelled", num_labelled),
        predictions=rows,
        submission=nlvr2_submission(by_id) if is_nlvr2 and not unknown else None,
        notes=[_without_sentences(unknown, len(by_id))] if unknown else (),
        judge=lambda: evaluation.judged(
            list(zip(labels, predictions.probabilities.tolist(), strict=True)),
            expected=lambda entry: str(entry["label"]),
            score=lambda entry, label: float(label == entry["label"]),
        ),
    )


def statement_metrics(examples: EntryDataset, predictions: Predictions) -> dict[str, float]:
    """Returns `accuracy` and, with NLVR2's own identifiers, `consistency` of the labelled statements."""
    import torch

    from bridgetower.evaluation.class_metrics import accuracy, consistency

    labelled: Mapping[int, Any] = {number: entry for number, entry in enumerate(examples) if entry["label"]}
    labels = torch.tensor([int(examples.encode.tensor(entry)) for entry in labelled.values()])
    predicted = predictions.classes[list(labelled)]
    metrics = {"accuracy": accuracy(predicted, labels)}
    if examples.schema is IMAGE_PAIRS:
        groups = [nlvr2_sentence(entry["statement_id"]) for entry in labelled.values()]
        known = [group for group in groups if group is not None]
        if len(known) == len(groups):
            metrics["consistency"] = consistency(predicted, labels, known)
    return metrics


def nlvr2_submission(labels: Mapping[str, str]) -> tuple[str, str]:
    """Returns the file that NLVR2's evaluation takes: CSV lines of identifier and prediction, without header."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(labels.items())
    return "submission.csv", stream.getvalue()


def _without_sentences(unknown: Sequence[str], total: int) -> str:
    return (
        f"no consistency and no submission: {len(unknown)} of {total} statements, such as {unknown[0]!r}, have no "
        "identifier of NLVR2, which contains the sentence; prepare the set from NLVR2's JSON files"
    )


SNLI_VE_BASE = RunConfig(
    recipe="snli-ve",
    source="paper, appendix, and official script for SNLI-VE; give a pre-trained init",
    task=SnliVeConfig(),
    model=replace(BASE_AT_384, heads=HeadsConfig(mlm=False, itm=False, snli_ve=True, hidden_scale=2.0)),
    image_size=384,
    optimizer=replace(PAPER_OPTIMIZER, lr=3e-6, warmup=0.06, head_multiplier=10),
    data=COLOUR_VIEWS,
    batch_size=64,
    micro_batch_size=32,
    max_epochs=5,
    precision="bf16",
    evaluate_every=4_000,
    select_by="accuracy",
)

NLVR2_BASE = RunConfig(
    recipe="nlvr2",
    source="paper, appendix, and official script for NLVR2; give a pre-trained init",
    task=Nlvr2Config(),
    model=replace(
        BASE_AT_384,
        fusion=replace(BASE_AT_384.fusion, num_token_types=3),
        heads=HeadsConfig(mlm=False, itm=False, nlvr2=True, hidden_scale=1.5),
    ),
    image_size=384,
    optimizer=replace(PAPER_OPTIMIZER, lr=5e-6, weight_decay=0.008, head_multiplier=10),
    data=COLOUR_VIEWS,
    batch_size=64,
    micro_batch_size=16,
    max_epochs=10,
    precision="bf16",
    evaluate_every=1_000,
    select_by="accuracy",
)

SNLI_VE = TaskSpec(
    name="snli-ve",
    config=SnliVeConfig,
    schema=SINGLE_IMAGES,
    head="snli_ve",
    examples=partial(statements, schema=SINGLE_IMAGES),
    evaluate=_evaluate,
    fine_tuning=(SNLI_VE_BASE,),
    benchmarks={"snli-ve": SnliVeConfig()},
)

NLVR2 = TaskSpec(
    name="nlvr2",
    config=Nlvr2Config,
    schema=IMAGE_PAIRS,
    head="nlvr2",
    examples=partial(statements, schema=IMAGE_PAIRS),
    evaluate=_evaluate,
    fine_tuning=(NLVR2_BASE,),
    benchmarks={"nlvr2": Nlvr2Config()},
)
