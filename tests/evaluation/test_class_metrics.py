"""Metrics of classes and numbers against scikit-learn and SciPy, on made-up arrays and at their edges."""

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from bridgetower.evaluation.class_metrics import (
    accuracy,
    f1,
    matthews_correlation,
    pearson_correlation,
    spearman_correlation,
)

metrics = pytest.importorskip("sklearn.metrics")

CLASSES: dict[Callable[[Tensor, Tensor], float], Callable[[Tensor, Tensor], float]] = {
    accuracy: lambda predicted, labels: metrics.accuracy_score(labels, predicted),
    f1: lambda predicted, labels: 2 * int((predicted & labels).sum()) / int((predicted + labels).sum()),
    matthews_correlation: lambda predicted, labels: metrics.matthews_corrcoef(labels, predicted),
}


@pytest.mark.parametrize("ours", CLASSES, ids=lambda metric: metric.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_of_two_classes(ours: Callable[[Tensor, Tensor], float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (200,), generator=generator)
    predicted = torch.where(torch.rand(200, generator=generator) < 0.7, labels, 1 - labels)
    assert ours(predicted, labels) == pytest.approx(CLASSES[ours](predicted, labels), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "tied"])
def test_correlations(seed: int, step: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randn(100, generator=generator)
    predicted = labels + torch.randn(100, generator=generator)
    if step:
        labels, predicted = (labels / step).round(), (predicted / step).round()
    expected = stats.pearsonr(predicted.double(), labels.double()).statistic
    assert pearson_correlation(predicted, labels) == pytest.approx(expected, abs=1e-12)
    expected = stats.spearmanr(predicted, labels).statistic
    assert spearman_correlation(predicted, labels) == pytest.approx(expected, abs=1e-12)


def test_all_the_same() -> None:
    same, mixed = torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 0, 1])
    assert matthews_correlation(same, mixed) == 0.0
    assert spearman_correlation(mixed.float(), same.float()) == 0.0
    assert f1(same, same) == 0.0
