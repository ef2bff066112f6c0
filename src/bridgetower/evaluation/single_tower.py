"""The paper's uni-modal checks as benchmarks: CIFAR on the image tower alone, GLUE on the text tower alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bridgetower.data.cifar import CifarImages, NumClasses
from bridgetower.data.config import GlueName
from bridgetower.data.glue import GLUE
from bridgetower.data.glue_texts import GlueTexts
from bridgetower.evaluation.class_metrics import accuracy
from bridgetower.evaluation.figures import glue_figures
from bridgetower.evaluation.outcome import Outcome, glue_submission
from bridgetower.evaluation.predictions import predict_classes, predict_numbers
from bridgetower.objectives.single_tower import ImageTask, TextTask
from bridgetower.predictor import Predictor


def evaluate_cifar(
    predictor: Predictor, num_classes: NumClasses, folder: str | Path, split: str, options: dict[str, Any]
) -> Outcome:
    """Measures the accuracy on CIFAR.

    Args:
        predictor: The model with its preprocessing.
        num_classes: 10, or 100.
        folder: Of the binary files.
        split: Which split.
        options: Of `predict_classes`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: There is no such split, or the model has no such head, or one of another number of classes.
    """
    names = predictor.class_names("image")
    if len(names) != num_classes:
        raise ValueError(f"the image head has {len(names)} classes; expected {num_classes} for cifar{num_classes}")
    images = CifarImages(folder, split, predictor.processor, num_classes)
    predictions = predict_classes(ImageTask(predictor.model), images, **options)
    rows = [
        {"id": name, "label": names[number], "probability": probability}
        for name, number, probability in zip(
            images.ids(), predictions.classes.tolist(), predictions.probabilities.tolist(), strict=True
        )
    ]
    figures = {"accuracy": accuracy(predictions.classes, images.labels())}
    return Outcome(figures=figures, counts={"num_images": len(images)}, predictions=rows)


def evaluate_glue(
    predictor: Predictor,
    name: GlueName,
    folder: str | Path,
    split: str,
    options: dict[str, Any],
    *,
    max_errors: int = 0,
) -> Outcome:
    """Measures what GLUE reports of a task; a test split gives the file that its server takes.

    Args:
        predictor: The model with its preprocessing.
        name: Of the task.
        folder: Of its TSV files.
        split: Which split.
        options: Of `predict_classes`.
        max_errors: Bad rows that may be left out; none of a test split, of which the server wants every row.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: There is no such split, too many rows are bad, or the model has no such head, or one of other
            classes.
    """
    task = TextTask(predictor.model)
    texts = GlueTexts(folder, name, split, predictor.processor, max_errors=max_errors)
    _check_head(predictor, texts.task.classes, name)
    predicted, classes = predict_texts(task, texts, **options), texts.task.classes
    labels = [f"{number:.3f}" if task.regresses else classes[number] for number in predicted.tolist()]
    return Outcome(
        figures=_figures(name, texts, predicted),
        counts={"num_texts": len(texts)},
        predictions=[{"index": row.index, "label": label} for row, label in zip(texts.rows, labels, strict=True)],
        submission=glue_submission(GLUE[name].submission[split], labels) if split.startswith("test") else None,
    )


def predict_texts(task: TextTask, texts: GlueTexts, **options: Any) -> Tensor:
    """Returns the class of every text, or its number where the head predicts one [n]; options of `predict_classes`."""
    if task.regresses:
        return predict_numbers(task, texts, **options)
    return predict_classes(task, texts, **options).classes


def _figures(name: GlueName, texts: GlueTexts, predicted: Tensor) -> dict[str, float]:
    return glue_figures(name, predicted, texts.labels()) if all(row.label for row in texts.rows) else {}


def _check_head(predictor: Predictor, classes: Sequence[str], name: GlueName) -> None:
    predictor.model.head("text")
    has = predictor.model.config.heads.text
    found = () if has == 1 else predictor.class_names("text")
    if tuple(found) != tuple(classes):
        raise ValueError(
            f"the text head tells {', '.join(found) or 'a number'}; {name} needs {', '.join(classes) or 'a number'}"
        )
