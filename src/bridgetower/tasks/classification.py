"""A custom table: one label, several or a number per row, from image and text, either of which may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bridgetower.data.own import read_classes
from bridgetower.data.schema import CLASSIFICATION as SCHEMA
from bridgetower.evaluation.outcome import Outcome
from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE
from bridgetower.objectives.config import NotAnOption, TaskConfig
from bridgetower.tasks.run_config import COLOUR_VIEWS, PAPER_OPTIMIZER, RunConfig
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec, first_folder

if TYPE_CHECKING:
    from torch import Tensor

    from bridgetower.data.examples import EntryDataset


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TaskConfig):
    metrics = ("accuracy", "macro_f1", "auroc", "average_precision")

    kind: NotAnOption = "classification"


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(TaskConfig):
    metrics = ("pearson_correlation", "spearman_correlation")

    kind: NotAnOption = "regression"


def _examples(source: ExampleSource) -> EntryDataset:
    from bridgetower.data.examples import ClassEncoder, EntryDataset, NumberEncoder

    heads, numbers = source.heads, source.task.kind == "regression"
    if numbers and not heads.predicts_number("classification"):
        raise ValueError(
            f"the classification head has {heads.classification} classes; regression takes a model whose head "
            "has one output: model.heads.classification 1, without model.heads.multi_label"
        )
    for folder in source.data.folders:
        classes = read_classes(folder)
        if numbers and not classes.numbers:
            raise ValueError(f"{folder} has classes; regression takes sets of `bridgetower prepare regression`")
        if not numbers and (classes.numbers or classes.multi_label != heads.multi_label):
            kind = "a number" if classes.numbers else "one label" if heads.multi_label else "several labels"
            other = f"set it to {not heads.multi_label} for a new head"
            other = "choose the task regression" if classes.numbers else other
            raise ValueError(
                f"{folder} has {kind} per row, but model.heads.multi_label is {heads.multi_label}; {other}, or choose "
                "another set"
            )
    encoder = NumberEncoder() if numbers else ClassEncoder(source.names, multi_label=heads.multi_label)
    test = source.use == "test"
    examples = EntryDataset(source.images(SCHEMA), encoder, labelled=not test, unique=test)
    for entry in examples:
        if encoder.known(entry):
            examples.label(entry)
    return examples


def _known(evaluation: Evaluation) -> tuple[list[int], list[Tensor]]:
    examples = evaluation.examples
    known = {row: examples.label(entry) for row, entry in enumerate(examples) if examples.encode.known(entry)}
    return list(known), list(known.values())


def _evaluate_numbers(evaluation: Evaluation) -> Outcome:
    import torch

    from bridgetower.evaluation.class_metrics import number_metrics

    numbers, (rows, labels) = evaluation.outputs[:, 0], _known(evaluation)
    return evaluation.outcome(
        [{"number": number} for number in numbers.tolist()],
        id_name="id",
        metrics=number_metrics(numbers[rows], torch.stack(labels)) if rows else {},
    )


def _evaluate_classes(evaluation: Evaluation) -> Outcome:
    """Measures classes; of several labels, the probability of an answer is that of the least certain one."""
    from torch.nn.functional import one_hot

    from bridgetower.evaluation.class_metrics import classification_metrics

    outputs, names, several = evaluation.outputs, evaluation.names, evaluation.model.config.heads.multi_label
    predicted = outputs > 0.5 if several else one_hot(outputs.argmax(dim=1), len(names)).bool()
    labels = [[name for name, holds in zip(names, row, strict=True) if holds] for row in predicted.tolist()]
    certainty = outputs.maximum(1 - outputs).amin(dim=1) if several else outputs.amax(dim=1)
    rows, known = _known(evaluation)
    return evaluation.outcome(
        [
            {"labels": given, "probabilities": dict(zip(names, values, strict=True))}
            for given, values in zip(labels, outputs.tolist(), strict=True)
        ],
        list(zip(map(_joined, labels), certainty.tolist(), strict=True)),
        id_name="id",
        expected=lambda entry: _joined(entry["labels"]),
        score=lambda entry, given: float(_joined(entry["labels"]) == given),
        metrics=classification_metrics(outputs[rows], _marks(evaluation, known), multi_label=several) if rows else {},
    )


def _joined(labels: Sequence[str]) -> str:
    return ", ".join(sorted(labels)) or "none"


def _marks(evaluation: Evaluation, labels: list[Tensor]) -> Tensor:
    import torch
    from torch.nn.functional import one_hot

    stacked = torch.stack(labels)
    return (stacked if evaluation.model.config.heads.multi_label else one_hot(stacked, len(evaluation.names))).bool()


def _unavailable(evaluation: Evaluation, metric: str) -> str | None:
    from bridgetower.evaluation.class_metrics import ranked_classes

    if metric not in ("auroc", "average_precision"):
        return None
    labels = _marks(evaluation, _known(evaluation)[1])
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
    examples=_examples,
    evaluate=_evaluate_classes,
    class_names=lambda data, config: read_classes(first_folder(data)).names,
    unavailable=_unavailable,
    fine_tuning=(RECIPE,),
    benchmarks={"classification": ClassificationConfig()},
)

REGRESSION = replace(
    CLASSIFICATION,
    name="regression",
    config=RegressionConfig,
    evaluate=_evaluate_numbers,
    fine_tuning=(NUMBERS_RECIPE,),
    benchmarks={"regression": RegressionConfig()},
)
