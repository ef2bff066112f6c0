"""Predictions of questions in two processes are those of one, of an odd number too and of fewer than processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks import run_on_ranks

import asked
from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batch import BatchKey
from bridgetower.data.examples import EntryDataset
from bridgetower.evaluation.class_metrics import Predictions, predict_classes
from bridgetower.objectives.classification import task_of_head


@dataclass(frozen=True)
class First:
    """The first few examples."""

    examples: EntryDataset
    number: int

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, key: BatchKey) -> Any:
        return self.examples[key]


def predict(checkpoint: Path, folder: Path) -> list[Predictions]:
    loaded = read_checkpoint(checkpoint)
    assert loaded.processor is not None
    statements = asked.examples(folder, "snli-ve", loaded.processor, "validation")
    task = task_of_head(loaded.model(), "snli_ve")
    return [predict_classes(task, First(statements, number), batch_size=3) for number in (len(statements), 1)]


def test_predictions_are_complete_and_in_order(answering_checkpoint: Path, tmp_path: Path) -> None:
    given = answering_checkpoint, asked.write_set(tmp_path / "snli-ve", "snli-ve")
    alone = predict(*given)
    assert len(alone[0].classes) % 2 == len(alone[1].classes) == 1
    for process in run_on_ranks(2, predict, *given):
        for found, expected in zip(process, alone, strict=True):
            assert torch.equal(found.classes, expected.classes)
            torch.testing.assert_close(found.probabilities, expected.probabilities, atol=1e-5, rtol=0)
