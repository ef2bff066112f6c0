"""Where images are: what is packed is unpacked, and a change shows."""

import os
import tarfile
from pathlib import Path

import datasets
import pytest

from bridgetower.data import images as image_sources
from bridgetower.data.images import ImageRef, parquet_rows
from bridgetower.data.tars import tar_samples
from rows import png


@pytest.fixture(params=["file", "tar", "cell", "copied cell"])
def image(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageRef:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png(5))
    if request.param == "file":
        return ImageRef.of_file(tmp_path, "sub/a.png")
    if request.param == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            archive.add(tmp_path / "sub" / "a.png", "sub/a.png")
        (sample,) = tar_samples(tmp_path / "x.tar")
        assert sample.image is not None
        return sample.image
    if request.param == "copied cell":
        monkeypatch.setattr(image_sources, "MAX_GROUP_BYTES", 10)
    cells = [{"bytes": png(number), "path": "a.png"} for number in (1, 5)]
    datasets.Dataset.from_dict({"img": cells}).to_parquet(str(tmp_path / "t.parquet"))
    _, row = parquet_rows(tmp_path / "t.parquet")
    found: ImageRef = row["img"]
    return found


def test_packed_and_unpacked(image: ImageRef) -> None:
    assert image.read() == png(5)
    assert ImageRef.unpacked(image.packed()) == image
    assert ImageRef.unpacked(image.packed()).read() == png(5)
    assert image.file_name == "a.png"
    assert image.is_file == (image.path.suffix == ".png")


def test_signature_of_a_file(tmp_path: Path) -> None:
    image = ImageRef.of_file(tmp_path, "a.png")
    assert image.file_signature is None
    (tmp_path / "a.png").write_bytes(png(1))
    before = image.file_signature
    (tmp_path / "a.png").write_bytes(png(1) + b" ")
    assert before != image.file_signature is not None
    now = image.file_signature
    os.utime(tmp_path / "a.png", (0, 0))
    assert image.file_signature == now


def test_signature_of_a_piece_is_its_size_wherever_it_lies(tmp_path: Path) -> None:
    for name, content in (("a", b"12"), ("b", b"34"), ("c", b"567")):
        (tmp_path / f"{name}.png").write_bytes(content)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in "abc":
            archive.add(tmp_path / f"{name}.png", f"{name}.png")
    images = [sample.image for sample in tar_samples(tmp_path / "x.tar")]
    assert [image and image.file_signature for image in images] == ["2", "2", "3"]
