"""Activations against their formulas, in place and their gradients against automatic ones."""

import pytest
import torch
import torch.nn.functional as F

import tiny
from bridgetower.model.activation import activated, activated_, activation_gradient
from bridgetower.model.config import Activation

VALUES = torch.linspace(-6, 6, 50, dtype=torch.float64)


def test_formulas() -> None:
    assert tiny.off(activated(VALUES, "gelu"), 0.5 * VALUES * (1 + torch.erf(VALUES / 2**0.5))) < 1e-12
    assert tiny.off(activated(VALUES, "quick_gelu"), VALUES / (1 + torch.exp(-1.702 * VALUES))) < 1e-12


def test_quick_gelu_is_an_approximation() -> None:
    assert 1e-3 < tiny.off(activated(VALUES, "quick_gelu"), F.gelu(VALUES)) < 0.03
    assert activated(torch.zeros(3), "quick_gelu").tolist() == [0, 0, 0]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
class TestForms:
    def test_in_place(self, activation: Activation) -> None:
        place = VALUES.clone()
        assert tiny.off(activated_(place, activation), activated(VALUES, activation)) < 1e-12
        assert tiny.off(place, activated(VALUES, activation)) < 1e-12

    def test_gradient(self, activation: Activation) -> None:
        hidden, outer = VALUES.clone().requires_grad_(), VALUES.cos()
        (automatic,) = torch.autograd.grad(activated(hidden, activation), hidden, outer)
        assert tiny.off(activation_gradient(outer, VALUES, activation), automatic) < 1e-12
