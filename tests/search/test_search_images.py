"""What an index has of the files of a folder or table, and what is said of those that cannot be used."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lancedb
import pytest
from PIL import Image

from bridgetower.data.example import Example
from bridgetower.data.example import Image as SourceImage
from bridgetower.data.reader import read
from bridgetower.predictor import Predictor
from bridgetower.search.build import IndexReport, build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.embed import decode
from bridgetower.search.searcher import Searcher


@pytest.fixture
def listed(predictor: Predictor, tmp_path: Path) -> Callable[[Path], tuple[dict[str, Any], IndexReport]]:
    def call(source: Path) -> tuple[dict[str, Any], IndexReport]:
        report = build_index(source, tmp_path / "i.lance", predictor, IndexConfig(max_errors=9))
        rows = lancedb.connect(tmp_path).open_table("i").to_arrow().to_pylist()
        return {row["path"]: row for row in rows}, report

    return call


def test_a_folder_with_all_in_it(photos: Path, listed: Callable[..., Any]) -> None:
    (photos / "sub" / "04.txt").write_text("a red bar\n\n  on black \n")
    os.mkfifo(photos / "pipe.jpg")
    (photos / "link.png").symlink_to("nowhere.png")
    for name in (" a.png", "a\n.png", "caf\udce9.png"):
        (photos / name).write_bytes((photos / "00.png").read_bytes())
    found, report = listed(photos)
    assert sorted(found) == [" a.png", "00.png", "01.png", "02.png", "03.png", "a\n.png", "sub/04.png", "sub/05.png"]
    name = r"the name 'caf\udce9.png' is not UTF-8; rename the file"
    expected = ["'pipe.jpg': it is no regular file", "'link.png': No such file or directory", name]
    assert all(any(message in bad for bad in report.bad) for message in expected)
    assert len(report.bad) == 3
    status, row = (photos / "sub" / "04.png").stat(), found["sub/04.png"]
    assert (row["size"], row["captions"], row["place"]) == (status.st_size, ["a red bar", "on black"], "")
    assert round(row["mtime"].timestamp() * 1e6) == status.st_mtime_ns // 1000


def test_names_of_any_kind(photos: Path, predictor: Predictor, tmp_path: Path) -> None:
    folder = photos.rename(tmp_path / "caf\udce9")
    for number, name in enumerate((" a.png", "it's\n.png", "\tü.png")):
        (folder / f"{number:02}.png").rename(folder / name)
    for _ in range(2):
        report = build_index(folder, tmp_path / "i.lance", predictor)
    assert (report.images, report.added, report.changed) == (6, 0, 0)
    hits = Searcher(tmp_path / "i.lance", predictor).search("red")
    assert all(Path(hit.file).is_file() for hit in hits)
    for hit in hits[1:]:
        Path(hit.file).unlink()
    report = build_index(folder, tmp_path / "i.lance", predictor)
    assert (report.images, report.removed) == (1, 5)


def test_a_table(photos: Path, listed: Callable[..., Any]) -> None:
    cells = ("00.png", "one"), ("sub/../00.png", " two "), ("sub/04.png", ""), ("no.png", "three"), ("0\0.png", "four")
    lines = [json.dumps({"image": image, "caption": caption}) for image, caption in cells]
    (photos / "list.jsonl").write_text("\n".join(lines))
    found, report = listed(photos / "list.jsonl")
    assert {path: row["captions"] for path, row in found.items()} == {"00.png": ["one", "two"], "sub/04.png": []}
    messages = ("no file 'no.png' (No such file or directory)", r"'0\x00.png' has a zero character, which no file's")
    assert all(any(message in bad for bad in report.bad) for message in messages)


@pytest.mark.parametrize(("second", "year"), [(2**40, 9999), (-(2**40), 1)])
def test_times_outside_of_the_calendar(second: int, year: int, predictor: Predictor, tmp_path: Path) -> None:
    with TemporaryDirectory(dir="/dev/shm") as folder:  # a tmpfs: ext4 has no such times
        Image.new("RGB", (4, 4), "red").save(Path(folder) / "00.png")
        os.utime(Path(folder) / "00.png", (second, second))
        build_index(folder, tmp_path / "i.lance", predictor)
        assert build_index(folder, tmp_path / "i.lance", predictor).changed == 0
    (row,) = lancedb.connect(tmp_path).open_table("i").to_arrow()["mtime"].cast("int64").to_pylist()
    assert datetime.fromtimestamp(0, UTC).year == 1970
    assert abs(row / 31_556_952_000_000 + 1970 - year) < 2


def test_broken_files_come_back_with_the_reason(photos: Path, predictor: Predictor) -> None:
    whole = (photos / "00.png").read_bytes()
    (photos / "00.png").write_bytes(whole[: len(whole) // 2])
    (photos / "01.png").write_bytes(b"")
    (photos / "02.png").write_text("not an image")
    Image.new("1", (20_000, 20_000)).save(photos / "03.png")  # 50 kB that would be 1.2 GB
    gone = Example(id="gone", images=(SourceImage(name="gone.png", place=str(photos / "gone.png")),))
    found, pixels = decode(predictor.processor, True, [*read(photos), gone])
    reasons = ("cut off", "empty", "cannot be read as an image", "limit")
    for one, reason in zip(found, reasons, strict=False):
        assert one.problem.startswith("it ")
        assert reason in one.problem
        assert str(photos) not in one.problem
    assert [one.example.id for one in found if one.width] == ["sub/04.png", "sub/05.png"]
    assert (len(pixels), found[-1].may_pass) == (2, False)
    assert "no image file at " in found[-1].problem
