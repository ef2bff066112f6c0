"""A custom table: one label, several or a number per row, from image and text, either of which may be missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bridgetower.data.config import DataConfig
from bridgetower.data.own import read_classes
from bridgetower.data.schema import CLASSIFICATION as SCHEMA
from bridgetower.evaluation.outcome import Outcome, counts
from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE
from bridgetower.objectives.config import NotAnOption, TaskConfig
from bridgetower.tasks.recipes import COLOUR_VIEWS, PAPER_OPTIMIZER
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec

if TYPE_CHECKING:
    from torch import Tensor

    from bridgetower.data.examples import EntryDataset, LabelsEncoder, NumberEncoder
    from bridgetower.evaluation.outcome import Judgement


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TaskConfig):
    """Classes of custom images and texts.

    Attributes:
        kind: Name of the task in a saved run; no option of the command.
    """

    metrics = ("accuracy", "macro_f1", "auroc", "average_precision")

    kind: NotAnOption = "classification"


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(TaskConfig):
    """Numbers for custom images and texts.

    Attributes:
        kind: Name of the task in a saved run; no option of the command.
    """

    metrics = ("pearson_correlation", "spearman_correlation")

    kind: NotAnOption = "regression"


def _class_names(data: DataConfig, config: ClassificationConfig) -> Sequence[str]:
    if not data.folders:
        raise ValueError("no data folder given; pass --data.folders DIR, made by `bridgetower prepare classification`")
    return read_classes(data.folders[0]).names


def _labelled(source: ExampleSource) -> EntryDataset:
    from bridgetower.data.examples import LabelsEncoder

    multi_label = source.heads.multi_label
    for folder in source.data.folders:
        classes = read_classes(folder)
        if classes.numbers or classes.multi_label != multi_label:
            kind = "a number" if classes.numbers else "one label" if multi_label else "several labels"
            raise ValueError(
                f"{folder} has {kind} per row, but model.heads.multi_label is {multi_label}; "
                + ("choose the task regression" if classes.numbers else f"set it to {not multi_label} for a new head")
                + ", or choose another set"
            )
    return _opened(source, LabelsEncoder(source.names, multi_label=multi_label))


def _numbered(source: ExampleSource) -> EntryDataset:
    from bridgetower.data.examples import NumberEncoder

    if not source.heads.predicts_number("classification"):
        raise ValueError(
            f"the classification head has {source.heads.classification} classes; regression takes a model whose head "
            "has one output: model.heads.classification 1, without model.heads.multi_label"
        )
    for folder in source.data.folders:
        if not read_classes(folder).numbers:
            raise ValueError(f"{folder} has classes; regression takes sets of `bridgetower prepare regression`")
    return _opened(source, NumberEncoder())


def _opened(source: ExampleSource, encoder: LabelsEncoder | NumberEncoder) -> EntryDataset:
    from bridgetower.data.examples import EntryDataset

    test = source.use == "test"
    examples = EntryDataset(source.images(SCHEMA), encoder, labelled=not test, unique=test)
    for entry in examples:
        if encoder.known(entry):
            examples.label(entry)
    return examples


Measure = Callable[[Evaluation, "Tensor", list[int], list["Tensor"]], tuple[list[dict[str, Any]], dict[str, float]]]
"""The predictions of all examples, and the metrics of those with labels."""


def _evaluate(evaluation: Evaluation, measure: Measure) -> Outcome:
    entries, examples = list(evaluation.examples), evaluation.examples
    known = [row for row, entry in enumerate(entries) if examples.encode.known(entry)]
    labels = [examples.label(entries[row]) for row in known]
    predictions, metrics = measure(evaluation, evaluation.outputs(), known, labels)
    return Outcome(
        metrics=metrics,
        counts=counts("num_examples", len(entries), "num_labelled", len(known)),
        predictions=[{"id": entry["example_id"], **row} for entry, row in zip(entries, predictions, strict=True)],
        judge=None if "number" in predictions[0] else lambda: _judged(evaluation, predictions),
    )


def _judged(evaluation: Evaluation, predictions: list[dict[str, Any]]) -> list[Judgement]:
    """Returns the labelled examples; of several labels, the probability is that of the least certain one."""
    several = evaluation.model.config.heads.multi_label

    def certainty(row: dict[str, Any]) -> float:
        values = row["probabilities"].values()
        return min(max(value, 1 - value) for value in values) if several else max(values)

    return evaluation.judged(
        [(_joined(row["labels"]), certainty(row)) for row in predictions],
        expected=lambda entry: _joined(entry["labels"]),
        score=lambda entry, given: float(_joined(entry["labels"]) == given),
    )


def _joined(labels: Sequence[str]) -> str:
    return ", ".join(sorted(labels)) or "none"


def _numbers(
    evaluation: Evaluation, outputs: Tensor, known: list[int], labels: list[Tensor]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    import torch

    from bridgetower.evaluation.class_metrics import number_metrics

    numbers = outputs[:, 0]
    metrics = number_metrics(numbers[known], torch.stack(labels)) if known else {}
    return [{"number": number} for number in numbers.tolist()], metrics


def _classes(
    evaluation: Evaluation, outputs: Tensor, known: list[int], labels: list[Tensor]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    from torch.nn.functional import one_hot

    from bridgetower.evaluation.class_metrics import classification_metrics

    names, several = evaluation.names, evaluation.model.config.heads.multi_label
    predicted = outputs > 0.5 if several else one_hot(outputs.argmax(dim=1), len(names)).bool()
    rows = [
        {
            "labels": [name for name, holds in zip(names, marks, strict=True) if holds],
            "probabilities": dict(zip(names, values, strict=True)),
        }
        for marks, values in zip(predicted.tolist(), outputs.tolist(), strict=True)
    ]
    if not known:
        return rows, {}
    return rows, classification_metrics(outputs[known], _marks(evaluation, labels), multi_label=several)


def _marks(evaluation: Evaluation, labels: list[Tensor]) -> Tensor:
    import torch
    from torch.nn.functional import one_hot

    stacked = torch.stack(labels)
    return (stacked if evaluation.model.config.heads.multi_label else one_hot(stacked, len(evaluation.names))).bool()


def _unavailable(evaluation: Evaluation, metric: str) -> str | None:
    from bridgetower.evaluation.class_metrics import ranked_classes

    if metric not in ("auroc", "average_precision"):
        return None
    labels = _marks(evaluation, [evaluation.examples.label(entry) for entry in evaluation.examples])
    if ranked_classes(labels, multi_label=evaluation.model.config.heads.multi_label):
        return None
    return f"every class is that of all examples or of none in {' and '.join(evaluation.splits)}"


RECIPE = RunConfig(
    recipe="classification",
    source="this project, after the paper's SNLI-VE: for sets of `bridgetower prepare classification`; give a "
    "pre-trained init, and set model.heads.classification to the number of classes",
    task=ClassificationConfig(),
    model=replace(BASE, heads=HeadsConfig(mlm=False, itm=False, classification=2)),
    optimizer=replace(PAPER_OPTIMIZER, lr=1e-5, warmup=0.06, head_multiplier=10),
    data=replace(COLOUR_VIEWS, flip=False),  # texts in images, such as in memes, are not to be mirrored
    batch_size=64,
    micro_batch_size=32,
    max_epochs=5,
    precision="bf16",
    evaluate_every=500,
    select_by="accuracy",
)

NUMBERS_RECIPE = replace(
    RECIPE,
    recipe="regression",
    source="this project, as the recipe classification: for sets of `bridgetower prepare regression`; give a "
    "pre-trained init",
    task=RegressionConfig(),
    model=replace(BASE, heads=HeadsConfig(mlm=False, itm=False, classification=1)),
    select_by="pearson_correlation",
)

CLASSIFICATION = TaskSpec(
    name="classification",
    config=ClassificationConfig,
    schema=SCHEMA,
    head="classification",
    examples=_labelled,
    evaluate=partial(_evaluate, measure=_classes),
    class_names=_class_names,
    unavailable=_unavailable,
    fine_tuning=(RECIPE,),
    benchmarks={"classification": ClassificationConfig()},
)

REGRESSION = replace(
    CLASSIFICATION,
    name="regression",
    config=RegressionConfig,
    examples=_numbered,
    evaluate=partial(_evaluate, measure=_numbers),
    fine_tuning=(NUMBERS_RECIPE,),
    benchmarks={"regression": RegressionConfig()},
)
