"""Arrow IPC files: pictures are found where they lie in the file."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from bridgetower.data.arrow_files import arrow_rows
from bridgetower.data.locations import SpanPicture
from rows import png


def write(path: Path, table: pa.Table, *, batch_rows: int | None = None, compression: str | None = None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return path


def table(binary: pa.DataType) -> pa.Table:
    images = pa.array([png(0), None, b"", png(3), png(4)], type=binary)
    return pa.table({"image": images, "text": [["a"], [], ["ü"], ["c"], ["d"]], "unused": range(5)})


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("batch_rows", [None, 2])
def test_pictures_are_spans_of_the_file(tmp_path: Path, binary: pa.DataType, batch_rows: int | None) -> None:
    path = write(tmp_path / "a.arrow", table(binary), batch_rows=batch_rows)
    rows = list(arrow_rows(path, ["image"], ["text"]))
    assert [row["text"] for row in rows] == [["a"], [], ["ü"], ["c"], ["d"]]
    assert set(rows[0]) == {"image", "text"}
    assert [row["image"] and row["image"].read() for row in rows] == [png(0), None, b"", png(3), png(4)]
    assert isinstance(rows[0]["image"], SpanPicture)


def test_many_rows(tmp_path: Path) -> None:
    content = [bytes([n % 256]) * (n % 7) for n in range(2500)]
    path = write(tmp_path / "a.arrow", pa.table({"image": content, "n": range(2500)}))
    rows = list(arrow_rows(path, ["image"], ["n"]))
    assert [row["n"] for row in rows] == list(range(2500))
    assert [row["image"].read() for row in rows] == content


def test_a_slice_of_a_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", table(pa.binary()).slice(2))
    assert [row["image"].read() for row in arrow_rows(path, ["image"], ["text"])] == [b"", png(3), png(4)]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", table(pa.binary()))
    with pytest.raises(ValueError, match="has no column caption; it has image, text, unused"):
        list(arrow_rows(path, ["image"], ["caption"]))
    with pytest.raises(ValueError, match="has pictures of type list"):
        list(arrow_rows(path, ["text"], []))
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match=r"a\.arrow is no Arrow IPC file"):
        list(arrow_rows(path, ["image"], ["text"]))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.arrow is no Arrow IPC file"):
        list(arrow_rows(path, ["image"], ["text"]))
    compressed = write(tmp_path / "b.arrow", pa.table({"image": [bytes(5000)] * 9}), compression="zstd")
    with pytest.raises(ValueError, match=r"b\.arrow is compressed; write it again without compression"):
        list(arrow_rows(compressed, ["image"], []))
