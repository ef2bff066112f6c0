"""Metrics of classes and numbers: SNLI-VE, NLVR2, CIFAR and GLUE; pure functions on whole arrays."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor


def accuracy(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Returns the share of right predictions.

    Raises:
        ValueError: There are none, or the numbers differ.
    """
    _check(predicted, labels)
    return (predicted == labels).double().mean().item()


def consistency(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], groups: Sequence[str]) -> float:
    """Returns the share of groups whose predictions are all right: NLVR2, sentences with several pairs of images.

    Args:
        predicted, labels: Classes.
        groups: Equal for the examples of one group.

    Raises:
        ValueError: There are none, or the numbers differ.
    """
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


def _ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[places]


def _check(predicted: Tensor, labels: Tensor) -> None:
    if predicted.shape != labels.shape or predicted.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"predictions {list(predicted.shape)} for labels {list(labels.shape)}; expected one for each, at least one"
        )
