"""Activation checkpointing: the same bits, those of dropout included, and less that is kept for the gradients."""

from contextlib import contextmanager

import pytest
import torch

from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from helpers.models import (
    build_model,
    changed_config,
    random_caption_batch,
    random_images,
    same_tensors,
)

PARTS = ("vision", "text", "fusion")
CHOICES = [("vision",), ("text",), ("fusion",), PARTS]
PHASES = {
    "contrast only": Phase(mlm=0, itm=0, itc=1),
    "everything": Phase(mlm=1, itm=1, itc=1, negatives="hard"),
}


@contextmanager
def kept(model):
    """Collects the sizes of what autograd keeps beside the weights, in bytes, by address."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def checkpointed_step(recomputed, phase, *, dropout=0.2, seed=0):
    model = build_model(changed_config(text__dropout=dropout, fusion__dropout=dropout)).train()
    model.checkpoint_activations(recomputed)
    task = PretrainingTask(model, PretrainingConfig(phases=(phase,)))
    torch.manual_seed(seed)
    with kept(model) as sizes:
        losses = task(random_caption_batch((0, 1, 2, 3), (5, 3, 4, 6)))
    losses.total.backward()
    gradients = {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }
    return gradients, sum(sizes.values())


@pytest.mark.parametrize(
    ("recomputed", "phase", "dropout"),
    [
        *((recomputed, "everything", 0.2) for recomputed in CHOICES),
        (PARTS, "everything", 0.0),
        (PARTS, "contrast only", 0.2),
    ],
)
def test_gradients_are_the_same_bits(recomputed, phase, dropout):
    ours, theirs = (
        checkpointed_step(choice, PHASES[phase], dropout=dropout)[0] for choice in (recomputed, ())
    )
    assert same_tensors(ours, theirs)


def test_control_other_draws_of_dropout_give_other_gradients():
    first, second = (
        checkpointed_step(PARTS, PHASES["everything"], seed=seed)[0] for seed in (0, 1)
    )
    assert not same_tensors(first, second)


def test_every_part_keeps_less():
    plain = checkpointed_step((), PHASES["everything"])[1]
    sizes = {
        recomputed: checkpointed_step(recomputed, PHASES["everything"])[1] for recomputed in CHOICES
    }
    assert all(size < 0.95 * plain for size in sizes.values())
    assert sizes[PARTS] < 0.4 * plain


def test_the_starts_of_the_first_fusion_layer_keep_less_too():
    """Without dropout, texts and images share what the first fusion layer computes of each alone."""
    plain, less = (
        checkpointed_step(recomputed, PHASES["everything"], dropout=0.0)[1]
        for recomputed in ((), ("fusion",))
    )
    assert less < 0.8 * plain


def test_nothing_is_computed_twice_without_gradients():
    model = build_model().train()
    model.checkpoint_activations(PARTS)
    calls = []
    model.vision.layers[0].register_forward_pre_hook(lambda layer, inputs: calls.append(layer))
    with torch.no_grad():
        model.encode_image(random_images(2))
    assert len(calls) == 1
    model.encode_image(random_images(2)).cls.sum().backward()
    assert len(calls) == 3
