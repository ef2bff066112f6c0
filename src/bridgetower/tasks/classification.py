"""Classification of a user's own table: one label or several per row, from image and text, either may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
    from bridgetower.data.examples import EntryDataset


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TaskConfig):
    """Classes of a user's own images and texts.

    Attributes:
        kind: Name of the task in a saved run; no option of the command.
    """

    metrics = ("accuracy", "macro_f1", "auroc", "average_precision")

    kind: NotAnOption = "classification"


def _class_names(data: DataConfig, config: ClassificationConfig) -> Sequence[str]:
    if not data.folders:
        raise ValueError("no data folder given; pass --data.folders DIR, made by `bridgetower prepare classification`")
    return read_classes(data.folders[0]).names


def _examples(source: ExampleSource) -> EntryDataset:
    """Opens examples; to train on or validate, each must have a label that the head has."""
    from bridgetower.data.examples import EntryDataset, LabelsEncoder

    multi_label = source.heads.multi_label
    for folder in source.data.folders:
        if read_classes(folder).multi_label != multi_label:
            raise ValueError(
                f"{folder} has {'one label' if multi_label else 'several labels'} per row, but "
                f"model.heads.multi_label is {multi_label}; set it to {not multi_label} for a new head, or choose "
                "another set"
            )
    labels = LabelsEncoder(source.names, multi_label=multi_label)
    examples = EntryDataset(source.images(SCHEMA), labels, labelled=source.use != "test", unique=source.use == "test")
    for entry in examples:
        labels.numbers(entry)
    return examples


def _evaluate(evaluation: Evaluation) -> Outcome:
    """Predicts the classes of all examples; measures those that have labels."""
    import torch

    from bridgetower.evaluation.class_metrics import classification_metrics

    names, probabilities = evaluation.names, evaluation.outputs()
    entries, labels = list(evaluation.examples), evaluation.examples.encode
    if labels.multi_label:
        predicted = [(row > 0.5).nonzero()[:, 0].tolist() for row in probabilities]
    else:
        predicted = [[number] for number in probabilities.argmax(dim=1).tolist()]
    rows = [
        {
            "id": entry["example_id"],
            "labels": [names[number] for number in numbers],
            "probabilities": dict(zip(names, values, strict=True)),
        }
        for entry, numbers, values in zip(entries, predicted, probabilities.tolist(), strict=True)
    ]
    known = [row for row, entry in enumerate(entries) if labels.known(entry)]
    marks = torch.zeros(len(known), len(names), dtype=torch.bool)
    for place, row in enumerate(known):
        marks[place, labels.numbers(entries[row])] = True
    return Outcome(
        metrics=classification_metrics(probabilities[known], marks, multi_label=labels.multi_label) if known else {},
        counts=counts("num_examples", len(entries), "num_labelled", len(known)),
        predictions=rows,
    )


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

CLASSIFICATION = TaskSpec(
    name="classification",
    config=ClassificationConfig,
    schema=SCHEMA,
    head="classification",
    examples=_examples,
    evaluate=_evaluate,
    class_names=_class_names,
    fine_tuning=(RECIPE,),
    benchmarks={"classification": ClassificationConfig()},
)
