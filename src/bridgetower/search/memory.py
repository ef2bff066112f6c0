"""All rows of one version of an index in memory, where they are compared and read much faster than within Lance."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.data.sets.store import Table


class Memory:
    """Columns of a table, and its vectors, brought to length one, also in int8, which all are compared in first."""

    def __init__(self, table: Table, batches: Iterable[pa.Table], vectors: str) -> None:
        """Reads batches of rows of a table, which have its row ids and vectors."""
        self.table = table
        width = table.schema.field(vectors).type.list_size
        self._vectors = np.empty((len(table), width), np.float32)
        padded = 16 * math.ceil(width / 16)  # the product reads 16 numbers at once
        self._int8 = torch.from_numpy(np.zeros((len(table), padded), np.int8))
        self._scales, self._error = torch.empty(len(table), dtype=torch.bfloat16), np.float32(0)
        kept, end = list[pa.Table](), 0
        for batch in batches:
            start, end = end, end + len(batch)
            part = batch[vectors].combine_chunks().flatten().to_numpy().reshape(len(batch), -1)
            np.divide(
                part, np.linalg.norm(part, axis=1, keepdims=True), out=self._vectors[start:end]
            )
            unit = torch.from_numpy(self._vectors[start:end])
            self._scales[start:end] = unit.abs().amax(dim=1) / 127
            scales = self._scales[start:end, None].float()
            rounded = (unit / scales).round().clamp(-127, 127)
            self._int8[start:end, :width] = rounded
            self._error = np.max((unit - rounded * scales).norm(dim=1).numpy(), initial=self._error)
            kept.append(batch.drop_columns([vectors]))
        rows = pa.concat_tables(kept)
        captions = rows["captions"].cast(
            pa.large_list(pa.large_string())
        )  # which may be above 2 GiB
        self._rows = rows.set_column(
            rows.schema.get_field_index("captions"), "captions", captions
        ).combine_chunks()
        self._columns = [name for name in rows.column_names if name != "_rowid"]
        self._ids, self._digests = self._rows["_rowid"].to_numpy(), self._rows["digest"]
        self._by_id, self._by_digest = (
            np.argsort(self._ids),
            pc.sort_indices(self._digests).to_numpy(),
        )

    def nearest(self, vector: Float[Tensor, " c"], count: int) -> list[dict[str, Any]]:
        """Returns the rows with the largest cosines, these first.

        Rows whose cosine in int8 is too small, by more than twice its largest error, cannot be among them; only the
        others are compared in float32.
        """
        unit, last = vector / vector.norm(), min(count, len(self._int8))
        query = F.pad(unit, (0, self._int8.shape[1] - len(unit)))[None].bfloat16()
        rounding = (query[0, : len(unit)] - unit).norm().item() + 2**-8
        error = self._error + (1 + self._error) * rounding
        about = torch._weight_int8pack_mm(query, self._int8, self._scales)[0]
        part = max(
            1, len(about) // (16 * last)
        )  # the largest of each part is found quicker than the largest of all
        largest = about[: len(about) // part * part].view(-1, part).amax(dim=1).topk(last).values
        near = (about >= largest[-1] - 2 * error).nonzero()[:, 0].numpy()
        few = 8 * len(near) < len(about)  # else copying them takes longer
        cosines = (
            self._vectors[near] @ unit.numpy() if few else (self._vectors @ unit.numpy())[near]
        )
        best = np.argsort(-cosines, kind="stable")[:last]
        rows = self._rows.select(self._columns).take(near[best]).to_pylist()
        return [
            row | {"_distance": 1 - cosine}
            for row, cosine in zip(rows, cosines[best].tolist(), strict=True)
        ]

    def with_ids(self, ids: Int[np.ndarray, " n"]) -> tuple[pa.Table, Float[np.ndarray, "n c"]]:
        """Returns the rows that have some ids within Lance, and their vectors."""
        places = self._by_id[np.searchsorted(self._ids, ids, sorter=self._by_id)]
        return self._rows.take(places), self._vectors[places]

    def with_digest(self, digest: str, most: int) -> pa.Table:
        """Returns up to so many rows that have a digest."""

        def key(row: int) -> str:
            return str(self._digests[row])

        start, end = (
            bisect_left(self._by_digest, digest, key=key),
            bisect_right(self._by_digest, digest, key=key),
        )
        return self._rows.select(self._columns).take(
            self._by_digest[start : min(end, start + most)]
        )
