"""Replicas average the gradients of one process in every phase, and look for unused parameters once in each."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import tiny
from bridgetower.data.batch import IGNORED, CaptionBatch, joined
from bridgetower.distributed import rank
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import Losses
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.training.data_parallel import Replicated

PLAIN = tiny.changed(text__dropout=0.0, fusion__dropout=0.0)
BATCHES = [tiny.caption_batch((0, 1), (5, 3), PLAIN, seed=3), tiny.caption_batch((2, 3), (4, 7), PLAIN, seed=4)]
CONTRAST, BOTH = Phase(mlm=0, itm=0, itc=1), Phase(mlm=1, itm=1)
KINDS = {
    "contrast": (CONTRAST,),
    "words and matching": (BOTH,),
    "everything": (replace(BOTH, itc=1, negatives="hard"),),
    "contrast, then words": (replace(CONTRAST, until=0.5), Phase(mlm=1, itm=0)),
    "frozen towers": (replace(BOTH, itc=1),),
    "no words in one process": (BOTH,),
}
STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)  # of the run, with three steps before the second phase begins and three after

Gradients = dict[str, Tensor]


def batches(kind: str) -> list[CaptionBatch]:
    if kind != "no words in one process":
        return BATCHES
    return [BATCHES[0], replace(BATCHES[1], mlm_labels=torch.full_like(BATCHES[1].mlm_labels, IGNORED))]


def task_of(kind: str) -> PretrainingTask:
    task = PretrainingTask(tiny.build(PLAIN).train(), PretrainingConfig(phases=KINDS[kind]))
    if kind == "frozen towers":
        task.model.vision.requires_grad_(False)
        task.model.text.requires_grad_(False)
    return task


def gradients(task: nn.Module) -> Gradients:
    found = {name: weight.grad.clone() for name, weight in task.named_parameters() if weight.grad is not None}
    task.zero_grad(set_to_none=True)
    return found


def alone(kind: str, progress: float) -> Gradients:
    """Contrast of all pairs, and of the other objectives the mean over the parts."""
    task = task_of(kind)
    phase = task.config.phase(progress)
    if phase.itc:
        task.config = PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=phase.itc),))
        explicit = [replace(batch, attention_mask=batch.attention_mask) for batch in batches(kind)]
        task(joined(explicit, seed=0)).total.backward()
    if phase.mlm:
        task.config = PretrainingConfig(phases=(replace(phase, itc=0, until=1.0),))
        for batch in batches(kind):
            (task(batch).total / len(BATCHES)).backward()
    return gradients(task)


@dataclass
class Seen:
    """What a process saw in each step."""

    gradients: list[Gradients]
    looked: list[bool]
    frees: bool = False  # the memory of what looked first


def averaged(kinds: Sequence[str]) -> dict[str, Seen]:
    """The averaged gradients of steps at the same weights."""
    return {kind: steps(task_of(kind), batches(kind)[rank()]) for kind in kinds}


def steps(task: PretrainingTask, batch: CaptionBatch) -> Seen:
    replicas, seen = Replicated(task), Seen([], [])
    first: Any = weakref.ref(replicas.run)
    for progress in STEPS:
        task.progress = progress
        with replicas.accumulating(when=False):
            replicas(batch).total.backward()
        run: Any = replicas.run
        seen.looked.append(run.find_unused_parameters)
        replicas.clip_gradients(None)
        seen.gradients.append(gradients(task))
    seen.frees = first() is None
    return seen


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Seen]]:
    return run_on_ranks(2, averaged, list(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_process(kind: str, seen: list[dict[str, Seen]]) -> None:
    for step, progress in enumerate(STEPS):
        expected = alone(kind, progress)
        for process in seen:
            found = process[kind].gradients[step]
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_parameters_are_looked_for_in_the_first_step_of_a_phase(kind: str, seen: list[dict[str, Seen]]) -> None:
    first = {0, 3} if len(KINDS[kind]) == 2 else {0}
    for process in seen:
        assert process[kind].looked == [step in first for step in range(len(STEPS))]
        assert process[kind].frees


def exchanges() -> list[int]:
    """How many exchanges of gradients there were after each of three micro-batches and their step, twice."""
    task, counts = task_of(next(iter(KINDS))), [0]
    replicas = Replicated(task)
    batch = batches(next(iter(KINDS)))[rank()]

    def count(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counts[0] += 1
        return allreduce_hook(state, bucket)

    run: Any = replicas.run
    run.register_comm_hook(None, count)
    seen = []
    for micro in range(3):
        with replicas.accumulating(when=micro < 2):
            replicas(batch).total.backward()
        seen.append(counts[0])
    return seen


def test_gradients_are_exchanged_once_a_step() -> None:
    for first, second, last in run_on_ranks(2, exchanges):
        assert (first, second) == (0, 0)
        assert last > 0


class Changing(PretrainingTask):
    """In the second process, the third step uses no head of words."""

    num_steps = 0

    def forward(self, *inputs: Any) -> Losses:
        self.num_steps += 1
        losses = super().forward(*inputs)
        return Losses.weigh({"itm": losses.parts["itm"]}, {"itm": 1}) if rank() and self.num_steps == 3 else losses


class Undeclared(Changing):
    """Does not say when its graph stays the same."""

    graph = None  # type: ignore[assignment]


def changing(kind: type[PretrainingTask]) -> Seen:
    task = kind(tiny.build(PLAIN).train(), PretrainingConfig(phases=(BOTH,)))
    return steps(task, BATCHES[rank()])


def test_a_parameter_that_loses_its_gradient_is_an_error_and_no_process_waits() -> None:
    with pytest.raises(RuntimeError, match=r"mlm_head\S* and \d+ other parameters got a gradient in some steps"):
        run_on_ranks(2, changing, Changing)


def test_a_task_without_graph_may_change_it() -> None:
    first, second = run_on_ranks(2, changing, Undeclared)
    assert first.looked == [True] * len(STEPS)
    for one, other in zip(first.gradients, second.gradients, strict=True):
        assert tiny.equal(one, other)
