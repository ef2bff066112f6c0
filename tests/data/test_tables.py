"""Rows of Parquet and Arrow files: read where they lie, with bounded memory; images of others are left there."""

import math
import pickle
import random
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgetower.data import images as image_sources
from bridgetower.data.cells import rows_of
from bridgetower.data.images import ImageRef, open_table, parquet_rows
from bridgetower.data.parquet import ParquetRows
from miniature import jpeg, links, write_tables
from rows import png

SIZE = 20_000
NUM_ROWS = 50


def test_row_groups_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tables(tmp_path, links(8))
    rows = list(parquet_rows(tmp_path / "00000.parquet"))
    assert [row["url"] for row in rows] == [url for url, _ in links(8)]
    assert [isinstance(row["jpg"], ImageRef) for row in rows] == [n not in (3, 7) for n in range(8)]
    assert [row["jpg"].cell for row in rows if row["jpg"]] == [("jpg", n) for n in (0, 1, 2, 4, 5, 6)]
    assert [row["jpg"].read() for row in rows if row["jpg"]] == [jpeg(n) for n in (0, 1, 2, 4, 5, 6)]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("limit", [2**26, 10])
def test_both_ways_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(image_sources, "MAX_GROUP_BYTES", limit)
    cells = [{"bytes": png(1), "path": "a/x.png"}, {"bytes": None, "path": "b.png"}, {"bytes": png(2), "path": None}]
    table = pa.table({"image": cells, "text": ["r", None, "b"]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    first, second, third = parquet_rows(tmp_path / "t.parquet")
    assert isinstance(open_table(tmp_path / "t.parquet"), ParquetRows) == (limit > 10)
    assert first["image"].read() == ImageRef.unpacked(first["image"].packed()).read() == png(1)
    assert first["image"].file_name == "x.png"
    assert (second["image"], second["text"]) == ("b.png", None)
    assert third["image"].read() == png(2)
    assert third["image"].file_name == third["image"].name != first["image"].name
    images, rows = rows_of(tmp_path / "t.parquet")
    cell, path, other = (row["image"] for _, row in rows)
    assert (images, path) == (["image"], "b.png")
    assert (cell.read(), other.read()) == (png(1), png(2))


def test_listing_reads_no_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": png(1)}]}), tmp_path / "t.parquet")
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[4:40] = b"\xff" * 36  # where the pages begin; what is in the file is told at its end
    (tmp_path / "t.parquet").write_bytes(content)
    [(_, row)] = rows_of(tmp_path / "t.parquet")[1]
    with pytest.raises(OSError, match="page header"):
        row["image"].read()


def test_the_copy_of_a_file_with_large_groups_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, table = tmp_path / "cache", tmp_path / "data.parquet"
    datasets.Dataset.from_dict({"img": [png(3)], "text": ["r"]}).to_parquet(str(table))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(image_sources, "MAX_GROUP_BYTES", 10)
    with caplog.at_level("INFO"):
        list(parquet_rows(table))
    assert f"{table} is copied to {cache} unless" in caplog.text
    assert len(list(cache.rglob("*.arrow"))) == 1


def test_a_value_of_many_rows_is_in_memory_once(tmp_path: Path) -> None:
    """A file of some kilobytes, of which a row group would be 900 MB."""
    cell = {"bytes": png(1) + bytes(2**16), "path": "a.png"}
    caption = "long " * 10_000
    table = pa.concat_tables([pa.table({"image": [cell] * 400, "caption": [caption] * 400})] * 20)
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd")
    assert (tmp_path / "t.parquet").stat().st_size < 2**16
    del table
    before = pa.total_allocated_bytes()
    rows = list(islice(parquet_rows(tmp_path / "t.parquet"), 3))
    assert pa.total_allocated_bytes() - before < 2**24
    assert [row["caption"] for row in rows] == [caption] * 3
    assert rows[2]["image"].read() == cell["bytes"]


@pytest.mark.parametrize("kind", ["zeros", "nulls"])
def test_what_unpacks_to_much_more_is_refused(tmp_path: Path, kind: str) -> None:
    zeros, nulls = pa.array([bytes(2**27)], pa.binary()), pa.nulls(2**20, pa.string())
    column = pa.chunked_array([zeros] * 3 if kind == "zeros" else [nulls] * 33)
    pq.write_table(
        pa.table({"image": column}),
        tmp_path / "t.parquet",
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
    )
    with pytest.raises(
        ValueError, match=r"t\.parquet would be \d+ bytes unpacked, more than 64 times its \d+; expected"
    ):
        next(parquet_rows(tmp_path / "t.parquet"))


def test_what_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no Parquet file"):
        list(parquet_rows(tmp_path / "a.parquet"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of 1 MB in 13 row groups of four pictures, the last of two."""
    path, source = tmp_path_factory.mktemp("set"), random.Random(0)
    rows = [
        {
            "image": {"bytes": source.randbytes(SIZE), "path": f"{n}.jpg"},
            "image_id": f"id-{n}",
            "captions": [f"a {n}", "any"],
        }
        for n in range(NUM_ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "train.parquet", row_group_size=4)
    return path


@pytest.fixture
def rows(folder: Path) -> ParquetRows:
    return ParquetRows([folder / "train.parquet"])


class TestRows:
    def test_each_is_that_of_the_whole_table(self, rows: ParquetRows, folder: Path) -> None:
        table = pq.read_table(folder / "train.parquet").to_pylist()
        numbers = list(range(NUM_ROWS))
        random.Random(1).shuffle(numbers)
        assert len(rows) == NUM_ROWS
        assert [rows.row(number) for number in numbers] == [table[number] for number in numbers]

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
        kept = ParquetRows([folder / "train.parquet"], keep=math.inf)
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
        rows = ParquetRows([folder / "train.parquet"])
        for number in range(NUM_ROWS):
            rows.row(number)
            assert pa.total_allocated_bytes() - before < 2 * SIZE
        table = pq.read_table(folder / "train.parquet", memory_map=True)
        assert pa.total_allocated_bytes() - before > NUM_ROWS * SIZE  # what reading it in one piece takes
        del table

    def test_on_the_disk(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
        rows = ParquetRows([folder / "train.parquet"])
        assert rows.row(3)["image_id"] == "id-3"
        assert not list(tmp_path.iterdir())
        datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=None)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.arrow")) > NUM_ROWS * SIZE  # what is avoided


def test_a_table_that_is_written_again_is_read_anew(tmp_path: Path) -> None:
    for number in (1, 22):
        datasets.Dataset.from_dict({"img": [bytes(number)]}).to_parquet(str(tmp_path / "t.parquet"))
        assert [len(row["img"].read()) for row in parquet_rows(tmp_path / "t.parquet")] == [number]
