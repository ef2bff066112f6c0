"""Dropout: its rate, its scale, its gradient, and where its draws come from."""

import pytest
import torch
from torch import Tensor

from bridgetower.model.dropout import draw_kept, dropout

RATE = 0.3


def drawn(hidden: Tensor, rate: float = RATE, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return dropout(hidden, rate, training=True)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_at_every_place_of_a_draw(rate: float) -> None:
    """Four values share a draw of 64 bits, so each fourth is counted by itself."""
    torch.manual_seed(0)
    count = 400_000
    kept = draw_kept((count,), rate)
    assert set(kept.unique().tolist()) == {0, 1}
    for place in range(4):
        share = kept[place::4].double().mean()
        assert abs(share - (1 - rate)) < 5 * (rate * (1 - rate) / (count / 4)) ** 0.5


def test_values_that_share_a_draw_are_independent() -> None:
    torch.manual_seed(0)
    places = draw_kept((100_000, 4), 0.5).double()
    correlation = torch.corrcoef(places.T) - torch.eye(4)
    assert correlation.abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_are_zero_or_scaled(dtype: torch.dtype) -> None:
    hidden = torch.rand(50, 7, dtype=dtype) + 1
    output = drawn(hidden)
    assert output.dtype == dtype
    kept = output != 0
    assert 0 < kept.double().mean() < 1
    torch.testing.assert_close(output[kept], hidden[kept] / (1 - RATE))


def test_gradient_takes_the_same_draws() -> None:
    hidden = (torch.rand(50, 7) + 1).requires_grad_()
    output = drawn(hidden)
    output.sum().backward()
    torch.testing.assert_close(hidden.grad, (output != 0) / (1 - RATE))


def test_draws_follow_the_seed() -> None:
    hidden = torch.ones(3, 5)  # 15 values: not a multiple of four
    assert torch.equal(drawn(hidden), drawn(hidden))
    assert not torch.equal(drawn(hidden), drawn(hidden, seed=1))


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero() -> None:
    hidden = torch.ones(3, 5)
    assert dropout(hidden, RATE, training=False) is hidden
    assert dropout(hidden, 0.0, training=True) is hidden


def test_no_values() -> None:
    assert drawn(torch.ones(0, 4)).shape == (0, 4)
