"""All rows of one version of an index in memory, where they are compared and read much faster than within Lance."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.data.store import Table


class Memory:
    """Columns of a table, and its vectors, brought to length one."""

    def __init__(self, table: Table, columns: Sequence[str], vectors: str) -> None:
        self.table, self._columns, end = table, list(columns), 0
        self._vectors = np.empty((len(table), table.schema.field(vectors).type.list_size), np.float32)
        for batch in table.scan([vectors]):
            start, end = end, end + len(batch)
            part = batch[vectors].flatten().to_numpy().reshape(len(batch), -1)
            np.divide(part, np.linalg.norm(part, axis=1, keepdims=True), out=self._vectors[start:end])
        rows = pa.Table.from_batches(table.scan([*columns, "_rowid"]))
        captions = rows["captions"].cast(pa.large_list(pa.large_string()))  # which may be above 2 GiB
        self._rows = rows.set_column(rows.schema.get_field_index("captions"), "captions", captions).combine_chunks()
        self._ids, self._digests = self._rows["_rowid"].to_numpy(), self._rows["digest"]
        self._by_id, self._by_digest = np.argsort(self._ids), pc.sort_indices(self._digests).to_numpy()

    def nearest(self, vector: Float[Tensor, " c"], count: int) -> list[dict[str, Any]]:
        """Returns the rows with the largest cosines, these first."""
        cosines = self._vectors @ (vector / vector.norm()).numpy()
        last = min(count, len(cosines))
        near = np.flatnonzero(cosines >= np.partition(cosines, -last)[-last])  # quicker than argpartition
        near = near[np.argsort(-cosines[near], kind="stable")[:last]]
        rows = self._rows.select(self._columns).take(near).to_pylist()
        return [row | {"_distance": 1 - cosine} for row, cosine in zip(rows, cosines[near].tolist(), strict=True)]

    def with_ids(self, ids: Int[np.ndarray, " n"]) -> tuple[pa.Table, Float[np.ndarray, "n c"]]:
        """Returns the rows that have some ids within Lance, and their vectors."""
        places = self._by_id[np.searchsorted(self._ids, ids, sorter=self._by_id)]
        return self._rows.take(places), self._vectors[places]

    def with_digest(self, digest: str, most: int) -> pa.Table:
        """Returns up to so many rows that have a digest."""

        def key(row: int) -> str:
            return str(self._digests[row])

        start, end = bisect_left(self._by_digest, digest, key=key), bisect_right(self._by_digest, digest, key=key)
        return self._rows.select(self._columns).take(self._by_digest[start : min(end, start + most)])
