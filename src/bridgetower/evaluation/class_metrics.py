"""Predictions for a whole set, and metrics of classes, numbers and answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from bridgetower.data.batches.batch import BatchDataset, BatchKey
from bridgetower.data.sets.answers import FEW_ANNOTATORS, normalise_answer
from bridgetower.distributed import gather_by_id, rank, world_size
from bridgetower.evaluation.config import DEFAULTS, EvaluationOptions
from bridgetower.processor import load_items
from bridgetower.progress import counted


class Predictions(NamedTuple):
    """The likeliest class of every example, in order, and the probability that the task gives it."""

    classes: Int[Tensor, " n"]
    probabilities: Float[Tensor, " n"]


def predict_classes(
    task: nn.Module,
    examples: BatchDataset,
    *,
    batch_size: int,
    options: EvaluationOptions = DEFAULTS,
) -> Predictions:
    def likeliest(outputs: Tensor) -> tuple[Tensor, Tensor]:
        probabilities, classes = outputs.max(dim=1)
        return classes, probabilities

    outputs = predict_examples(task, examples, likeliest, batch_size=batch_size, options=options)
    return Predictions(*outputs)


@torch.inference_mode()
def predict_examples(
    task: nn.Module,
    examples: BatchDataset,
    read: Callable[[Tensor], tuple[Tensor, ...]],
    *,
    batch_size: int,
    options: EvaluationOptions = DEFAULTS,
) -> tuple[Tensor, ...]:
    """Predicts every example. Each process predicts its share and gets all.

    Args:
        read: Turns the outputs of a batch into tensors, with a row for each example.
    """
    first = rank() % len(examples)  # with fewer examples than processes, some are predicted twice
    local_indices = range(first, len(examples), world_size())
    keys = []
    for start in range(0, len(local_indices), batch_size):
        indices = local_indices[start : start + batch_size]
        keys.append(BatchKey(tuple(indices), 0))
    device = next(task.parameters()).device
    batches: Iterable[Any] = load_items(
        examples.__getitem__, keys, num_workers=options.num_workers, device=device
    )
    has_bar = options.progress and rank() == 0
    batches = counted(batches, "predicting batches", enabled=has_bar, total=len(keys))

    results = []
    for batch in batches:
        outputs = task.predict(batch.to(device))  # type: ignore[operator]
        results.append([values.cpu() for values in read(outputs)])
    columns = [torch.cat(values) for values in zip(*results, strict=True)]
    _, *gathered = gather_by_id(torch.tensor(local_indices), *columns)
    return tuple(gathered)


def pearson_correlation(predicted: Float[Tensor, " n"], labels: Float[Tensor, " n"]) -> float:
    predicted = predicted.double() - predicted.double().mean()
    labels = labels.double() - labels.double().mean()
    spread = predicted.norm() * labels.norm()
    if spread == 0:
        return 0.0
    return (predicted @ labels / spread).item()


def spearman_correlation(predicted: Float[Tensor, " n"], labels: Float[Tensor, " n"]) -> float:
    """Returns the correlation of the ranks. Tied values share their mean rank."""
    return pearson_correlation(_mean_ranks(predicted), _mean_ranks(labels))


def _mean_ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    _, indices, counts = values.unique(return_inverse=True, return_counts=True)
    last_ranks = counts.cumsum(0)
    mean_ranks = last_ranks - (counts - 1) / 2
    return mean_ranks.double()[indices]


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
    if multi_label:
        predicted = probabilities > 0.5
    else:
        predicted = one_hot(probabilities.argmax(dim=1), num_classes).bool()
    f1_scores = []
    for class_index in range(num_classes):
        class_labels = labels[:, class_index]
        class_predicted = predicted[:, class_index]
        if class_labels.any() or class_predicted.any():
            f1_scores.append(float(f1_score(class_labels, class_predicted, zero_division=0)))
    metrics = {
        "accuracy": (predicted == labels).all(dim=1).double().mean().item(),
        "macro_f1": sum(f1_scores) / max(1, len(f1_scores)),
    }
    if num_classes > 5 and not multi_label:
        top5 = probabilities.topk(5).indices
        is_hit = labels.gather(1, top5).any(dim=1)
        metrics["top5_accuracy"] = is_hit.double().mean().item()

    classes = ranked_classes(labels, multi_label=multi_label)
    if classes:
        ranked_labels = labels[:, classes].numpy()
        scores = probabilities[:, classes].numpy()
        metrics["auroc"] = float(roc_auc_score(ranked_labels, scores, average="macro"))
        precision = average_precision_score(ranked_labels, scores, average="macro")
        metrics["average_precision"] = float(precision)
    return metrics


def ranked_classes(labels: Bool[Tensor, "n k"], *, multi_label: bool) -> list[int]:
    """Returns the classes of which AUROC and average precision are the mean, see `classification_metrics`."""
    num_classes = labels.shape[1]
    has_both = labels.any(dim=0) & ~labels.all(dim=0)
    if num_classes == 2 and not multi_label:
        has_both[0] = False
    return has_both.nonzero().flatten().tolist()


def vqa_scores(
    predictions: Sequence[str], questions: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns `vqa_score` and that of each type of answer, and those `by_answer_type` and `by_question_type`.

    They are from 0 to 1, to four decimals: the two that the official evaluation gives in percent (GT-Vision-Lab/VQA,
    `vqaEval.py`).
    """
    scores = []
    for prediction, question in zip(predictions, questions, strict=True):
        scores.append(vqa_score(prediction, question["answers"]))
    metrics = {"vqa_score": _rounded_mean(scores)}
    details = {}
    for column in ("answer_type", "question_type"):
        scores_of: dict[str, list[float]] = defaultdict(list)
        for score, question in zip(scores, questions, strict=True):
            scores_of[question.get(column, "")].append(score)
        means = {name: _rounded_mean(scores_of[name]) for name in sorted(scores_of) if name}
        if means:
            details[f"by_{column}"] = means
    for name, score in details.get("by_answer_type", {}).items():
        metrics[f"vqa_score_{name.replace('/', '_')}"] = score
    return metrics, details


def _rounded_mean(scores: Sequence[float]) -> float:
    return round(sum(scores) / len(scores), 4)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Returns the score of one prediction, from 0 to 1.

    It is the mean, over all ways to leave one annotator out, of min(n / 3, 1), n others having given the prediction.
    Where annotators differ, answers and prediction are compared in their normal form; where all are the same, as they
    are. Fewer than four annotators could never give 1 in this way: with them it is the share, in normal form, that gave
    the prediction; with one, whether it is right.
    """
    if not answers:
        raise ValueError("a question has no answers; expected those of the annotators")
    prediction = _in_one_line(prediction)
    answers = [_in_one_line(answer) for answer in answers]
    num_annotators = len(answers)
    has_few = num_annotators < FEW_ANNOTATORS
    if has_few or len(set(answers)) > 1:
        prediction = normalise_answer(prediction)
        answers = [normalise_answer(answer) for answer in answers]
    num_same = answers.count(prediction)
    if has_few:
        return num_same / num_annotators
    # Without one who gave the prediction, one fewer gave it.
    score_without_same = min((num_same - 1) / 3, 1.0)
    score_without_other = min(num_same / 3, 1.0)
    total = num_same * score_without_same + (num_annotators - num_same) * score_without_other
    return total / num_annotators


def _in_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
