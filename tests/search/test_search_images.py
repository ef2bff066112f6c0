"""What a folder or table names, and what comes of each file."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lancedb
import pytest
import torch
from PIL import Image

from bridgetower.data.example import Example
from bridgetower.data.example import Image as SourceImage
from bridgetower.data.reader import read
from bridgetower.predictor import Predictor
from bridgetower.search.build import IndexReport, build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.embedding import Decoder, Embedded

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}


def decoded(folder: Path, predictor: Predictor) -> dict[str, tuple[Embedded, torch.Tensor | None]]:
    found, pixels = Decoder(predictor.processor, images=True)(list(read(folder)))
    left = iter(pixels)
    return {one.example.id: (one, next(left) if one.width else None) for one in found}


class TestListing:
    @pytest.fixture
    def listed(self, predictor: Predictor, tmp_path: Path) -> Callable[[Path], tuple[dict[str, Any], IndexReport]]:
        def call(source: Path) -> tuple[dict[str, Any], IndexReport]:
            report = build_index(source, tmp_path / "i.lance", predictor, IndexConfig(max_errors=9))
            rows = lancedb.connect(tmp_path).open_table("i").to_arrow().to_pylist()
            return {row["path"]: row for row in rows}, report

        return call

    def test_a_folder_with_all_in_it(self, photos: Path, listed: Callable[..., Any]) -> None:
        (photos / "sub" / "04.txt").write_text("a red bar\n\n  on black \n")
        (photos / ".hidden").mkdir()
        Image.new("RGB", (4, 4)).save(photos / ".hidden" / "x.png")
        (photos / "folder.png").mkdir()
        (photos / "notes.md").write_text("no image")
        os.mkfifo(photos / "pipe.jpg")
        found, report = listed(photos)
        assert sorted(found) == ["00.png", "01.png", "02.png", "03.png", "sub/04.png", "sub/05.png"]
        assert report.bad == ("'pipe.jpg': it is no regular file",)
        status, row = (photos / "sub" / "04.png").stat(), found["sub/04.png"]
        assert (row["size"], row["captions"], row["place"]) == (status.st_size, ["a red bar", "on black"], "")
        assert round(row["mtime"].timestamp() * 1e6) == status.st_mtime_ns // 1000

    @pytest.mark.parametrize(("second", "year"), [(2**40, 9999), (-(2**40), 1)])
    def test_times_outside_of_the_calendar(self, second: int, year: int, predictor: Predictor, tmp_path: Path) -> None:
        with TemporaryDirectory(dir="/dev/shm") as folder:  # a tmpfs: ext4 has no such times
            Image.new("RGB", (4, 4), "red").save(Path(folder) / "00.png")
            os.utime(Path(folder) / "00.png", (second, second))
            build_index(folder, tmp_path / "i.lance", predictor)
            assert build_index(folder, tmp_path / "i.lance", predictor).changed == 0
        (row,) = lancedb.connect(tmp_path).open_table("i").to_arrow()["mtime"].cast("int64").to_pylist()
        assert datetime.fromtimestamp(0, UTC).year == 1970
        assert abs(row / 31_556_952_000_000 + 1970 - year) < 2

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("list.csv", "image,caption\n00.png,one\nsub/../00.png, two \nsub/04.png,\nno.png,three\n"),
            (
                "list.jsonl",
                '{"path": "00.png", "captions": ["one", "two"]}\n{"path": "sub/04.png", "captions": []}\n'
                '{"path": "no.png", "captions": ["three"]}\n',
            ),
        ],
    )
    def test_a_table(self, photos: Path, name: str, content: str, listed: Callable[..., Any]) -> None:
        (photos / name).write_text(content)
        found, report = listed(photos / name)
        assert {path: row["captions"] for path, row in found.items()} == {"00.png": ["one", "two"], "sub/04.png": []}
        assert [one.endswith("no file 'no.png' (No such file or directory)") for one in report.bad] == [True]

    def test_names_that_are_no_text_are_bad(self, photos: Path, listed: Callable[..., Any]) -> None:
        (photos / "link.png").symlink_to("nowhere.png")
        Path(photos / "caf\udce9.png").write_bytes((photos / "00.png").read_bytes())
        bad = " | ".join(listed(photos)[1].bad)
        assert "'link.png': No such file or directory" in bad
        assert r"the name 'caf\udce9.png' is not UTF-8; rename the file" in bad

    def test_a_name_with_a_zero_character_is_bad(self, photos: Path, listed: Callable[..., Any]) -> None:
        lines = '{"image": "00.png", "text": "one"}', '{"image": "0\\u0000.png", "text": "two"}'
        (photos / "a.jsonl").write_text("\n".join(lines))
        found, report = listed(photos / "a.jsonl")
        assert list(found) == ["00.png"]
        assert report.bad == (r"a.jsonl line 2: the name '0\x00.png' has a zero character, which no file's name has",)

    def test_names_are_kept_exactly(self, photos: Path, listed: Callable[..., Any]) -> None:
        for name in (" a.png", "a\n.png"):
            (photos / name).write_bytes((photos / "00.png").read_bytes())
        found, report = listed(photos)
        assert {" a.png", "a\n.png"} <= found.keys()
        assert report.bad == ()


class TestDecoding:
    def test_every_format_upright(self, predictor: Predictor, tmp_path: Path) -> None:
        image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
        for suffix, kind in FORMATS.items():
            image.save(tmp_path / f"plain.{suffix}", kind)
        exif = Image.Exif()
        exif[274] = 6  # to be turned by 90 degrees
        image.save(tmp_path / "turned.jpg", exif=exif)
        image.rotate(-90, expand=True).save(tmp_path / "upright.jpg")
        found = decoded(tmp_path, predictor)
        assert len(found) == len(FORMATS) + 2
        for path, (one, pixels) in found.items():
            size = (60, 40) if path.startswith("plain") else (40, 60)
            assert (one.width, one.height, one.problem) == (*size, "")
            assert torch.equal(pixels, predictor.processor.resize(tmp_path / path))
        turned, upright, plain = (found[f"{name}.jpg"][1].int() for name in ("turned", "upright", "plain"))
        off = (turned - upright).abs().float().mean()
        assert off < 3 < (turned - plain).abs().float().mean()

    def test_broken_files_come_back_with_the_reason(self, photos: Path, predictor: Predictor) -> None:
        whole = (photos / "00.png").read_bytes()
        (photos / "00.png").write_bytes(whole[: len(whole) // 2])
        (photos / "01.png").write_bytes(b"")
        (photos / "02.png").write_text("not an image")
        Image.new("1", (20_000, 20_000)).save(photos / "03.png")  # 50 kB that would be 1.2 GB
        assert (photos / "03.png").stat().st_size < 100_000
        found = decoded(photos, predictor)
        reasons = [found[f"{number:02}.png"][0].problem for number in range(4)]
        for reason, expected in zip(reasons, ("cut off", "empty", "cannot be read as an image", "limit"), strict=True):
            assert expected in reason
            assert reason.startswith("it ")
            assert str(photos) not in reason
        assert [path for path, (one, _) in found.items() if one.width] == ["sub/04.png", "sub/05.png"]

    def test_a_file_that_went_away(self, photos: Path, predictor: Predictor) -> None:
        gone = Example(id="gone", images=(SourceImage(name="gone.png", place=str(photos / "gone.png")),))
        (found,), pixels = Decoder(predictor.processor, images=True)([gone])
        assert (len(pixels), found.may_pass) == (0, False)
        assert "no image file at " in found.problem
