"""Predictions for a whole set, and metrics of classes, numbers and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from bridgetower.data.batches.batch import BatchDataset, BatchKey
from bridgetower.data.sets.answers import FEW_ANNOTATORS, normalise_answer
from bridgetower.distributed import gather_by_id, rank, world_size
from bridgetower.evaluation.config import DEFAULTS, Details, EvaluationOptions, Metrics
from bridgetower.processor import load_items
from bridgetower.progress import counted

Numbers = Float[Tensor, " n"]
ClassScores = Float[Tensor, "n k"]
ClassLabels = Bool[Tensor, "n k"]


class Predictions(NamedTuple):
    """The likeliest class of every example, in order, and the probability that the task gives it."""

    classes: Int[Tensor, " n"]
    probabilities: Numbers


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
    """Predicts every example. Each process predicts its share and gets all predictions.

    Args:
        read: Turns the outputs of a batch into tensors with a row for each example.
    """
    # With fewer examples than processes, some examples are predicted twice.
    start = rank() % len(examples)
    local_indices = range(start, len(examples), world_size())
    keys = []
    for start in range(0, len(local_indices), batch_size):
        indices = local_indices[start : start + batch_size]
        keys.append(BatchKey(tuple(indices), 0))
    device = next(task.parameters()).device
    loaded = load_items(examples.__getitem__, keys, num_workers=options.num_workers, device=device)
    has_bar = options.progress and rank() == 0
    batches = counted(loaded, "predicting batches", enabled=has_bar, total=len(keys))

    tensors_of_batches = []
    for batch in batches:
        outputs = task.predict(batch.to(device))  # type: ignore[operator]
        tensors_of_batches.append([tensor.cpu() for tensor in read(outputs)])
    local_tensors = [torch.cat(tensors) for tensors in zip(*tensors_of_batches, strict=True)]
    _, *gathered = gather_by_id(torch.tensor(local_indices), *local_tensors)
    return tuple(gathered)


def pearson_correlation(predicted: Numbers, labels: Numbers) -> float:
    predicted = predicted.double() - predicted.double().mean()
    labels = labels.double() - labels.double().mean()
    spread = predicted.norm() * labels.norm()
    if spread == 0:
        return 0.0
    return (predicted @ labels / spread).item()


def spearman_correlation(predicted: Numbers, labels: Numbers) -> float:
    """Returns the correlation of the ranks. Tied values share their mean rank."""
    return pearson_correlation(_mean_ranks(predicted), _mean_ranks(labels))


def _mean_ranks(values: Numbers) -> Numbers:
    _, indices, counts = values.unique(return_inverse=True, return_counts=True)
    last_ranks = counts.cumsum(0)
    mean_ranks = last_ranks - (counts - 1) / 2
    return mean_ranks.double()[indices]


def number_metrics(predicted: Numbers, labels: Numbers) -> Metrics:
    return {
        "pearson_correlation": pearson_correlation(predicted, labels),
        "spearman_correlation": spearman_correlation(predicted, labels),
        "mean_absolute_error": (predicted.double() - labels.double()).abs().mean().item(),
    }


def classification_metrics(
    probabilities: ClassScores, labels: ClassLabels, *, multi_label: bool
) -> Metrics:
    """Returns `accuracy`, `macro_f1`, `auroc` and `average_precision`, and `top5_accuracy` of more than five classes.

    With several labels per row, a class is predicted if its probability is above one half, and a row is right if all
    its classes are. F1 is the mean over the classes that some row has or is predicted to have. AUROC and average
    precision are means over `ranked_classes`, each against the rest, and are left out if there are none.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    num_classes = labels.shape[1]
    if multi_label:
        predicted = probabilities > 0.5
    else:
        predicted = one_hot(probabilities.argmax(dim=1), num_classes).bool()
    is_right = (predicted == labels).all(dim=1)

    # Twice the hits over the sizes of both sets is the harmonic mean of precision and recall.
    num_hits = (predicted & labels).sum(dim=0)
    set_sizes = predicted.sum(dim=0) + labels.sum(dim=0)
    occurs = set_sizes > 0
    f1_scores = 2 * num_hits[occurs].double() / set_sizes[occurs]
    metrics = {
        "accuracy": is_right.double().mean().item(),
        "macro_f1": f1_scores.sum().item() / max(1, len(f1_scores)),
    }
    if num_classes > 5 and not multi_label:
        top5 = probabilities.topk(5).indices
        is_hit = labels.gather(1, top5).any(dim=1)
        metrics["top5_accuracy"] = is_hit.double().mean().item()

    classes = ranked_classes(labels, multi_label=multi_label)
    if classes:
        ranked_labels = labels[:, classes].numpy()
        scores = probabilities[:, classes].numpy()
        metrics["auroc"] = float(roc_auc_score(ranked_labels, scores))
        metrics["average_precision"] = float(average_precision_score(ranked_labels, scores))
    return metrics


def ranked_classes(labels: ClassLabels, *, multi_label: bool) -> list[int]:
    """Returns the classes that some rows have and others have not, of two exclusive classes only the second one."""
    num_classes = labels.shape[1]
    is_ranked = labels.any(dim=0) & ~labels.all(dim=0)
    if num_classes == 2 and not multi_label:
        is_ranked[0] = False
    return is_ranked.nonzero().flatten().tolist()


def vqa_scores(
    predictions: Sequence[str], questions: Sequence[Mapping[str, Any]]
) -> tuple[Metrics, Details]:
    """Returns metrics, and scores by group: `by_answer_type` and `by_question_type`.

    The metrics are `vqa_score` and the score of each type of answer, such as `vqa_score_yes_no`. Scores are from 0 to
    1, to four decimals: the official evaluation gives percent, to two (GT-Vision-Lab/VQA, `vqaEval.py`).
    """
    scores = []
    scores_by_type: dict[str, dict[str, list[float]]] = {}
    for prediction, question in zip(predictions, questions, strict=True):
        score = vqa_score(prediction, question["answers"])
        scores.append(score)
        for column in ("answer_type", "question_type"):
            type_name = question.get(column)
            if type_name:
                scores_of_types = scores_by_type.setdefault(f"by_{column}", {})
                scores_of_types.setdefault(type_name, []).append(score)

    metrics = {"vqa_score": _rounded_mean(scores)}
    details: Details = {}
    for name, scores_of_types in scores_by_type.items():
        details[name] = {
            type_name: _rounded_mean(scores_of_types[type_name])
            for type_name in sorted(scores_of_types)
        }
    for answer_type, mean in details.get("by_answer_type", {}).items():
        metrics[f"vqa_score_{answer_type.replace('/', '_')}"] = mean
    return metrics, details


def _rounded_mean(scores: Sequence[float]) -> float:
    return round(sum(scores) / len(scores), 4)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Returns the score of one prediction, from 0 to 1.

    If one annotator is left out, and n of the others gave the prediction, the score is min(n / 3, 1). The mean over all
    annotators that can be left out is returned. If all gave the same answer, it is compared as it is, else in normal
    form. Fewer than four annotators could never give 1 in this way: then the score is the share of the annotators who
    gave the prediction, always in normal form.
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
    # If one who gave the prediction is left out, one fewer gave it.
    score_without_same = min((num_same - 1) / 3, 1.0)
    score_without_other = min(num_same / 3, 1.0)
    total = num_same * score_without_same + (num_annotators - num_same) * score_without_other
    return total / num_annotators


def _in_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
