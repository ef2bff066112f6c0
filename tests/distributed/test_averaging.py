"""Replicas average the gradients of one process in every phase, whatever parameters a phase leaves out."""

from dataclasses import replace

import pytest
import torch
from ranks import run_on_ranks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from bridgetower.data.batches.batch import IGNORED, joined
from bridgetower.distributed import rank
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import Losses
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.training.data_parallel import Replicated
from helpers.models import build_model, changed_config, random_caption_batch, same_tensors

PLAIN = changed_config(text__dropout=0.0, fusion__dropout=0.0)
BATCHES = [
    random_caption_batch((0, 1), (5, 3), PLAIN, seed=3),
    random_caption_batch((2, 3), (4, 7), PLAIN, seed=4),
]
CONTRAST = Phase(mlm=0, itm=0, itc=1)
BOTH = Phase(mlm=1, itm=1)
KINDS = {
    "contrast, then words": (replace(CONTRAST, until=0.5), Phase(mlm=1, itm=0)),
    "frozen towers": (replace(BOTH, itc=1),),
    "no words in one process": (BOTH,),
}
STEPS = (0.0, 0.4, 0.6, 0.9)  # of the run, two before the second phase begins and two after


def batches_of_ranks(kind):
    if kind != "no words in one process":
        return BATCHES
    return [
        BATCHES[0],
        replace(BATCHES[1], mlm_labels=torch.full_like(BATCHES[1].mlm_labels, IGNORED)),
    ]


def task_of_kind(kind, cls=PretrainingTask):
    task = cls(build_model(PLAIN).train(), PretrainingConfig(phases=KINDS[kind]))
    if kind == "frozen towers":
        task.model.vision.requires_grad_(False)
        task.model.text.requires_grad_(False)
    return task


def gradients_by_name(task):
    by_name = {
        name: weight.grad.clone()
        for name, weight in task.named_parameters()
        if weight.grad is not None
    }
    task.zero_grad(set_to_none=True)
    return by_name


def gradients_of_one_process(kind, progress):
    task = task_of_kind(kind)
    phase = task.config.phase(progress)
    if phase.itc:
        task.config = PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=phase.itc),))
        explicit = [
            replace(batch, attention_mask=batch.attention_mask) for batch in batches_of_ranks(kind)
        ]
        task(joined(explicit, seed=0)).total.backward()
    if phase.mlm:
        task.config = PretrainingConfig(phases=(replace(phase, itc=0, until=1.0),))
        for batch in batches_of_ranks(kind):
            (task(batch).total / len(BATCHES)).backward()
    return gradients_by_name(task)


class Changing(PretrainingTask):
    num_steps = 0

    def forward(self, *inputs):
        self.num_steps += 1
        losses = super().forward(*inputs)
        return (
            Losses.weigh({"itm": losses.terms["itm"]}, {"itm": 1})
            if rank() and self.num_steps == 3
            else losses
        )


def averaged_steps(task, batch):
    replicas = Replicated(task)
    seen = []
    for progress in STEPS:
        task.progress = progress
        replicas(batch).total.backward()
        seen.append(gradients_by_name(task))
    return seen


def averaged():
    """Gradients of each kind, those of a task that changes, and how many exchanges three micro-batches took so far."""
    by_kind = {
        kind: averaged_steps(task_of_kind(kind), batches_of_ranks(kind)[rank()]) for kind in KINDS
    }
    changing = averaged_steps(task_of_kind("no words in one process", Changing), BATCHES[rank()])
    replicas = Replicated(task_of_kind("frozen towers"))
    counts = [0]
    seen = []

    def count(state, bucket):
        counts[0] += 1
        return allreduce_hook(state, bucket)

    run = replicas.run
    run.register_comm_hook(None, count)
    for micro in range(3):
        with replicas.accumulating(when=micro < 2):
            replicas(BATCHES[rank()]).total.backward()
        seen.append(counts[0])
    return by_kind, changing, seen


@pytest.fixture(scope="module")
def averaged_in_processes():
    return run_on_ranks(2, averaged)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_process(kind, averaged_in_processes):
    for step, progress in enumerate(STEPS):
        expected = gradients_of_one_process(kind, progress)
        for actual, _, _ in averaged_in_processes:
            assert actual[kind][step].keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(
                    actual[kind][step][name], gradient, atol=2e-6, rtol=1e-5, msg=name
                )


def test_gradients_are_exchanged_once_a_step(averaged_in_processes):
    for _, _, (first, second, last) in averaged_in_processes:
        assert (first, second) == (0, 0)
        assert last > 0


def test_what_a_process_does_not_use_is_averaged_all_the_same(averaged_in_processes):
    (_, first, _), (_, second, _) = averaged_in_processes
    for first_gradient, second_gradient in zip(first, second, strict=True):
        assert same_tensors(first_gradient, second_gradient)
    assert not same_tensors(first[1], first[2])
