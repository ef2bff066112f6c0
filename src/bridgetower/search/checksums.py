"""CRC-32s of the rows of an index, as Lance has no checksums."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, UInt32

from bridgetower.data.sets.store import CRC, crcs_of

ROW_CRC = "row_crc"
"""Column with the CRC-32 of `CHECKED`."""

CRCS = {"image_vector": CRC, "text_vectors": "text_crc", "pair_vectors": "pair_crc"}
"""Columns of vectors, each with the column of its CRC-32: a column of vectors is read without the others."""

# Columns that describe an image. The frame of a moment is left out, as `digest` checks it, and so are `version` and
# `part_size`, which only decide whether a file is read again.
CHECKED = (
    "path",
    "size",
    "mtime",
    "digest",
    "width",
    "height",
    "captions",
    "location",
    "start",
    "end",
    CRC,
)

_BETWEEN_COLUMNS = pa.scalar(b"\x1f", pa.large_binary())
_BETWEEN_CAPTIONS = pa.scalar(b"\x1e", pa.large_binary())


def with_crcs(rows: pa.Table) -> pa.Table:
    """Adds the columns of CRCs to whole rows."""
    # The CRC of the row covers that of the image's vector.
    image_crcs = crcs_of(rows["image_vector"])
    rows = rows.append_column(CRC, pa.array(image_crcs))
    row_crcs = _row_crcs(rows)
    rows = rows.append_column(ROW_CRC, pa.array(row_crcs))
    for name in ("text_vectors", "pair_vectors"):
        crcs = _vector_crcs(rows[name], row_crcs)
        rows = rows.append_column(CRCS[name], pa.array(crcs))
    return rows


def columns_to_check(columns: Sequence[str]) -> list[str]:
    """Returns the columns to read so that `damaged_rows` can check these columns."""
    crcs = [CRCS[name] for name in columns if name in CRCS]
    names = [*columns, *CHECKED, ROW_CRC, *crcs]
    return list(dict.fromkeys(names))  # each once


def damaged_rows(rows: pa.Table) -> list[int]:
    """Returns the indices of rows of which `CHECKED` or vectors differ from what was written."""
    row_crcs = rows[ROW_CRC].to_numpy()
    is_damaged = _row_crcs(rows) != row_crcs
    for name in CRCS.keys() & set(rows.column_names):
        if name == "image_vector":
            crcs = crcs_of(rows[name])
        else:
            crcs = _vector_crcs(rows[name], row_crcs)
        is_damaged |= crcs != rows[CRCS[name]].to_numpy()
    return np.flatnonzero(is_damaged).tolist()


def _row_crcs(rows: pa.Table) -> UInt32[np.ndarray, " n"]:
    columns = [_as_bytes(rows[name].combine_chunks()) for name in CHECKED]
    # Their number tells no captions from one empty caption.
    num_captions = pc.list_value_length(rows["captions"].combine_chunks())
    joined = pc.binary_join_element_wise(
        *columns,
        _as_bytes(num_captions),
        _BETWEEN_COLUMNS,
        null_handling="replace",
        null_replacement=b"",
    )
    # Read the joined bytes in place. Each end is an int64.
    num_rows = len(joined)
    _, offsets, content = joined.buffers()
    ends = np.frombuffer(offsets, np.int64, num_rows + 1, 8 * joined.offset)
    seeds = np.zeros(num_rows, np.uint32)
    return _span_crcs(memoryview(content or b""), ends, seeds)


def _as_bytes(column: pa.Array) -> pa.Array:
    """Returns each value in a form that no version of Arrow changes, numbers as integers, floats by their bits."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        captions = column.cast(pa.large_list(pa.large_binary()))
        return pc.binary_join(captions, _BETWEEN_CAPTIONS)
    if pa.types.is_floating(kind):
        column = column.view(pa.int64())
    elif pa.types.is_timestamp(kind):
        column = column.cast(pa.int64())
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    return column.cast(pa.large_binary())


def _vector_crcs(
    column: pa.ChunkedArray, row_crcs: UInt32[np.ndarray, " n"]
) -> UInt32[np.ndarray, " n"]:
    """Returns the CRCs of lists of vectors. Each continues that of its row, so that vectors belong to one row."""
    lists = column.combine_chunks()
    numbers = lists.flatten().flatten().to_numpy(zero_copy_only=False)
    content = np.ascontiguousarray(numbers, np.float32).data.cast("B")
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    ends = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    ends *= 4 * lists.type.value_type.list_size  # bytes of a vector
    return _span_crcs(content, ends, row_crcs)


def _span_crcs(
    content: memoryview, ends: Int64[np.ndarray, " n+1"], seeds: UInt32[np.ndarray, " n"]
) -> UInt32[np.ndarray, " n"]:
    """Returns the CRC-32 of each span between two ends, continued from a seed."""
    crcs = []
    spans = pairwise(ends.tolist())
    for (start, end), seed in zip(spans, seeds.tolist(), strict=True):
        crcs.append(zlib.crc32(content[start:end], seed))
    return np.array(crcs, np.uint32)
