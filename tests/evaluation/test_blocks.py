"""Encodings in blocks: every item in its place, and nothing encoded again that is still there."""

from collections.abc import Sequence

import pytest
import torch

from bridgetower.evaluation.blocks import BlockEncoder
from bridgetower.model.encodings import Encoded


class Counting:
    """Encodes an item as its number, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, items: Sequence[int]) -> Encoded:
        self.asked.append(list(items))
        values = torch.tensor(items, dtype=torch.float32)[:, None]
        return Encoded((values[:, None],), values)


@pytest.mark.parametrize(("block_size", "batch_size"), [(7, 7), (7, 3), (3, 3), (4, 2), (100, 100)])
def test_items_are_in_order_whatever_the_blocks(block_size: int, batch_size: int) -> None:
    encoder = BlockEncoder(Counting(), 7, block_size=block_size, batch_size=batch_size)
    blocks = [(items, encoded.cls[:, 0].tolist()) for items, encoded in encoder.blocks()]
    assert [list(range(items.start, items.stop)) for items, _ in blocks] == [values for _, values in blocks]
    assert [value for _, values in blocks for value in values] == list(range(7))
    assert encoder.vectors(lambda encoded: encoded.cls, 1)[:, 0].tolist() == list(range(7))


def test_one_block_is_encoded_once() -> None:
    encode = Counting()
    encoder = BlockEncoder(encode, 5, block_size=5, batch_size=2)
    for _ in range(3):
        list(encoder.blocks())
    assert encode.asked == [[0, 1], [2, 3], [4]]


def test_several_blocks_are_encoded_at_each_pass() -> None:
    encode = Counting()
    encoder = BlockEncoder(encode, 5, block_size=3, batch_size=3)
    for _ in range(2):
        list(encoder.blocks())
    assert encode.asked == [[0, 1, 2], [3, 4]] * 2


def test_no_items() -> None:
    encoder = BlockEncoder(Counting(), 0, block_size=3, batch_size=3)
    assert list(encoder.blocks()) == []
    assert encoder.vectors(lambda encoded: encoded.cls, 4).shape == (0, 4)
