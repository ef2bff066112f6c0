"""Metrics of classes and numbers; pure functions on whole arrays."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot


def accuracy(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Returns the share of right predictions."""
    _check(predicted, labels)
    return (predicted == labels).double().mean().item()


def consistency(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], groups: Sequence[str]) -> float:
    """Returns the share of groups whose predictions are all right: NLVR2, sentences with several pairs of images."""
    _check(predicted, labels)
    right: dict[str, bool] = {}
    for group, hit in zip(groups, (predicted == labels).tolist(), strict=True):
        right[group] = right.get(group, True) and hit
    return sum(right.values()) / len(right)


def f1(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Returns the F1 of class 1, 0 if it is neither predicted nor there."""
    _check(predicted, labels)
    hits = ((predicted == 1) & (labels == 1)).sum().item()
    total = (predicted == 1).sum().item() + (labels == 1).sum().item()
    return 2 * hits / total if total else 0.0


def matthews_correlation(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Returns Matthews' correlation of two classes, 0 if all predictions or all labels are the same."""
    _check(predicted, labels)
    return pearson_correlation(predicted.double(), labels.double())


def pearson_correlation(predicted: Float[Tensor, " n"], labels: Float[Tensor, " n"]) -> float:
    """Returns the linear correlation, 0 if all predictions or all labels are the same."""
    _check(predicted, labels)
    first, second = (values.double() - values.double().mean() for values in (predicted, labels))
    spread = first.norm() * second.norm()
    return (first @ second / spread).item() if spread > 0 else 0.0


def spearman_correlation(predicted: Float[Tensor, " n"], labels: Float[Tensor, " n"]) -> float:
    """Returns the correlation of the ranks, tied values sharing their mean rank."""
    _check(predicted, labels)
    return pearson_correlation(_ranks(predicted), _ranks(labels))


def number_metrics(predicted: Float[Tensor, " n"], labels: Float[Tensor, " n"]) -> dict[str, float]:
    """Returns both correlations and `mean_absolute_error`."""
    return {
        "pearson_correlation": pearson_correlation(predicted, labels),
        "spearman_correlation": spearman_correlation(predicted, labels),
        "mean_absolute_error": (predicted.double() - labels.double()).abs().mean().item(),
    }


def _ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[places]


def _check(predicted: Tensor, labels: Tensor) -> None:
    if predicted.shape != labels.shape or predicted.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"predictions {list(predicted.shape)} for labels {list(labels.shape)}; expected one for each, at least one"
        )


def classification_metrics(
    probabilities: Float[Tensor, "n k"], labels: Bool[Tensor, "n k"], *, multi_label: bool
) -> dict[str, float]:
    """Returns `accuracy`, `macro_f1`, `auroc` and `average_precision`.

    With several labels per row, a class is predicted above one half, and a row is right if all its classes are. Of two
    exclusive classes, AUROC and average precision are those of the second one; else they are means over the classes,
    each against the rest. Classes that no row or every row has have neither; where none is left, both are left out.
    F1 is the mean over the classes that some row has or is predicted to have.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    if not len(labels):
        raise ValueError("no examples with labels; expected at least one")
    num_classes = labels.shape[1]
    predicted = probabilities > 0.5 if multi_label else one_hot(probabilities.argmax(dim=1), num_classes).bool()
    seen = [number for number in range(num_classes) if (predicted | labels)[:, number].any()]
    metrics = {
        "accuracy": (predicted == labels).all(dim=1).double().mean().item(),
        "macro_f1": sum(f1(predicted[:, number].int(), labels[:, number].int()) for number in seen) / max(1, len(seen)),
    }
    both = ranked_classes(labels, multi_label=multi_label)
    ranked = {"auroc": roc_auc_score, "average_precision": average_precision_score}
    for name, metric in ranked.items() if both else ():
        metrics[name] = float(metric(labels[:, both].numpy(), probabilities[:, both].numpy(), average="macro"))
    return metrics


def ranked_classes(labels: Bool[Tensor, "n k"], *, multi_label: bool) -> list[int]:
    """Returns the classes of which AUROC and average precision are the mean, see `classification_metrics`."""
    num_classes = labels.shape[1]
    classes = [1] if num_classes == 2 and not multi_label else range(num_classes)
    return [number for number in classes if labels[:, number].any() and not labels[:, number].all()]
