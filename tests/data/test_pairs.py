"""A user's pictures: rows about a picture become one record, bad ones are named and never replaced."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from bridgetower.data.config import PairsConfig
from bridgetower.data.pairs import Pairs, collect, find_broken, group_rows
from bridgetower.data.sources import FilePicture, Row


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(20):
        Image.new("RGB", (5, 4), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    whole = (tmp_path / "00.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def row(root: Path, name: str, *captions: str, split: str | None = None) -> Row:
    return Row(picture=FilePicture(root=root, name=name), captions=captions, split=split, place=f"row of {name}")


def pairs_of(root: Path, rows: Iterable[Row]) -> Pairs:
    return group_rows(root, rows)


def good_rows(root: Path, split: str | None = None) -> list[Row]:
    return [row(root, f"{number:02d}.png", f"shade {number}", split=split) for number in range(20)]


class TestGroupRows:
    def test_rows_about_one_picture_become_one(self, root: Path) -> None:
        rows = [row(root, "00.png", " first "), row(root, "01.png", "other"), row(root, "00.png", "second", "first")]
        pairs = pairs_of(root, rows)
        assert dict(pairs.captions) == {"00.png": ("first", "second", "first"), "01.png": ("other",)}
        assert pairs.bad == ()

    def test_missing_pictures_and_empty_captions_are_named(self, root: Path) -> None:
        rows = [
            row(root, "00.png", "fine"),
            row(root, "none.png", "x"),
            row(root, "01.png", " \n"),
            row(root, "02.png"),
        ]
        pairs = pairs_of(root, [*rows, row(root, "00.png", "", "also fine")])
        assert pairs.bad == (
            "row of none.png: no file 'none.png'",
            "row of 01.png: empty caption of '01.png'",
            "row of 02.png: empty caption of '02.png'",
            "row of 00.png: empty caption of '00.png'",
        )
        assert dict(pairs.captions) == {"00.png": ("fine", "also fine"), "01.png": (), "02.png": ()}

    def test_refuses_contradicting_splits(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r"'00\.png' is in test and in train; give it one split"):
            pairs_of(root, [row(root, "00.png", "a", split="train"), row(root, "00.png", "b", split="test")])
        with pytest.raises(ValueError, match=r"gives 1 pictures a split but not '01\.png'"):
            pairs_of(root, [row(root, "00.png", "a", split="train"), row(root, "01.png", "b")])

    def test_digest_follows_captions_splits_and_pictures(self, root: Path) -> None:
        digest = pairs_of(root, good_rows(root)).digest
        assert pairs_of(root, good_rows(root)).digest == digest
        assert pairs_of(root, good_rows(root, "train")).digest != digest
        assert pairs_of(root, [*good_rows(root), row(root, "00.png", "more")]).digest != digest
        Image.new("RGB", (50, 50)).save(root / "00.png")
        assert pairs_of(root, good_rows(root)).digest != digest


class TestFindBroken:
    def test_names_what_cannot_be_decoded(self, root: Path) -> None:
        names = ["00.png", "empty.jpg", "text.jpg", "half.png", "01.png"]
        pairs = pairs_of(root, [row(root, name, "x") for name in names])
        broken = find_broken(pairs, num_workers=2)
        assert list(broken) == ["empty.jpg", "text.jpg", "half.png"]
        assert "empty" in broken["empty.jpg"]

    def test_passes_over_pictures_without_a_caption(self, root: Path) -> None:
        assert find_broken(pairs_of(root, [row(root, "text.jpg", "")]), num_workers=1) == {}


class TestCollect:
    def test_splits_by_fraction(self, root: Path) -> None:
        config = PairsConfig(test_fraction=0.25, validation_fraction=0.1)
        collection = collect(pairs_of(root, good_rows(root)), {}, config)
        names = {split: [record.image_id for record in records] for split, records in collection.splits.items()}
        assert {split: len(members) for split, members in names.items()} == {"train": 13, "validation": 2, "test": 5}
        assert len({name for members in names.values() for name in members}) == 20

    @pytest.mark.parametrize("count", [3, 4, 5, 9])
    def test_few_pictures_are_in_every_split_with_a_fraction(self, root: Path, count: int) -> None:
        pairs = pairs_of(root, good_rows(root)[:count])
        sizes = {split: len(records) for split, records in collect(pairs, {}, PairsConfig()).splits.items()}
        assert sizes == {"train": count - 2, "validation": 1, "test": 1}
        without_test = collect(pairs, {}, PairsConfig(test_fraction=0))
        assert {split: len(records) for split, records in without_test.splits.items()} == {
            "train": count - 1,
            "validation": 1,
        }

    @pytest.mark.parametrize("count", [1, 2])
    def test_too_few_pictures_are_said_to_be(self, root: Path, count: int) -> None:
        pairs = pairs_of(root, good_rows(root)[:count])
        collection = collect(pairs, {}, PairsConfig())
        assert set(collection.splits) == {"train"}
        assert f"{count} are too few for test and validation, which need 3" in collection.info.split_rule
        all_train = collect(pairs, {}, PairsConfig(test_fraction=0, validation_fraction=0))
        assert all_train.info.split_rule == "pictures ranked by hash of seed and name"

    def test_takes_given_splits(self, root: Path) -> None:
        rows = [row(root, "00.png", "a", split="test"), row(root, "01.png", "b", split="train")]
        collection = collect(pairs_of(root, rows), {}, PairsConfig())
        assert {split: [record.image_id for record in records] for split, records in collection.splits.items()} == {
            "train": ["01.png"],
            "test": ["00.png"],
        }
        with pytest.raises(ValueError, match="has a split column, so fractions would be ignored"):
            collect(pairs_of(root, rows), {}, PairsConfig(test_fraction=0.5))

    def test_records_hold_the_files_own_bytes(self, root: Path) -> None:
        Image.new("RGB", (5, 4), "red").save(root / "00.jpg", quality=30)
        config = PairsConfig(test_fraction=0, validation_fraction=0)
        records = list(collect(pairs_of(root, [row(root, "00.jpg", "red")]), {}, config).splits["train"])
        assert records[0].image == (root / "00.jpg").read_bytes()
        assert records[0].file_name == "00.jpg"

    def test_bad_ones_above_the_limit_are_an_error_that_names_them(self, root: Path) -> None:
        rows = [row(root, f"none{number}.png", "x") for number in range(12)]
        pairs, broken = pairs_of(root, [*good_rows(root), *rows]), {"00.png": "it is damaged"}
        with pytest.raises(ValueError, match=r"has 13 bad .* allowed are 12 .*no file 'none0\.png' .* and 3 more$"):
            collect(pairs, broken, PairsConfig(max_bad=12))
        collection = collect(pairs, broken, PairsConfig(max_bad=13))
        left_out = collection.info.left_out["cannot be used"]
        assert len(left_out) == 13
        assert left_out[-1] == "'00.png': it is damaged"
        kept = [record.image_id for records in collection.splits.values() for record in records]
        assert sorted(kept) == [f"{number:02d}.png" for number in range(1, 20)]

    def test_refuses_nothing(self, root: Path) -> None:
        with pytest.raises(ValueError, match="has no usable picture with a caption"):
            collect(pairs_of(root, []), {}, PairsConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_fraction": -0.1}, "give >= 0, together below 1"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, "give >= 0, together below 1"),
        ({"max_bad": -1}, "max_bad is -1"),
        ({"num_workers": 0}, "num_workers 0"),
    ],
)
def test_config_refuses(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairsConfig(**changes)  # type: ignore[arg-type]
