"""What a folder or table names, and what comes of each file."""

import os
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from PIL import Image

from bridgetower.bulk.embedding import Decoded, DecodedBatch, Decoder
from bridgetower.data.images import ImageRef
from bridgetower.data.items import Columns, SourceItem, read_blocks, units_of
from bridgetower.predictor import Predictor
from bridgetower.search.listing import Listing, root_of
from bridgetower.search.table import SourceImage

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}


@dataclass
class Listed:
    images: dict[str, SourceImage]
    bad: tuple[str, ...]


def list_images(source: Path) -> Listed:
    with Listing(root_of(source)) as listing:
        for block in read_blocks(units_of(source), Columns(), 2):
            listing.add(block.items)
        return Listed({image.path: image for _, image, _ in listing.wanted()}, tuple(listing.bad.values()))


def decoded(folder: Path, predictor: Predictor) -> dict[str, Decoded]:
    decoder = Decoder(predictor.processor)
    blocks = read_blocks(units_of(folder), Columns(), 100)
    return {item.id: decoder[item] for block in blocks for item in block.items}


class TestListing:
    def test_a_folder_with_all_in_it(self, photos: Path) -> None:
        (photos / "sub" / "04.txt").write_text("a red bar\n\n  on black \n")
        (photos / ".hidden").mkdir()
        Image.new("RGB", (4, 4)).save(photos / ".hidden" / "x.png")
        (photos / "folder.png").mkdir()
        (photos / "notes.md").write_text("no image")
        os.mkfifo(photos / "pipe.jpg")
        manifest = list_images(photos)
        assert sorted(manifest.images) == ["00.png", "01.png", "02.png", "03.png", "sub/04.png", "sub/05.png"]
        assert manifest.bad == ()
        status = (photos / "sub" / "04.png").stat()
        assert manifest.images["sub/04.png"] == SourceImage(
            path="sub/04.png",
            size=status.st_size,
            mtime=status.st_mtime_ns // 1000,
            captions=("a red bar", "on black"),
        )

    @pytest.mark.parametrize(("second", "year"), [(2**40, 9999), (-(2**40), 1)])
    def test_times_outside_of_the_calendar(self, second: int, year: int) -> None:
        with TemporaryDirectory(dir="/dev/shm") as folder:  # a tmpfs: ext4 has no such times
            Image.new("RGB", (4, 4)).save(Path(folder) / "00.png")
            os.utime(Path(folder) / "00.png", (second, second))
            mtime = list_images(Path(folder)).images["00.png"].mtime
        assert (datetime(1970, 1, 1) + timedelta(microseconds=mtime)).year == year

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
    def test_a_table(self, photos: Path, name: str, content: str) -> None:
        (photos / name).write_text(content)
        manifest = list_images(photos / name)
        found = {path: image.captions for path, image in manifest.images.items()}
        assert found == {"00.png": ("one", "two"), "sub/04.png": ()}
        assert manifest.bad[0].endswith("no file 'no.png' (No such file or directory)")
        assert len(manifest.bad) == 1

    def test_a_link_to_nothing_and_a_name_that_is_no_text_are_bad(self, photos: Path) -> None:
        (photos / "link.png").symlink_to("nowhere.png")
        Path(photos / "caf\udce9.png").write_bytes((photos / "00.png").read_bytes())
        bad = " | ".join(list_images(photos).bad)
        assert "no file 'link.png'" in bad
        assert r"the name 'caf\udce9.png' is not UTF-8; rename the file" in bad

    def test_a_name_with_a_zero_character_is_bad(self, photos: Path) -> None:
        lines = '{"image": "00.png", "text": "one"}', '{"image": "0\\u0000.png", "text": "two"}'
        (photos / "a.jsonl").write_text("\n".join(lines))
        manifest = list_images(photos / "a.jsonl")
        assert list(manifest.images) == ["00.png"]
        assert manifest.bad == (r"a.jsonl line 2: the name '0\x00.png' has a zero character, which no file's name has",)

    def test_names_are_kept_exactly(self, photos: Path) -> None:
        for name in (" a.png", "a\n.png"):
            (photos / name).write_bytes((photos / "00.png").read_bytes())
        manifest = list_images(photos)
        assert {" a.png", "a\n.png"} <= manifest.images.keys()
        assert manifest.bad == ()


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
        for path, one in found.items():
            assert one.image is not None, one.problem
            size = (60, 40) if path.startswith("plain") else (40, 60)
            assert (one.image.width, one.image.height) == size
            assert torch.equal(one.image.pixels, predictor.processor.resize(tmp_path / path))
        turned, upright, plain = (found[f"{name}.jpg"].image for name in ("turned", "upright", "plain"))
        assert turned
        assert upright
        assert plain
        off = (turned.pixels.int() - upright.pixels.int()).abs().float().mean()
        assert off < 3 < (turned.pixels.int() - plain.pixels.int()).abs().float().mean()

    def test_broken_files_come_back_with_the_reason(self, photos: Path, predictor: Predictor) -> None:
        whole = (photos / "00.png").read_bytes()
        (photos / "00.png").write_bytes(whole[: len(whole) // 2])
        (photos / "01.png").write_bytes(b"")
        (photos / "02.png").write_text("not an image")
        Image.new("1", (20_000, 20_000)).save(photos / "03.png")  # 50 kB that would be 1.2 GB
        assert (photos / "03.png").stat().st_size < 100_000
        found = decoded(photos, predictor)
        reasons = [found[f"{number:02}.png"].problem for number in range(4)]
        for reason, expected in zip(reasons, ("cut off", "empty", "cannot be read as an image", "limit"), strict=True):
            assert reason is not None
            assert expected in reason
            assert reason.startswith("it ")
            assert str(photos) not in reason
        assert [path for path, one in found.items() if one.image] == ["sub/04.png", "sub/05.png"]

    def test_a_file_that_went_away(self, photos: Path, predictor: Predictor) -> None:
        item = SourceItem(id="gone", image=ImageRef.of_file(photos, "gone.png"), place="here")
        gone = Decoder(predictor.processor)[item]
        assert gone.image is None
        assert "no image file at " in str(gone.problem)


def test_a_batch_without_images() -> None:
    bad = Decoded(item=SourceItem(id="a", image=None, place="here"), problem="it is empty")
    assert DecodedBatch.of([bad]).unpacked() == [bad]
