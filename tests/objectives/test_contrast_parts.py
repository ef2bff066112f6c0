"""The contrastive loss of a batch in parts against the loss of the whole, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bridgetower.objectives.losses import Features, contrast_parts, itc_loss

INDEX = torch.tensor([0, 1, 2, 0, 3])
SPLITS = ([5], [2, 3], [1, 1, 1, 1, 1])

Leaves = dict[str, Tensor]


@pytest.fixture(params=[("image", "text"), ("image", "text", "joint")], ids=["towers", "fused"])
def leaves(request):
    """Features before their normalisation, and the scale."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(5, 4, generator=generator) for name in request.param} | {"scale": torch.tensor(3.0)}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def features(leaves, rows):
    return Features(tuple(F.normalize(leaves[n][rows], dim=-1) for n in leaves if n != "scale"), INDEX[rows])


def slices(split):
    ends = torch.tensor(split).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, split, strict=True)]


def in_parts(leaves, split):
    with torch.no_grad():
        parts = [features(leaves, rows) for rows in slices(split)]
    contrasts = contrast_parts(parts, leaves["scale"])
    return contrasts, [
        contrast.through(features(leaves, rows).embeds, leaves["scale"])
        for contrast, rows in zip(contrasts, slices(split), strict=True)
    ]


def of_the_whole(leaves):
    loss = itc_loss(features(leaves, slice(0, 5)).embeds, INDEX, leaves["scale"])
    return loss, torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.parametrize("split", SPLITS)
def test_the_mean_over_the_parts_has_the_loss_and_the_gradients_of_the_whole(leaves, split):
    loss, gradients = of_the_whole(leaves)
    contrasts, losses = in_parts(leaves, split)
    for contrast, part in zip(contrasts, losses, strict=True):
        torch.testing.assert_close(part.detach(), loss.detach())
        assert not any(each.requires_grad for each in (contrast.loss, contrast.logit_scale, *contrast.embeds))
    found = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)
        assert float(theirs.abs().max()) > 1e-3


def test_control_each_part_on_its_own_differs(leaves):
    _, gradients = of_the_whole(leaves)
    losses = []
    for rows in slices([2, 3]):
        part = features(leaves, rows)
        losses.append(itc_loss(part.embeds, part.image_index, leaves["scale"]))
    found = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    assert float((found[0] - gradients[0]).abs().max()) > 1e-2
