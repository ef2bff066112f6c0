"""A user's pictures: rows about a picture become one entry, bad ones are named, splits are given."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from bridgetower.data.config import PairsConfig
from bridgetower.data.listing import Listing, new_listing
from bridgetower.data.locations import FilePicture
from bridgetower.data.pairs import list_rows, split_pictures
from bridgetower.data.sources import Row


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(20):
        Image.new("RGB", (5, 4), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    return tmp_path


@pytest.fixture
def listing() -> Iterator[Listing]:
    with new_listing("captions") as made:
        yield made


def row(root: Path, name: str, *captions: str, split: str | None = None) -> Row:
    return Row(picture=FilePicture(root=root, name=name), captions=captions, split=split, place=f"row of {name}")


def good_rows(root: Path, count: int = 20, split: str | None = None) -> list[Row]:
    return [row(root, f"{number:02d}.png", f"shade {number}", split=split) for number in range(count)]


def listed(listing: Listing, root: Path, rows: Iterable[Row]) -> Listing:
    list_rows(root, rows, listing)
    listing.finish()
    return listing


def captions(listing: Listing, split: str = "") -> dict[str, tuple[object, ...]]:
    return {entry.image_id: entry.texts for entry in listing.entries(split)}


class TestListRows:
    def test_rows_about_one_picture_become_one(self, listing: Listing, root: Path) -> None:
        rows = [row(root, "00.png", " first "), row(root, "01.png", "other"), row(root, "00.png", "second", "first")]
        listed(listing, root, rows)
        assert captions(listing) == {"00.png": ("first", "second", "first"), "01.png": ("other",)}
        assert listing.bad_messages() == []

    def test_missing_pictures_and_empty_captions_are_named(self, listing: Listing, root: Path) -> None:
        rows = [
            row(root, "00.png", "fine"),
            row(root, "none.png", "x"),
            row(root, "01.png", " \n"),
            row(root, "02.png"),
            row(root, "00.png", "", "also fine"),
        ]
        listed(listing, root, rows)
        assert listing.bad_messages() == [
            "row of 01.png: empty caption of '01.png'",
            "row of 02.png: no caption of '02.png'",
            "row of 00.png: empty caption of '00.png'",
            "row of none.png: no file 'none.png'",
        ]
        assert captions(listing) == {"00.png": ("fine", "also fine")}

    def test_pictures_without_any_caption(self, listing: Listing, root: Path) -> None:
        with pytest.raises(ValueError, match=r"pictures but no captions; expected captions\.txt in it or a \.txt file"):
            list_rows(root, [row(root, "00.png"), row(root, "01.png")], listing)

    def test_refuses_contradicting_splits(self, listing: Listing, root: Path) -> None:
        rows = [row(root, "00.png", "a", split="train"), row(root, "00.png", "b", split="test")]
        with pytest.raises(ValueError, match=r"'00\.png' is in test and in train; give it one split"):
            list_rows(root, rows, listing)


class TestSplitPictures:
    def test_by_fraction(self, listing: Listing, root: Path) -> None:
        config = PairsConfig(test_fraction=0.25, validation_fraction=0.1)
        rule = split_pictures(root, listed(listing, root, good_rows(root)), config)
        assert rule == "pictures ranked by hash of seed and name"
        assert listing.counts() == {"train": 13, "validation": 2, "test": 5}
        assert len({entry.image_id for split in listing.counts() for entry in listing.entries(split)}) == 20

    @pytest.mark.parametrize("count", [3, 4, 5, 9])
    def test_few_pictures_are_in_every_split_with_a_fraction(self, listing: Listing, root: Path, count: int) -> None:
        split_pictures(root, listed(listing, root, good_rows(root, count)), PairsConfig())
        assert listing.counts() == {"train": count - 2, "validation": 1, "test": 1}

    def test_a_fraction_of_zero_gives_none(self, listing: Listing, root: Path) -> None:
        split_pictures(root, listed(listing, root, good_rows(root, 5)), PairsConfig(test_fraction=0))
        assert listing.counts() == {"train": 4, "validation": 1}

    @pytest.mark.parametrize("count", [1, 2])
    def test_too_few_pictures_are_said_to_be(self, listing: Listing, root: Path, count: int) -> None:
        rule = split_pictures(root, listed(listing, root, good_rows(root, count)), PairsConfig())
        assert set(listing.counts()) == {"train"}
        assert f"{count} are too few for test and validation, which need 3" in rule

    def test_takes_given_ones(self, listing: Listing, root: Path) -> None:
        rows = [row(root, "00.png", "a", split="test"), row(root, "01.png", "b", split="train")]
        assert split_pictures(root, listed(listing, root, rows), PairsConfig()) == "as the source's split column says"
        assert captions(listing, "test") == {"00.png": ("a",)}
        with pytest.raises(ValueError, match="has a split column, so fractions would be ignored"):
            split_pictures(root, listing, PairsConfig(test_fraction=0.5))

    def test_refuses_a_split_for_some(self, listing: Listing, root: Path) -> None:
        rows = [row(root, "00.png", "a", split="train"), row(root, "01.png", "b")]
        with pytest.raises(ValueError, match=r"gives 1 pictures a split but not '01\.png'"):
            split_pictures(root, listed(listing, root, rows), PairsConfig())

    def test_refuses_nothing(self, listing: Listing, root: Path) -> None:
        with pytest.raises(ValueError, match="has no usable picture with a caption"):
            split_pictures(root, listed(listing, root, []), PairsConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_fraction": -0.1}, "give >= 0, together below 1"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, "give >= 0, together below 1"),
        ({"max_bad": -1}, "max_bad is -1"),
        ({"shard_rows": 0}, "shard_rows 0"),
        ({"num_workers": 0}, "num_workers 0"),
    ],
)
def test_config_refuses(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairsConfig(**changes)  # type: ignore[arg-type]
