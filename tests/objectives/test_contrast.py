"""The contrastive loss of a batch in parts against the loss of the whole, values and gradients."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bridgetower.objectives.contrast import Contrast, Features, contrast_parts
from bridgetower.objectives.losses import itc_loss

INDEX = torch.tensor([0, 1, 2, 0, 3])
SPLITS = ([5], [2, 3], [1, 1, 1, 1, 1])


@pytest.fixture
def leaves() -> dict[str, Tensor]:
    """Features before their normalisation, and the scale."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(5, 4, generator=generator) for name in ("image", "text")} | {
        "scale": torch.tensor(3.0)
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def features(leaves: dict[str, Tensor], rows: slice) -> Features:
    return Features(F.normalize(leaves["image"][rows], dim=-1), F.normalize(leaves["text"][rows], dim=-1), INDEX[rows])


def slices(split: list[int]) -> list[slice]:
    ends = torch.tensor(split).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, split, strict=True)]


def in_parts(leaves: dict[str, Tensor], split: list[int]) -> tuple[list[Contrast], list[Tensor]]:
    with torch.no_grad():
        parts = [features(leaves, rows) for rows in slices(split)]
    contrasts = contrast_parts(parts, leaves["scale"])
    losses = []
    for contrast, rows in zip(contrasts, slices(split), strict=True):
        part = features(leaves, rows)
        losses.append(contrast.through(part.image_embeds, part.text_embeds, leaves["scale"]))
    return contrasts, losses


def of_the_whole(leaves: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    whole = features(leaves, slice(0, 5))
    loss = itc_loss(whole.image_embeds, whole.text_embeds, INDEX, leaves["scale"])
    return loss, torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.parametrize("split", SPLITS)
def test_the_mean_over_the_parts_has_the_loss_and_the_gradients_of_the_whole(
    leaves: dict[str, Tensor], split: list[int]
) -> None:
    loss, gradients = of_the_whole(leaves)
    _, losses = in_parts(leaves, split)
    for part in losses:
        torch.testing.assert_close(part.detach(), loss.detach())
    found = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)
        assert float(theirs.abs().max()) > 1e-3


def test_control_each_part_on_its_own_differs(leaves: dict[str, Tensor]) -> None:
    _, gradients = of_the_whole(leaves)
    losses = []
    for rows in slices([2, 3]):
        part = features(leaves, rows)
        losses.append(itc_loss(part.image_embeds, part.text_embeds, part.image_index, leaves["scale"]))
    found = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    assert float((found[0] - gradients[0]).abs().max()) > 1e-2


def test_nothing_of_a_graph_is_kept(leaves: dict[str, Tensor]) -> None:
    contrasts, _ = in_parts(leaves, [2, 3])
    for contrast in contrasts:
        tensors = [value for value in vars(contrast).values() if isinstance(value, Tensor)]
        assert not any(tensor.requires_grad for tensor in tensors)
        assert replace(contrast).num_parts == 2
