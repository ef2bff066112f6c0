"""Metrics of classes and numbers against scikit-learn and SciPy, on made-up arrays and at their edges."""

import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score

from bridgetower.evaluation.class_metrics import accuracy, pearson_correlation, spearman_correlation


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


def test_accuracy_and_all_the_same() -> None:
    same, mixed = torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 0, 0])
    assert accuracy(same, mixed) == accuracy_score(mixed, same) == 0.75
    assert spearman_correlation(mixed.float(), same.float()) == 0.0
