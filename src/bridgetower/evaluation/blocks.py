"""Encodings of many items in blocks that fit a given memory; a block is kept until another one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bridgetower.model.encodings import Encoded


class BlockEncoder:
    """Encodes the items 0 to n - 1 block by block, as often as they are asked for.

    One block is in memory at a time. Where all items fit into one, each is encoded only once, however often the blocks
    are asked for.
    """

    def __init__(
        self, encode: Callable[[Sequence[int]], Encoded], num_items: int, *, block_size: int, batch_size: int
    ) -> None:
        """Plans the blocks.

        Args:
            encode: Encodes the items with these numbers.
            num_items: n.
            block_size: Items whose encodings fit into memory together.
            batch_size: Items that are encoded at once.
        """
        self._encode, self._num_items = encode, num_items
        self._block_size, self._batch_size = block_size, batch_size
        self._held: tuple[slice, Encoded] | None = None

    def blocks(self) -> Iterator[tuple[slice, Encoded]]:
        """Yields each block's item numbers and encodings; use one before asking for the next."""
        for start in range(0, self._num_items, self._block_size):
            items = slice(start, min(start + self._block_size, self._num_items))
            if self._held is None or self._held[0] != items:
                self._held = None  # makes room first
                self._held = (items, self._encode_block(range(items.start, items.stop)))
            yield self._held

    def vectors(self, embed: Callable[[Encoded], Tensor], width: int) -> Tensor:
        """Returns `embed` of all encodings [n, width] as float32 on the CPU."""
        parts = [embed(encoded).float().cpu() for _, encoded in self.blocks()]
        return torch.cat([torch.empty(0, width), *parts])

    def _encode_block(self, items: range) -> Encoded:
        starts = range(0, len(items), self._batch_size)
        return Encoded.cat([self._encode(items[start : start + self._batch_size]) for start in starts])
