"""Predictions of a whole set: in order, whatever the batch size, and with a bar."""

from pathlib import Path

import pytest
import torch

import asked
from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batch import BatchKey
from bridgetower.data.examples import EntryDataset
from bridgetower.evaluation.class_metrics import predict_classes
from bridgetower.evaluation.config import EvaluationOptions
from bridgetower.objectives.classification import ClassificationTask, task_of_head
from bridgetower.processor import Processor


@pytest.fixture
def statements(tmp_path: Path, tiny_processor: Processor) -> EntryDataset:
    folder = asked.write_set(tmp_path / "set", "snli-ve")
    return asked.examples(folder, "snli-ve", tiny_processor)


@pytest.fixture
def task(answering_checkpoint: Path) -> ClassificationTask:
    return task_of_head(read_checkpoint(answering_checkpoint).model(), "snli_ve")


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (100, 0), (4, 1)])
def test_every_example_in_order(
    task: ClassificationTask, statements: EntryDataset, batch_size: int, num_workers: int
) -> None:
    found = predict_classes(task, statements, batch_size=batch_size, options=EvaluationOptions(num_workers=num_workers))
    with torch.no_grad():
        expected = torch.cat([task.predict(statements[BatchKey((row,), 0)]) for row in range(len(statements))])
    assert torch.equal(found.classes, expected.argmax(dim=1))
    torch.testing.assert_close(found.probabilities, expected.amax(dim=1), atol=1e-5, rtol=0)


def test_the_bar_is_on_standard_error(
    task: ClassificationTask,
    statements: EntryDataset,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    predict_classes(task, statements, batch_size=5, options=EvaluationOptions(progress=True))
    captured = capsys.readouterr()
    assert "predicting" in captured.err
    assert captured.out == ""
