"""Pre-training and retrieval evaluation in two processes against one that holds everything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import dense
import shapes
import tiny
from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batch import CaptionBatch, StepSampler
from bridgetower.data.captions import CaptionImages
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.distributed import rank, world_size
from bridgetower.evaluation import masked_words
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.retrieval import evaluate_matching, evaluate_retrieval
from bridgetower.model.fusion import Encoded
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import Pairs
from bridgetower.objectives.pretraining import PretrainingTask
from rows import records_of, write_set

WORLD = 2
ROWS = 4  # pairs of each process
CONFIG = shapes.MODEL.override({"text.dropout": 0.0, "fusion.dropout": 0.0, "text.vocab_size": 40})
INDEX = (0, 1, 2, 2, 3, 0, 4, 5)  # picture 0 is in both processes, picture 2 twice in one
LENGTHS = {"padded": (7, 3, 5, 4, 4, 2, 6, 3), "one without padding": (7, 3, 5, 4, 5, 5, 5, 5)}
EXACT = {"atol": 2e-6, "rtol": 2e-5}

Result = dict[str, Any]


def whole_batch(lengths: tuple[int, ...]) -> CaptionBatch:
    """The batch of both processes together; one word of each text is hidden, so that every process has as many."""
    return tiny.caption_batch(INDEX, lengths, CONFIG, seed=5)


def own_part(batch: CaptionBatch, process: int) -> CaptionBatch:
    """One process's rows, padded only as far as they need it, as a data loader makes them."""
    rows = slice(process * ROWS, (process + 1) * ROWS)
    assert batch.attention_mask is not None
    mask = batch.attention_mask[rows]
    length = int(mask.sum(dim=1).max())
    return CaptionBatch(
        pixel_values=batch.pixel_values[rows],
        input_ids=batch.input_ids[rows, :length],
        attention_mask=None if bool(mask[:, :length].all()) else mask[:, :length],
        masked_input_ids=batch.masked_input_ids[rows, :length],
        mlm_labels=batch.mlm_labels[rows, :length],
        image_index=batch.image_index[rows],
        ids=batch.ids[rows],
        seed=batch.seed + process,
    )


def make_task(phase: Phase, **changes: Any) -> PretrainingTask:
    return PretrainingTask(tiny.build(CONFIG), PretrainingConfig(phases=(phase,), **changes))


def gradients(task: PretrainingTask) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in task.model.named_parameters() if value.grad is not None}


PHASES = {
    "itc": (Phase(mlm=0.0, itm=0.0, itc=1.0), {}),
    "itc without gradients": (Phase(mlm=0.0, itm=0.0, itc=1.0), {"gather_with_grads": False}),
    "random": (Phase(mlm=0.5, itm=2.0, itc=1.0), {}),
    "hard": (Phase(mlm=0.5, itm=2.0, itc=1.0, negatives="hard"), {}),
    "hard of all": (Phase(mlm=0.5, itm=2.0, itc=1.0, negatives="hard"), {"negatives_from": "world"}),
}


def step(lengths: tuple[int, ...], phase: Phase, changes: dict[str, Any]) -> Result:
    """One step in this process: its losses, the averaged gradients and the pairs that matching drew."""
    task, drawn = make_task(phase, **changes), []
    original = task.pairs

    def pairs(image: Encoded, text: Encoded, batch: CaptionBatch, phase: Phase) -> Any:
        result = original(image, text, batch, phase)
        drawn.append(result[0])
        return result

    task.pairs = pairs  # type: ignore[method-assign]
    parallel = DistributedDataParallel(task, find_unused_parameters=True)
    losses = parallel(own_part(whole_batch(lengths), rank()))
    losses.total.backward()
    parts = {name: value.detach() for name, value in losses.parts.items()}
    return {"total": losses.total.detach(), "parts": parts, "gradients": gradients(task), "pairs": drawn}


def evaluate(checkpoint: Path, dataset: Path, split: str) -> Result:
    loaded = read_checkpoint(checkpoint)
    assert loaded.processor is not None
    images = CaptionImages(DataConfig(folders=(str(dataset),)), split, loaded.processor)
    config, model = RetrievalConfig(candidates=3, batch_size=4), loaded.model()
    result = evaluate_retrieval(model, images, config)
    accuracy = evaluate_matching(model, images, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_words, "BATCH_SIZE", 5)
        words = masked_words.evaluate_masked_words(model, images, MaskingConfig(probability=0.4))
    return {
        "metrics": result.metrics(),
        "similarity": dense.similarity(result),
        "itm": dense.itm(result),
        "accuracy": accuracy,
        "words": words,
    }


def both_evaluations(checkpoint: Path, dataset: Path, single: Path) -> Result:
    return {
        "evaluation": evaluate(checkpoint, dataset, "test"),
        "evaluation of one": evaluate(checkpoint, single, "test"),
    }


def sample() -> list[tuple[int, ...]]:
    """Pairs of this process in six steps over two epochs."""
    sampler = StepSampler(
        27, batch_size=8, micro_batches=2, steps=range(6), seed=3, rank=rank(), world_size=world_size()
    )
    return [key.examples for key in sampler]


def everything(checkpoint: Path, dataset: Path, single: Path) -> Result:
    """All that the tests look at, in one start of the processes."""
    return {
        "steps": {
            (texts, name): step(lengths, *phase) for texts, lengths in LENGTHS.items() for name, phase in PHASES.items()
        },
        **both_evaluations(checkpoint, dataset, single),
        "samples": sample(),
    }


@pytest.fixture(scope="module")
def single_picture(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose test split holds one picture."""
    return write_set(tmp_path_factory.mktemp("single") / "set", {"test": records_of(tiny_dataset, "test")[:1]})


@pytest.fixture(scope="module")
def processes(tiny_checkpoint: Path, tiny_dataset: Path, single_picture: Path) -> list[Result]:
    return run_on_ranks(WORLD, everything, tiny_checkpoint, tiny_dataset, single_picture)


@pytest.fixture(scope="module", params=[WORLD, 4])
def evaluations(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_dataset: Path, single_picture: Path
) -> list[Result]:
    """Of two and of four processes."""
    if request.param == WORLD:
        found: list[Result] = request.getfixturevalue("processes")
        return found
    return run_on_ranks(request.param, both_evaluations, tiny_checkpoint, tiny_dataset, single_picture)


def joined_pairs(parts: list[Pairs], *, global_rows: bool) -> Pairs:
    """The pairs of both processes as rows of the whole batch."""
    shifts = [0 if global_rows else process * ROWS for process in range(WORLD)]
    return Pairs(
        torch.cat([pairs.image_rows + shift for pairs, shift in zip(parts, shifts, strict=True)]),
        torch.cat([pairs.text_rows + shift for pairs, shift in zip(parts, shifts, strict=True)]),
        torch.cat([pairs.labels for pairs in parts]),
    )


def alone(texts: str, name: str, processes: list[Result]) -> Result:
    """The same step in one process, with the pairs that the two drew."""
    phase, changes = PHASES[name]
    task, batch = make_task(phase, **changes), whole_batch(LENGTHS[texts])
    image = task.model.encode_image(batch.pixel_values)
    text = task.model.encode_text(batch.input_ids, batch.attention_mask)
    parts = {"itc": task.itc(image, text, batch)}
    if phase.itm:
        drawn = [process["steps"][texts, name]["pairs"][0] for process in processes]
        pairs = joined_pairs(drawn, global_rows=changes.get("negatives_from") == "world")
        assert torch.equal(
            (batch.image_index[pairs.image_rows] == batch.image_index[pairs.text_rows]).long(), pairs.labels
        )
        parts["itm"], _ = task.itm(image, text, pairs)
        masked = task.model.encode_text(batch.masked_input_ids, batch.attention_mask)
        parts["mlm"], _ = task.mlm(image, masked, batch)
    total = torch.stack([getattr(phase, part) * loss for part, loss in parts.items()]).sum()
    total.backward()
    return {"total": total.detach(), "parts": parts, "gradients": gradients(task)}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("texts", LENGTHS)
class TestStep:
    @pytest.mark.parametrize("name", PHASES)
    def test_losses_and_averaged_gradients_are_those_of_one_process(
        self, processes: list[Result], texts: str, name: str
    ) -> None:
        expected = alone(texts, name, processes)
        results = [process["steps"][texts, name] for process in processes]
        assert results[0]["parts"].keys() == expected["parts"].keys()
        for part, loss in expected["parts"].items():
            mean = torch.stack([result["parts"][part] for result in results]).mean()
            torch.testing.assert_close(mean, loss.detach(), **EXACT)
        total = torch.stack([result["total"] for result in results]).mean()
        torch.testing.assert_close(total, expected["total"], **EXACT)
        for result in results if name != "itc without gradients" else ():
            assert result["gradients"].keys() == expected["gradients"].keys()
            for parameter, gradient in expected["gradients"].items():
                found = result["gradients"][parameter]
                torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4, msg=parameter)
        assert max(float(gradient.abs().max()) for gradient in expected["gradients"].values()) > 0.1

    def test_control_gradients_that_stay_in_their_process_differ(self, processes: list[Result], texts: str) -> None:
        expected = alone(texts, "itc", processes)["gradients"]
        assert distance(expected, processes[0]["steps"][texts, "itc without gradients"]["gradients"]) > 1e-2

    def test_hard_negatives_of_all_cross_the_processes(self, processes: list[Result], texts: str) -> None:
        foreign = 0
        for process, result in enumerate(processes):
            (pairs,) = result["steps"][texts, "hard of all"]["pairs"]
            rows = torch.cat([pairs.image_rows, pairs.text_rows])
            own = (rows >= process * ROWS) & (rows < (process + 1) * ROWS)
            assert int(own.sum()) >= 4 * ROWS  # positives, and one side of every negative
            foreign += int((~own).sum())
            (local,) = result["steps"][texts, "hard"]["pairs"]
            assert int(torch.cat([local.image_rows, local.text_rows]).max()) < ROWS
        assert foreign > 0


class TestEvaluation:
    def test_an_odd_number_of_pictures(
        self, evaluations: list[Result], tiny_checkpoint: Path, tiny_dataset: Path
    ) -> None:
        expected = evaluate(tiny_checkpoint, tiny_dataset, "test")
        assert len(expected["similarity"]) % len(evaluations) == 1
        for process in evaluations:
            found = process["evaluation"]
            assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
            assert found["accuracy"] == expected["accuracy"] == expected["metrics"]["itm_accuracy"]
            assert found["words"] == pytest.approx(expected["words"], abs=1e-7)
            torch.testing.assert_close(found["similarity"], expected["similarity"], atol=1e-5, rtol=0)
            torch.testing.assert_close(found["itm"], expected["itm"], atol=1e-5, rtol=0, equal_nan=True)

    def test_fewer_pictures_than_processes(
        self, evaluations: list[Result], tiny_checkpoint: Path, single_picture: Path
    ) -> None:
        expected = evaluate(tiny_checkpoint, single_picture, "test")
        for process in evaluations:
            assert process["evaluation of one"]["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
            assert process["evaluation of one"]["words"] == pytest.approx(expected["words"], abs=1e-7)


def test_batches_of_the_processes_are_that_of_one(processes: list[Result]) -> None:
    alone = [key.examples for key in StepSampler(27, batch_size=8, micro_batches=1, steps=range(6), seed=3)]
    first, second = (process["samples"] for process in processes)
    for number, pairs in enumerate(alone):
        micro = slice(2 * number, 2 * number + 2)
        assert pairs == tuple(pair for part in (*first[micro], *second[micro]) for pair in part)
