"""The contact sheet: images where they belong, empty places, awkward names."""

import os
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from bridgetower.files import sha256_of
from bridgetower.search.indexed import Hit, read_indexed
from bridgetower.search.sheet import contact_sheet

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "black")


@pytest.fixture
def hits(tmp_path):
    hits = []
    for colour in COLOURS:
        file = tmp_path / f"{colour}.png"
        Image.new("RGB", (50, 50), colour).save(file)
        fields = {
            "digest": sha256_of(file),
            "size": file.stat().st_size,
            "path": file.name,
            "file": file,
        }
        hits.append(
            Hit(
                **fields,
                width=50,
                height=50,
                captions=(),
                against="images",
                cosine=0.1,
                rank_score=0.1,
                score=0.5,
            )
        )
    return hits


def content_of_hit(hit):
    return read_indexed(hit.file, hit)


def middle(sheet, colour):
    """The middle of the pixels that have a colour, and how many these are."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    return float(columns.mean()), float(rows.mean()), len(rows)


def test_images_in_rows_best_first(hits):
    sheet = contact_sheet(hits, content_of_hit, text="a colour")
    x, y, count = middle(sheet, (255, 0, 0))
    x2, y2, count2 = middle(sheet, (0, 255, 0))
    x6, y6, _ = middle(sheet, (255, 0, 255))
    side = count**0.5
    assert abs(count2 - count) < 5 * side
    assert x2 > x + side
    assert abs(y2 - y) <= 1
    assert abs(x6 - x) <= 1
    assert y6 > y + side > y + 200


def test_none_leaves_a_place_empty(hits):
    sheet = contact_sheet([hits[0], *[None] * 4, hits[2]], content_of_hit)
    (x, y, _), (x2, y2, _) = (middle(sheet, colour) for colour in ((255, 0, 0), (0, 0, 255)))
    assert abs(x2 - x) <= 1
    assert y2 > y + 200


def test_a_title_in_place_of_the_query(hits, monkeypatch):
    monkeypatch.setattr("bridgetower.search.sheet.drawn", lambda figure: figure)
    lines = contact_sheet(hits, content_of_hit, title=("2 groups", "a row each")).texts
    assert [line.get_text() for line in lines[:2]] == ["2 groups", "a row each"]


def test_weak_hits_are_marked(hits, monkeypatch):
    monkeypatch.setattr("bridgetower.search.sheet.drawn", lambda figure: figure)

    def lines(weak):
        marked = [replace(hit, weak=is_weak) for hit, is_weak in zip(hits, weak, strict=False)]
        return [
            line.get_text() for line in contact_sheet(marked, content_of_hit, text="a colour").texts
        ]

    assert [line.endswith(" · weak") for line in lines([True, False, None])[3::2]] == [
        True,
        False,
        False,
    ]
    expected = [
        lines(weak)[1] for weak in ([True, True, True], [True, True, False], [None, None, None])
    ]
    assert expected == [
        "3 hits, best first; all weak: unrelated texts find images that are just as near",
        *["3 hits, best first"] * 2,
    ]


def test_only_what_was_indexed_is_drawn(hits, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    paths = hits[0].file, tmp_path / "pipe", tmp_path / "gone.png"
    sheet = contact_sheet([replace(hits[1], file=path) for path in paths], content_of_hit)
    assert not (np.asarray(sheet) == (255, 0, 0)).all(axis=2).any()
    assert sheet.size == contact_sheet(hits[1:4], content_of_hit).size


@pytest.mark.filterwarnings("error")
def test_names_and_texts_of_any_kind(hits):
    awkward = replace(hits[0], path="sub/" + "a very long name\n[bold] → Ωж 犬 $x^ " * 20)
    sheet = contact_sheet(
        [awkward], content_of_hit, text="line\nbreak $x^ " * 100, image=hits[2].file
    )
    assert sheet.width == contact_sheet(hits[:1], content_of_hit).width
    assert middle(sheet, (0, 0, 255))[2] > 90**2  # the image of the query
    assert contact_sheet([], content_of_hit, text="nothing").width > 300


@pytest.mark.parametrize("match", [{"score": 0.331}, {"probability": 1.0, "score": None}])
def test_the_lines_of_a_hit_end_at_the_edge_of_its_image(hits, monkeypatch, match):
    monkeypatch.setattr("bridgetower.search.sheet.drawn", lambda figure: figure)
    marked = replace(
        hits[0], path="PXL_20240131_120000000.MP.jpg", cosine=-0.456, weak=True, **match
    )
    figure = contact_sheet([marked] * 3, content_of_hit)
    renderer = FigureCanvasAgg(figure).get_renderer()
    lines = figure.texts[2:]  # after the title
    images = [axes for axes in figure.axes for _ in range(2)]
    for line, axes in zip(lines, images, strict=True):
        assert line.get_window_extent(renderer).x1 <= axes.get_window_extent(renderer).x1, (
            line.get_text()
        )
