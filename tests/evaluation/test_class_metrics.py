"""Predictions of a whole set; metrics of classes and numbers against scikit-learn and SciPy, and at their edges."""

import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score

import asked
from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batch import BatchKey
from bridgetower.evaluation.class_metrics import accuracy, pearson_correlation, predict_classes, spearman_correlation
from bridgetower.objectives.classification import task_of_head


def test_every_example_is_predicted_in_order(answering_checkpoint, tmp_path, tiny_processor):
    statements = asked.examples(asked.write_set(tmp_path / "set", "snli-ve"), "snli-ve", tiny_processor)
    task = task_of_head(read_checkpoint(answering_checkpoint).model(), "snli_ve")
    with torch.no_grad():
        expected = torch.cat([task.predict(statements[BatchKey((row,), 0)]) for row in range(len(statements))])
    for batch_size in (5, 100):
        found = predict_classes(task, statements, batch_size=batch_size)
        assert torch.equal(found.classes, expected.argmax(dim=1))
        torch.testing.assert_close(found.probabilities, expected.amax(dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "tied"])
def test_correlations(seed, step):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randn(100, generator=generator)
    predicted = labels + torch.randn(100, generator=generator)
    if step:
        labels, predicted = (labels / step).round(), (predicted / step).round()
    expected = stats.pearsonr(predicted.double(), labels.double()).statistic
    assert pearson_correlation(predicted, labels) == pytest.approx(expected, abs=1e-12)
    expected = stats.spearmanr(predicted, labels).statistic
    assert spearman_correlation(predicted, labels) == pytest.approx(expected, abs=1e-12)


def test_accuracy_and_all_the_same():
    same, mixed = torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 0, 0])
    assert accuracy(same, mixed) == accuracy_score(mixed, same) == 0.75
    assert spearman_correlation(mixed.float(), same.float()) == 0.0
