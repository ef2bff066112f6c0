"""Rows of a Parquet file without a copy of it."""

import pickle
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgetower.data.parquet import ParquetRows
from bridgetower.data.records import Record, write_split
from bridgetower.data.splits import read_split

SIZE = 20_000
NUM_ROWS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of 1 MB in 13 row groups of four pictures, the last of two."""
    path, source = tmp_path_factory.mktemp("set"), random.Random(0)
    records = (
        Record(image=source.randbytes(SIZE), file_name=f"{n}.jpg", image_id=f"id-{n}", captions=(f"a {n}", "any"))
        for n in range(NUM_ROWS)
    )
    write_split(path / "train.parquet", records, row_group_bytes=4 * SIZE)
    return path


@pytest.fixture
def rows(folder: Path) -> ParquetRows:
    return read_split(folder, "train")


class TestRows:
    def test_each_is_that_of_the_whole_table(self, rows: ParquetRows, folder: Path) -> None:
        table = pq.read_table(folder / "train.parquet").to_pylist()
        numbers = list(range(NUM_ROWS))
        random.Random(1).shuffle(numbers)
        assert len(rows) == NUM_ROWS
        assert [rows.row(number) for number in numbers] == [table[number] for number in numbers]
        assert rows.column("captions") == [row["captions"] for row in table]

    def test_some_columns(self, rows: ParquetRows) -> None:
        assert rows.row(5, ["image_id", "captions"]) == {"image_id": "id-5", "captions": ["a 5", "any"]}
        assert rows.row(49, ["image"])["image"]["path"] == "49.jpg"

    @pytest.mark.parametrize("number", [-1, NUM_ROWS])
    def test_no_such_row(self, rows: ParquetRows, number: int) -> None:
        with pytest.raises(IndexError, match=rf"row {number} of .*train\.parquet; there are 50"):
            rows.row(number)

    def test_can_be_sent_to_another_process(self, rows: ParquetRows) -> None:
        assert pickle.loads(pickle.dumps(rows)).row(7) == rows.row(7)


class TestKept:
    @pytest.fixture(params=[False, True])
    def kept(self, folder: Path, request: pytest.FixtureRequest) -> ParquetRows:
        kept = ParquetRows([folder / "train.parquet"], keep=True)
        return pickle.loads(pickle.dumps(kept)) if request.param else kept

    def test_the_same_rows(self, kept: ParquetRows, rows: ParquetRows) -> None:
        for number in (7, 6, 49, 7):
            assert kept.row(number) == rows.row(number)
            assert kept.row(number, ["image_id"]) == {"image_id": f"id-{number}"}

    def test_a_group_is_read_once(self, kept: ParquetRows) -> None:
        before = pa.total_allocated_bytes()
        kept.row(4)
        once = pa.total_allocated_bytes() - before
        assert once > 2 * SIZE
        for _ in range(3):
            kept.row(5)
        assert pa.total_allocated_bytes() - before == once


class TestNoCopy:
    def test_in_memory(self, folder: Path) -> None:
        before = pa.total_allocated_bytes()
        rows = read_split(folder, "train")
        for number in range(NUM_ROWS):
            rows.row(number)
            assert pa.total_allocated_bytes() - before < 2 * SIZE
        table = pq.read_table(folder / "train.parquet", memory_map=True)
        assert pa.total_allocated_bytes() - before > NUM_ROWS * SIZE  # what reading it in one piece takes
        del table

    def test_on_the_disk(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
        rows = read_split(folder, "train")
        assert rows.row(3)["image_id"] == "id-3"
        assert not list(tmp_path.iterdir())
        datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=None)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.arrow")) > NUM_ROWS * SIZE  # what is avoided
