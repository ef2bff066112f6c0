"""The contact sheet: images where they belong, empty places, awkward names."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgetower.files import sha256_of
from bridgetower.processor import open_image, open_reduced
from bridgetower.search.index import Hit
from bridgetower.search.sheet import TILE, contact_sheet, write_sheet


@pytest.fixture
def hits(tmp_path: Path) -> list[Hit]:
    found = []
    for number, colour in enumerate(("red", "lime", "blue", "yellow", "cyan", "magenta", "black")):
        file = tmp_path / f"{colour}.png"
        Image.new("RGB", (50, 50 + 10 * number), colour).save(file)
        scores = {"cosine": 0.1, "score": 0.5}
        hit = Hit(digest="", size=0, path=file.name, file=file, width=50, height=50, captions=(), **scores)
        found.append(of_file(hit, file))
    return found


def of_file(hit: Hit, file: Path) -> Hit:
    return replace(hit, file=file, digest=sha256_of(file), size=file.stat().st_size)


def places(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """How many pixels have a colour, and the middle of them."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    return len(rows), round(columns.mean()), round(rows.mean())


def test_pictures_in_rows_best_first(hits: list[Hit]) -> None:
    sheet = contact_sheet(hits, text="a colour")
    count, x, y = places(sheet, (255, 0, 0))
    assert count == TILE * TILE
    _, x2, y2 = places(sheet, (0, 255, 0))
    _, x6, y6 = places(sheet, (255, 0, 255))
    assert x2 > x + TILE
    assert abs(y2 - y) <= 1
    assert abs(x6 - x) <= 1
    assert y6 > y + TILE


def test_a_bar_as_long_as_the_probability(hits: list[Hit]) -> None:
    def bar(probability: float | None) -> int:
        sheet = contact_sheet([replace(hits[0], probability=probability, score=None)])
        return int((np.asarray(sheet) == (37, 99, 175)).all(axis=2).sum())

    assert bar(1.0) > 1.9 * bar(0.5) > 0
    assert bar(None) == 0


def test_names_and_texts_of_any_kind(hits: list[Hit], tmp_path: Path) -> None:
    awkward = replace(hits[0], path="sub/" + "a very long name\n[bold] → Ωж 犬 " * 20)
    missing = replace(hits[1], file=tmp_path / "gone.png")
    usual = contact_sheet(hits[:2], text="a")
    sheet = contact_sheet([awkward, missing], text="line\nbreak " * 100, image=hits[2].file)
    assert sheet.width == usual.width
    assert places(sheet, (0, 0, 255))[0] == 96 * 69  # the query image fills the height


def test_only_what_was_indexed_is_drawn(hits: list[Hit], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    others = [replace(hits[1], file=hits[0].file), replace(hits[1], file=tmp_path / "pipe")]
    assert not (np.asarray(contact_sheet(others)) == (255, 0, 0)).all(axis=2).any()


def test_photos_are_not_decoded_in_full(hits: list[Hit], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    sheet = contact_sheet([of_file(replace(hits[0], probability=None), tmp_path / "photo.jpg")])

    def shown(image: Image.Image) -> bool:
        tile = np.asarray(image.resize((TILE, TILE), Image.Resampling.LANCZOS))
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(sheet), (TILE, 1, 3))
        columns = np.argwhere((windows[..., 0, :] == tile[:, 0]).all(axis=(2, 3, 4)))
        return len(columns) == 1

    assert shown(open_reduced(tmp_path / "photo.jpg", TILE)[0])
    assert not shown(open_image(tmp_path / "photo.jpg"))


def test_no_hits() -> None:
    sheet = contact_sheet([], text="nothing")
    assert sheet.width > sheet.height


def test_is_written_as_the_name_says(hits: list[Hit], tmp_path: Path) -> None:
    write_sheet(tmp_path / "hits.jpg", hits)
    assert Image.open(tmp_path / "hits.jpg").format == "JPEG"
    with pytest.raises(ValueError, match=r"hits\.txt has no suffix of a kind of images; give a name such"):
        write_sheet(tmp_path / "hits.txt", hits)
