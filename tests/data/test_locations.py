"""Where pictures are: what is packed is unpacked, and a change shows."""

import os
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from bridgetower.data.locations import CellPicture, FilePicture, Picture, SpanPicture, unpacked
from rows import png


@pytest.fixture(params=["file", "tar", "cell", "copied cell"])
def picture(request: pytest.FixtureRequest, tmp_path: Path) -> Picture:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png(5))
    datasets.Dataset.from_dict({"img": [png(1), png(5)]}).to_parquet(str(tmp_path / "t.parquet"))
    if request.param == "file":
        return FilePicture(root=tmp_path, name="sub/a.png")
    if request.param == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            archive.add(tmp_path / "sub" / "a.png", "sub/a.png")
        with tarfile.open(tmp_path / "x.tar") as archive:
            member = archive.getmember("sub/a.png")
        return SpanPicture(file=tmp_path / "x.tar", member="sub/a.png", offset=member.offset_data, size=member.size)
    group = 0 if request.param == "cell" else None
    return CellPicture(table=tmp_path / "t.parquet", column="img", group=group, row=1, name="x", file_name="a.png")


def test_packed_and_unpacked(picture: Picture) -> None:
    assert picture.read() == png(5)
    assert unpacked(picture.packed()) == picture
    assert unpacked(picture.packed()).read() == png(5)
    assert picture.file_name == "a.png"


def test_stamp_of_an_archive(tmp_path: Path) -> None:
    first, second = (SpanPicture(file=tmp_path / "x.tar", member="a", offset=place, size=1) for place in (0, 512))
    assert first.stamp is None
    (tmp_path / "x.tar").write_bytes(b"1" * 1024)
    assert first.stamp == second.stamp == "1"
    assert replace(first, size=2).stamp != first.stamp


def test_stamp_of_a_file(tmp_path: Path) -> None:
    picture = FilePicture(root=tmp_path, name="a.png")
    assert picture.stamp is None
    (tmp_path / "a.png").write_bytes(png(1))
    before = picture.stamp
    (tmp_path / "a.png").write_bytes(png(1) + b" ")
    assert before != picture.stamp is not None
    now = picture.stamp
    os.utime(tmp_path / "a.png", (0, 0))
    assert picture.stamp == now
