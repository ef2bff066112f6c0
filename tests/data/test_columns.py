"""Columns of Arrow arrays are read as sequences of texts or of lists of texts."""

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgetower.data.parquet import Column, ParquetRows

IDS = ["a", "", "ü", "d"]
CAPTIONS = [["one", "two"], ["three"], [], ["four", "", "six"]]


@pytest.fixture
def tables(tmp_path: Path) -> list[ParquetRows]:
    """The rows in two tables, the first of two files; a file has row groups of one row."""
    paths = [tmp_path / f"{number}.parquet" for number in range(3)]
    for path, rows in zip(paths, (slice(0, 2), slice(2, 3), slice(3, 4)), strict=True):
        captions = pa.array(CAPTIONS[rows], pa.list_(pa.string()))
        pq.write_table(pa.table({"id": IDS[rows], "captions": captions}), path, row_group_size=1)
    return [ParquetRows(paths[:2]), ParquetRows(paths[2:])]


def test_rows_of_several_tables_come_in_order(tables: list[ParquetRows]) -> None:
    ids, captions = Column.read(tables, "id"), Column.read(tables, "captions")
    assert (list(ids), list(captions)) == (IDS, CAPTIONS)
    assert (len(ids), ids[-1], captions[3]) == (4, "d", CAPTIONS[3])
    assert captions.lengths().tolist() == [2, 1, 0, 3]
    with pytest.raises(IndexError):
        ids[4]


def test_parts_are_columns(tables: list[ParquetRows]) -> None:
    part = Column.read(tables, "captions")[1:]
    assert list(part) == CAPTIONS[1:]
    assert part.lengths().tolist() == [1, 0, 3]
    assert list(part[-1:]) == CAPTIONS[-1:]


def test_workers_that_are_started_anew_get_a_copy(tables: list[ParquetRows]) -> None:
    column = Column.read(tables, "captions")
    assert list(pickle.loads(pickle.dumps(column))) == CAPTIONS
