"""Predictions for a whole set, and metrics of classes, numbers and answers to questions: pure functions on arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from bridgetower.data.answers import FEW_ANNOTATORS, normalise_answer
from bridgetower.data.batch import BatchDataset, BatchKey
from bridgetower.distributed import gather_by_id, rank, world_size
from bridgetower.evaluation.config import DEFAULTS, EvaluationOptions
from bridgetower.processor import load_items
from bridgetower.progress import counted


class Predictions(NamedTuple):
    """The likeliest class of every example, in order, and the probability that the task gives it."""

    classes: Int[Tensor, " n"]
    probabilities: Float[Tensor, " n"]


def predict_classes(
    task: nn.Module, examples: BatchDataset, *, batch_size: int, options: EvaluationOptions = DEFAULTS
) -> Predictions:
    found = predict(task, examples, lambda out: out.max(dim=1)[::-1], batch_size=batch_size, options=options)
    return Predictions(*found)


@torch.inference_mode()
def predict(
    task: nn.Module,
    examples: BatchDataset,
    read: Callable[[Tensor], tuple[Tensor, ...]],
    *,
    batch_size: int,
    options: EvaluationOptions = DEFAULTS,
) -> tuple[Tensor, ...]:
    """Predicts every example; each process predicts its share and gets all."""
    own = range(rank() % len(examples), len(examples), world_size())  # of fewer examples than processes, one twice
    keys = [BatchKey(tuple(own[start : start + batch_size]), 0) for start in range(0, len(own), batch_size)]
    device = next(task.parameters()).device
    loader: Iterable[Any] = load_items(examples.__getitem__, keys, num_workers=options.num_workers, device=device)
    loader = counted(loader, "predicting batches", shown=options.progress and rank() == 0, total=len(keys))
    parts = [tuple(part.cpu() for part in read(task.predict(batch.to(device)))) for batch in loader]  # type: ignore[operator]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return gather_by_id(torch.tensor(own), *columns)[1:]


def pearson_correlation(predicted: Float[Tensor, " n"], labels: Float[Tensor, " n"]) -> float:
    first, second = (values.double() - values.double().mean() for values in (predicted, labels))
    spread = first.norm() * second.norm()
    return (first @ second / spread).item() if spread > 0 else 0.0


def spearman_correlation(predicted: Float[Tensor, " n"], labels: Float[Tensor, " n"]) -> float:
    """Returns the correlation of the ranks, tied values sharing their mean rank."""

    def ranks(values: Tensor) -> Tensor:
        _, places, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2).double()[places]

    return pearson_correlation(ranks(predicted), ranks(labels))


def number_metrics(predicted: Float[Tensor, " n"], labels: Float[Tensor, " n"]) -> dict[str, float]:
    return {
        "pearson_correlation": pearson_correlation(predicted, labels),
        "spearman_correlation": spearman_correlation(predicted, labels),
        "mean_absolute_error": (predicted.double() - labels.double()).abs().mean().item(),
    }


def classification_metrics(
    probabilities: Float[Tensor, "n k"], labels: Bool[Tensor, "n k"], *, multi_label: bool
) -> dict[str, float]:
    """Returns `accuracy`, of more than five classes `top5_accuracy`, `macro_f1`, `auroc` and `average_precision`.

    With several labels per row, a class is predicted above one half, and a row is right if all its classes are. Of two
    exclusive classes, AUROC and average precision are those of the second one; else they are means over the classes,
    each against the rest. Classes that no row or every row has have neither; where none is left, both are left out.
    F1 is the mean over the classes that some row has or is predicted to have.
    """
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    num_classes = labels.shape[1]
    predicted = probabilities > 0.5 if multi_label else one_hot(probabilities.argmax(dim=1), num_classes).bool()
    seen = [number for number in range(num_classes) if (predicted | labels)[:, number].any()]
    f1 = [float(f1_score(labels[:, number], predicted[:, number], zero_division=0)) for number in seen]
    metrics = {
        "accuracy": (predicted == labels).all(dim=1).double().mean().item(),
        "macro_f1": sum(f1) / max(1, len(f1)),
    }
    both = ranked_classes(labels, multi_label=multi_label)
    if num_classes > 5 and not multi_label:
        best = probabilities.topk(5).indices
        metrics["top5_accuracy"] = labels.gather(1, best).any(dim=1).double().mean().item()
    ranked = {"auroc": roc_auc_score, "average_precision": average_precision_score}
    for name, metric in ranked.items() if both else ():
        metrics[name] = float(metric(labels[:, both].numpy(), probabilities[:, both].numpy(), average="macro"))
    return metrics


def ranked_classes(labels: Bool[Tensor, "n k"], *, multi_label: bool) -> list[int]:
    """Returns the classes of which AUROC and average precision are the mean, see `classification_metrics`."""
    num_classes = labels.shape[1]
    classes = [1] if num_classes == 2 and not multi_label else range(num_classes)
    return [number for number in classes if labels[:, number].any() and not labels[:, number].all()]


def vqa_scores(
    predictions: Sequence[str], questions: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns `vqa_score` and that of each type of answer, and those `by_answer_type` and `by_question_type`.

    They are from 0 to 1, to four decimals: the two that the official evaluation gives in percent (GT-Vision-Lab/VQA,
    `vqaEval.py`).
    """

    def mean(some: Sequence[float]) -> float:
        return round(sum(some) / len(some), 4)

    scores = [vqa_score(given, question["answers"]) for given, question in zip(predictions, questions, strict=True)]
    by_type: dict[str, dict[str, float]] = {}
    for column in ("answer_type", "question_type"):
        groups: dict[str, list[float]] = defaultdict(list)
        for score, question in zip(scores, questions, strict=True):
            groups[question.get(column, "")].append(score)
        by_type[f"by_{column}"] = {name: mean(groups[name]) for name in sorted(groups) if name}
    named = {f"vqa_score_{name.replace('/', '_')}": score for name, score in by_type["by_answer_type"].items()}
    return {"vqa_score": mean(scores), **named}, {name: groups for name, groups in by_type.items() if groups}


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Returns the score of one prediction, from 0 to 1.

    It is the mean, over all ways to leave one annotator out, of min(n / 3, 1), n others having given the prediction.
    Where annotators differ, answers and prediction are compared in their normal form; where all are the same, as they
    are. Fewer than four annotators could never give 1 in this way: with them it is the share, in normal form, that gave
    the prediction; with one, whether it is right.
    """
    if not answers:
        raise ValueError("a question has no answers; expected those of the annotators")
    predicted, *given = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    few = len(given) < FEW_ANNOTATORS
    if few or len(set(given)) > 1:
        given, predicted = [normalise_answer(answer) for answer in given], normalise_answer(predicted)
    same = given.count(predicted)
    if few:
        return same / len(given)
    others = [same - 1] * same + [same] * (len(given) - same)
    return sum(min(count / 3, 1.0) for count in others) / len(given)
