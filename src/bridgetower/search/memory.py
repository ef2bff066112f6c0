"""All rows of one version of an index in memory, where they are searched much faster than within Lance."""

from __future__ import annotations

import math
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
    """Columns of a table, and its vectors at length one: in float32, and in int8 for the first comparison."""

    def __init__(self, table: Table, batches: Iterable[pa.Table], column: str) -> None:
        """Copies batches of rows of a table, with their row ids and a column of vectors."""
        self.table = table
        num_rows = len(table)
        width = table.schema.field(column).type.list_size
        padded_width = 16 * math.ceil(width / 16)  # the product reads 16 numbers at once
        self._vectors = np.empty((num_rows, width), np.float32)
        self._int8 = torch.from_numpy(np.zeros((num_rows, padded_width), np.int8))
        self._scales = torch.empty(num_rows, dtype=torch.bfloat16)
        self._error = np.float32(0)  # largest distance of a vector from its int8 form
        tables = []
        start = 0
        for batch in batches:
            rows = slice(start, start + len(batch))
            flat = batch[column].combine_chunks().flatten()
            vectors = flat.to_numpy().reshape(-1, width)
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            np.divide(vectors, lengths, out=self._vectors[rows])

            # Each vector has a scale that maps its largest number to 127.
            unit = torch.from_numpy(self._vectors[rows])
            largest = unit.abs().amax(dim=1)
            self._scales[rows] = largest / 127
            scales = self._scales[rows, None].float()
            scaled = unit / scales
            rounded = scaled.round().clamp(-127, 127)
            self._int8[rows, :width] = rounded
            distances = (unit - rounded * scales).norm(dim=1)
            self._error = np.max(distances.numpy(), initial=self._error)

            tables.append(batch.drop_columns([column]))
            start = rows.stop

        table_rows = pa.concat_tables(tables)
        self._columns = [name for name in table_rows.column_names if name != "_rowid"]
        # All captions together may have more than 2 GiB.
        captions = table_rows["captions"].cast(pa.large_list(pa.large_string()))
        position = table_rows.schema.get_field_index("captions")
        table_rows = table_rows.set_column(position, "captions", captions)
        self._rows = table_rows.combine_chunks()
        self._ids = self._rows["_rowid"].to_numpy()
        self._order_of_ids = np.argsort(self._ids)

    def nearest(self, vector: Float[Tensor, " c"], count: int) -> list[dict[str, Any]]:
        """Returns the rows with the largest cosines, largest first.

        Rows whose cosine in int8 is too small, by more than twice its largest error, cannot be among them. The
        others are compared in float32.
        """
        num_rows, padded_width = self._int8.shape
        count = min(count, num_rows)
        unit = vector / vector.norm()
        width = len(unit)

        # Compare with the vectors in int8.
        padded = F.pad(unit, (0, padded_width - width))
        query = padded[None].bfloat16()
        if hasattr(torch, "_weight_int8pack_mm"):
            products = torch._weight_int8pack_mm(query, self._int8, self._scales)
            approximate = products[0]
        else:  # a release of PyTorch without this private operator
            products = query.float() @ self._int8.T.float()
            approximate = products[0] * self._scales
        rounding = (query[0, :width] - unit).norm().item() + 2**-8
        error = self._error + (1 + self._error) * rounding

        # The largest of each group are found faster than the largest of all, and give a lower limit for them.
        group_size = max(1, num_rows // (16 * count))
        num_groups = num_rows // group_size
        groups = approximate[: num_groups * group_size].view(num_groups, group_size)
        largest_of_groups = groups.amax(dim=1)
        limit = largest_of_groups.topk(count).values[-1] - 2 * error
        near = (approximate >= limit).nonzero()[:, 0].numpy()

        # To copy many vectors takes longer than to compare all.
        if 8 * len(near) < num_rows:
            cosines = self._vectors[near] @ unit.numpy()
        else:
            all_cosines = self._vectors @ unit.numpy()
            cosines = all_cosines[near]
        best = np.argsort(-cosines, kind="stable")[:count]
        rows = self._rows.select(self._columns).take(near[best])
        best_rows = rows.to_pylist()
        for row, cosine in zip(best_rows, cosines[best].tolist(), strict=True):
            row["_distance"] = 1 - cosine
        return best_rows

    def with_ids(self, ids: Int[np.ndarray, " n"]) -> tuple[pa.Table, Float[np.ndarray, "n c"]]:
        """Returns the rows with these ids of Lance, and their vectors."""
        positions = np.searchsorted(self._ids, ids, sorter=self._order_of_ids)
        indices = self._order_of_ids[positions]
        return self._rows.take(indices), self._vectors[indices]

    def with_digest(self, digest: str, limit: int) -> pa.Table:
        """Returns up to `limit` rows with a digest."""
        rows = self._rows.select(self._columns)
        valid_digest = digest.encode(errors="replace").decode()  # Arrow takes no half surrogates
        has_digest = pc.equal(rows["digest"], valid_digest)
        return rows.filter(has_digest).slice(0, limit)
