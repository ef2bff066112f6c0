"""Columns of many rows in memory that forked processes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from jaxtyping import Int
from torch import Tensor

from bridgetower.data.tables import ParquetRows

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


class Column(Sequence[T]):
    """A column of texts or of lists of texts in one Arrow array.

    Ten million captions as Python objects take gigabytes, and every worker process copies them: reading an object
    writes to the count of its references, and so to its page of memory. An array is only read.
    """

    def __init__(self, array: pa.Array) -> None:
        self._array = array

    @classmethod
    def read(cls, tables: Sequence[ParquetRows], name: str) -> Column[Any]:
        """Reads one column of texts, or of lists of texts, of several tables, one after the other."""
        import pyarrow as pa

        found = [table.column(name) for table in tables]
        is_list = pa.types.is_list(found[0].type)
        kind = pa.large_list(pa.large_string()) if is_list else pa.large_string()  # of any size altogether
        array = pa.chunked_array(
            [chunk.cast(kind) for column in found for chunk in column.chunks], kind
        ).combine_chunks()
        del found
        pa.default_memory_pool().release_unused()
        return cls(array)

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Column[T]: ...

    def __getitem__(self, index: int | slice) -> T | Column[T]:
        """Returns the value of a row, or the column of some rows without copying it."""
        if isinstance(index, slice):
            return Column(self._array[index])
        value: T = self._array[index].as_py()
        return value

    def lengths(self) -> Int[Tensor, " n"]:
        """Returns the number of texts of each row of lists."""
        import pyarrow.compute as pc

        return torch.from_numpy(pc.list_value_length(self._array).to_numpy(zero_copy_only=False).copy())
