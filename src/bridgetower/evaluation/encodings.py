"""Encodings of many items, made once, kept in memory or in memory-mapped files, and taken in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from bridgetower.model.encodings import Encoded
from bridgetower.model.fusion import FirstLayerCache
from bridgetower.rows import Rows

Encode = Callable[[Sequence[range]], Iterator[Encoded]]
"""Encodes batches of items."""

Embed = Callable[[Encoded], Float[Tensor, "b c"]]
"""Gives the contrastive vectors of encodings."""

# Fields of the rows. Layers and the attended stream of a start lie side by side, and so do query, key and value, which
# can have another precision.
_STREAM, _START, _CLS, _VECTOR = "stream", "start", "cls", "vector"


class Encodings:
    """Encodings of the items 0 to n - 1, their contrastive vectors, or both."""

    def __init__(
        self,
        encode: Encode,
        *,
        batch_size: int,
        kept: Rows | None = None,
        vectors: tuple[Embed, Rows] | None = None,
    ) -> None:
        """Plans them.

        Args:
            encode: Encodes batches of items.
            batch_size: Items that are encoded at once.
            kept: Where encodings are kept; None where only vectors are wanted.
            vectors: How vectors are made and where they are kept, in the same parts; None where they are not wanted.
        """
        self._encode, self._batch_size, self._kept, self._vectors = encode, batch_size, kept, vectors

    def fill(self, advance: Callable[[int], object], *, encodings: bool = True) -> None:
        """Encodes what is not there yet, each item once for both its encoding and its vector.

        Args:
            advance: Is told how many items more are encoded.
            encodings: False: only items without a vector.
        """
        wanted = ([self._kept] if encodings and self._kept else []) + ([self._vectors[1]] if self._vectors else [])
        missing = sorted({number for rows in wanted for number in rows.missing()})
        parts = [wanted[0].rows_of(number) for number in missing]
        size = self._batch_size
        encoded = self._encode([part[i : i + size] for part in parts for i in range(0, len(part), size)])
        for number, part in zip(missing, parts, strict=True):
            batches: list[Encoded] = []
            vectors: list[Tensor] = []
            for batch in islice(encoded, -(-len(part) // size)):
                if self._vectors is not None:
                    vectors += self._vectors[0](batch).float().cpu().split(1)
                batches.append(batch.map(Tensor.cpu))
                advance(len(batch))
            self._write(number, batches, vectors)

    def vectors(self, size: int) -> Float[Tensor, "n c"]:
        """Returns all vectors, each of `size` numbers, which are there after `fill`; a process may have none."""
        assert self._vectors is not None
        rows = self._vectors[1]
        return torch.cat([torch.empty(0, size), *rows.read(_VECTOR, range(len(rows)))])

    def take(self, items: Sequence[int], device: torch.device) -> Encoded:
        """Returns the encodings of some items, which are there after `fill`; texts are filled up to the longest."""
        assert self._kept is not None
        streams = list(self._kept.read(_STREAM, items))
        stream, start = _padded(streams).to(device), _padded(list(self._kept.read(_START, items))).to(device)
        lengths = torch.tensor([len(row) for row in streams])
        longest = stream.shape[1]
        mask = None if bool((lengths == longest).all()) else (torch.arange(longest) < lengths[:, None]).to(device)
        *layers, attended = stream.unbind(2)
        return Encoded(
            layers=tuple(layers),
            cls=torch.cat(list(self._kept.read(_CLS, items))).to(device),
            mask=mask,
            first_layer_cache=FirstLayerCache(attended, start[:, :, 0], start[:, :, 1:].flatten(2)),
        )

    def _write(self, number: int, batches: Sequence[Encoded], vectors: Sequence[Tensor]) -> None:
        """Keeps a part, as far as it is not there."""
        if self._kept is not None and number in self._kept.missing():
            fields: dict[str, list[Tensor]] = {_STREAM: [], _START: [], _CLS: []}
            for batch in batches:
                for name, values in _rows(batch).items():
                    fields[name] += values
            self._kept.write(number, fields)
        if self._vectors is not None and number in self._vectors[1].missing():
            self._vectors[1].write(number, {_VECTOR: vectors})


def _rows(batch: Encoded) -> dict[str, list[Tensor]]:
    """Cuts a batch with starts into the fields of its rows, without what is padded."""
    start = batch.first_layer_cache
    assert start is not None
    stream = torch.stack([*batch.layers, start.attended], dim=2)  # [B, L, K + 1, D]
    key, value = start.key_value.chunk(2, dim=-1)
    start_rows = torch.stack([start.query, key, value], dim=2)  # [B, L, 3, D]
    lengths = [stream.shape[1]] * len(batch) if batch.mask is None else batch.mask.sum(dim=1).tolist()
    return {
        _STREAM: [row[:length] for row, length in zip(stream, lengths, strict=True)],
        _START: [row[:length] for row, length in zip(start_rows, lengths, strict=True)],
        _CLS: list(batch.cls.split(1)),
    }


def _padded(rows: Sequence[Tensor]) -> Tensor:
    whole = rows[0].new_zeros(len(rows), max(map(len, rows)), *rows[0].shape[1:])
    for place, row in enumerate(rows):
        whole[place, : len(row)] = row
    return whole
