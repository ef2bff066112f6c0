"""Question answering in two processes against one: losses, gradients, and predictions of an odd number of questions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import asked
from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batch import BatchKey
from bridgetower.data.examples import EntryDataset
from bridgetower.data.order import StepSampler
from bridgetower.distributed import rank, world_size
from bridgetower.evaluation.predictions import Predictions, predict_classes
from bridgetower.objectives.classification import ClassificationTask, task_of_head

WORLD = 2
Result = dict[str, Any]


@dataclass(frozen=True)
class First:
    """The first few examples."""

    examples: EntryDataset
    number: int

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, key: BatchKey) -> Any:
        return self.examples[key]


def build(checkpoint: Path, folder: Path) -> tuple[ClassificationTask, EntryDataset]:
    loaded = read_checkpoint(checkpoint)
    assert loaded.processor is not None
    questions = asked.examples(folder, "vqa", loaded.processor, names=loaded.class_names("vqa"))
    return task_of_head(loaded.model(), "vqa"), questions


def step(checkpoint: Path, folder: Path) -> Result:
    """The first step of a run: the loss of this process and the gradients, averaged if there are several."""
    task, questions = build(checkpoint, folder)
    sampler = StepSampler(
        len(questions), batch_size=8, micro_batches=1, steps=range(1), seed=3, rank=rank(), world_size=world_size()
    )
    (key,) = sampler
    parallel = DistributedDataParallel(task, find_unused_parameters=True) if world_size() > 1 else task
    losses = parallel(questions[key])
    losses.total.backward()
    gradients = {name: value.grad.clone() for name, value in task.named_parameters() if value.grad is not None}
    return {"loss": losses.total.detach(), "gradients": gradients}


def predict(checkpoint: Path, folder: Path, number: int | None = None) -> Predictions:
    """Of the first `number` statements."""
    loaded = read_checkpoint(checkpoint)
    assert loaded.processor is not None
    statements = asked.examples(folder, "snli-ve", loaded.processor, "validation")
    return predict_classes(
        task_of_head(loaded.model(), "snli_ve"), First(statements, number or len(statements)), batch_size=3
    )


def everything(checkpoint: Path, questions: Path, statements: Path) -> Result:
    predictions = {"predictions": predict(checkpoint, statements), "one": predict(checkpoint, statements, 1)}
    return {"step": step(checkpoint, questions), **predictions}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return asked.write_set(folder / "vqa", "vqa"), asked.write_set(folder / "snli-ve", "snli-ve")


@pytest.fixture(scope="module")
def alone(answering_checkpoint: Path, sets: tuple[Path, Path]) -> Result:
    return everything(answering_checkpoint, *sets)


@pytest.fixture(scope="module")
def processes(answering_checkpoint: Path, sets: tuple[Path, Path]) -> list[Result]:
    return run_on_ranks(WORLD, everything, answering_checkpoint, *sets)


def test_mean_of_the_losses_is_that_of_one_process(alone: Result, processes: list[Result]) -> None:
    losses = torch.stack([process["step"]["loss"] for process in processes])
    torch.testing.assert_close(losses.mean(), alone["step"]["loss"], atol=1e-5, rtol=1e-5)
    assert losses[0] != losses[1]


def test_averaged_gradients_are_those_of_one_process(alone: Result, processes: list[Result]) -> None:
    expected: dict[str, Tensor] = alone["step"]["gradients"]
    for process in processes:
        found = process["step"]["gradients"]
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert float(expected["model.vqa_head.decoder.weight"].abs().max()) > 0.01


def test_predictions_are_complete_and_in_order(alone: Result, processes: list[Result]) -> None:
    expected: Predictions = alone["predictions"]
    assert len(expected) % WORLD == 1
    for process in processes:
        assert torch.equal(process["predictions"].classes, expected.classes)
        torch.testing.assert_close(process["predictions"].probabilities, expected.probabilities, atol=1e-5, rtol=0)


def test_fewer_examples_than_processes(alone: Result, processes: list[Result]) -> None:
    assert len(alone["one"]) == 1
    for process in processes:
        assert torch.equal(process["one"].classes, alone["one"].classes)


def test_control_another_order_differs(answering_checkpoint: Path, sets: tuple[Path, Path], alone: Result) -> None:
    task, questions = build(answering_checkpoint, sets[0])
    other = task(questions[BatchKey(tuple(range(8)), 0)])
    assert abs(float(other.total.detach() - alone["step"]["loss"])) > 1e-3
