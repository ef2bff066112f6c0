"""Where pictures are: what is packed is unpacked, and a change shows."""

from pathlib import Path

import datasets
import pytest

from bridgetower.data.locations import CellPicture, FilePicture, Picture, unpacked
from rows import png


@pytest.fixture(params=["file", "cell"])
def picture(request: pytest.FixtureRequest, tmp_path: Path) -> Picture:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png(5))
    datasets.Dataset.from_dict({"img": [png(1), png(5)]}).to_parquet(str(tmp_path / "t.parquet"))
    if request.param == "file":
        return FilePicture(root=tmp_path, name="sub/a.png")
    return CellPicture(table=tmp_path / "t.parquet", column="img", row=1, name="digest", file_name="a.png")


def test_packed_and_unpacked(picture: Picture) -> None:
    assert picture.read() == png(5)
    assert unpacked(picture.packed()) == picture
    assert unpacked(picture.packed()).read() == png(5)
    assert picture.file_name == "a.png"


def test_stamp_of_a_file(tmp_path: Path) -> None:
    picture = FilePicture(root=tmp_path, name="a.png")
    assert picture.stamp is None
    (tmp_path / "a.png").write_bytes(png(1))
    before = picture.stamp
    (tmp_path / "a.png").write_bytes(png(1, size=9))
    assert before != picture.stamp is not None
