"""Metrics of classes and numbers against scikit-learn and SciPy, on made-up arrays and at their edges."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from bridgetower.evaluation.class_metrics import (
    accuracy,
    consistency,
    f1,
    matthews_correlation,
    pearson_correlation,
    spearman_correlation,
)

metrics = pytest.importorskip("sklearn.metrics")

CLASSES: dict[Callable[[Tensor, Tensor], float], Callable[[Tensor, Tensor], float]] = {
    accuracy: lambda predicted, labels: metrics.accuracy_score(labels, predicted),
    f1: lambda predicted, labels: metrics.f1_score(labels, predicted),
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


class TestConsistency:
    def test_all_of_a_group_have_to_be_right(self) -> None:
        predicted, labels = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([1, 0, 0, 1, 0])
        assert consistency(predicted, labels, ["a", "a", "b", "b", "c"]) == pytest.approx(2 / 3)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcd")), min_size=1))
    def test_between_nothing_and_the_accuracy_of_the_best_group(self, rows: list[tuple[bool, str]]) -> None:
        hits, groups = [int(hit) for hit, _ in rows], [group for _, group in rows]
        value = consistency(torch.tensor(hits), torch.ones(len(rows), dtype=torch.long), groups)
        right = {
            group for group in groups if all(hit for hit, other in zip(hits, groups, strict=True) if other == group)
        }
        assert value == pytest.approx(len(right) / len(set(groups)))

    def test_groups_of_one_are_the_accuracy(self) -> None:
        predicted, labels = torch.tensor([1, 0, 1]), torch.tensor([1, 1, 1])
        assert consistency(predicted, labels, ["a", "b", "c"]) == pytest.approx(accuracy(predicted, labels))


class TestEdges:
    @pytest.mark.parametrize("metric", [*CLASSES, pearson_correlation, spearman_correlation], ids=lambda m: m.__name__)
    def test_nothing_and_different_numbers(self, metric: Callable[[Tensor, Tensor], float]) -> None:
        kind = torch.float32 if "correlation" in metric.__name__ and "matthews" not in metric.__name__ else torch.long
        for predicted, labels in ((0, 0), (2, 3)):
            with pytest.raises(ValueError, match="expected one for each, at least one"):
                metric(torch.zeros(predicted, dtype=kind), torch.zeros(labels, dtype=kind))

    def test_all_the_same(self) -> None:
        same, mixed = torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 0, 1])
        assert matthews_correlation(same, mixed) == 0.0
        assert spearman_correlation(mixed.float(), same.float()) == 0.0
        assert f1(same, same) == 0.0
