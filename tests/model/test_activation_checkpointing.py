"""Activation checkpointing: the same bits, those of dropout included, and less that is kept for the gradients."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import tiny
from bridgetower.model.config import Part
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask

PARTS: tuple[Part, ...] = ("vision", "text", "fusion")
CHOICES: list[tuple[Part, ...]] = [("vision",), ("text",), ("fusion",), PARTS]
PHASES = {
    "contrast only": Phase(mlm=0.0, itm=0.0, itc=1.0),
    "everything": Phase(mlm=1.0, itm=1.0, itc=1.0, negatives="hard"),
}


@contextmanager
def kept(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collects the sizes of what autograd keeps beside the weights, in bytes, by address."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def step(
    parts: Collection[Part], phase: Phase, *, dropout: float = 0.2, seed: int = 0
) -> tuple[dict[str, Tensor], int]:
    """Returns the gradients of a step, and how many bytes were kept for them."""
    model = tiny.build(tiny.changed(text__dropout=dropout, fusion__dropout=dropout)).train()
    model.checkpoint_activations(parts)
    task = PretrainingTask(model, PretrainingConfig(phases=(phase,)))
    torch.manual_seed(seed)
    with kept(model) as sizes:
        losses = task(tiny.caption_batch((0, 1, 2, 3), (5, 3, 4, 6)))
    losses.total.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return gradients, sum(sizes.values())


@pytest.mark.parametrize(
    ("parts", "phase", "dropout"),
    [*((parts, "everything", 0.2) for parts in CHOICES), (PARTS, "everything", 0.0), (PARTS, "contrast only", 0.2)],
)
def test_gradients_are_the_same_bits(parts: tuple[Part, ...], phase: str, dropout: float) -> None:
    ours, theirs = (step(some, PHASES[phase], dropout=dropout)[0] for some in (parts, ()))
    assert tiny.equal(ours, theirs)


def test_control_other_draws_of_dropout_give_other_gradients() -> None:
    one, other = (step(PARTS, PHASES["everything"], seed=seed)[0] for seed in (0, 1))
    assert not tiny.equal(one, other)


def test_every_part_keeps_less() -> None:
    plain = step((), PHASES["everything"])[1]
    sizes = {parts: step(parts, PHASES["everything"])[1] for parts in CHOICES}
    assert all(size < 0.95 * plain for size in sizes.values())
    assert sizes[PARTS] < 0.4 * plain


def test_the_starts_of_the_first_fusion_layer_keep_less_too() -> None:
    """Without dropout, texts and images share what the first fusion layer computes of each alone."""
    plain, less = (step(parts, PHASES["everything"], dropout=0.0)[1] for parts in ((), ("fusion",)))
    assert less < 0.8 * plain


def test_nothing_is_computed_twice_without_gradients() -> None:
    model = tiny.build().train()
    model.checkpoint_activations(PARTS)
    calls: list[nn.Module] = []
    model.vision.layers[0].register_forward_pre_hook(lambda layer, inputs: calls.append(layer))
    with torch.no_grad():
        model.encode_image(tiny.images(2))
    assert len(calls) == 1
    model.encode_image(tiny.images(2)).cls.sum().backward()
    assert len(calls) == 3
