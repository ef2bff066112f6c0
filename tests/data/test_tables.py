"""Parquet files from elsewhere: pictures are left where they are."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgetower.data import tables
from bridgetower.data.locations import CellPicture, unpacked
from bridgetower.data.tables import parquet_rows
from miniature import links, write_tables
from rows import png


def test_row_groups_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tables(tmp_path, links(8))
    rows = list(parquet_rows(tmp_path / "00000.parquet"))
    assert [row["url"] for row in rows] == [url for url, _ in links(8)]
    assert [isinstance(row["jpg"], CellPicture) for row in rows] == [n not in (3, 7) for n in range(8)]
    assert [(row["jpg"].group, row["jpg"].row) for row in rows if row["jpg"]] == [
        *((0, n) for n in range(3)),
        *((1, n) for n in (1, 2)),
        (2, 0),
    ]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("limit", [2**26, 10])
def test_both_ways_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(tables, "MAX_GROUP_BYTES", limit)
    cells = [{"bytes": png(1), "path": "a/x.png"}, {"bytes": None, "path": "b.png"}, {"bytes": png(2), "path": None}]
    table = pa.table({"image": cells, "text": ["r", None, "b"]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    first, second, third = parquet_rows(tmp_path / "t.parquet")
    assert (first["image"].group is None) == (limit == 10)
    assert first["image"].read() == unpacked(first["image"].packed()).read() == png(1)
    assert first["image"].file_name == "x.png"
    assert (second["image"], second["text"]) == ("b.png", None)
    assert third["image"].read() == png(2)
    assert third["image"].file_name == third["image"].name != first["image"].name


def test_the_copy_of_a_file_with_large_groups_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, table = tmp_path / "cache", tmp_path / "data.parquet"
    datasets.Dataset.from_dict({"img": [png(3)], "text": ["r"]}).to_parquet(str(table))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(tables, "MAX_GROUP_BYTES", 10)
    with caplog.at_level("INFO"):
        list(parquet_rows(table))
    assert f"{table} is copied to {cache} unless" in caplog.text
    assert len(list(cache.rglob("*.arrow"))) == 1


def test_what_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no Parquet file"):
        list(parquet_rows(tmp_path / "a.parquet"))
