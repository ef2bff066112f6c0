"""A user's images: rows about an image become one entry, bad ones are named, splits are given."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from bridgetower.data.manifest import Manifest, new_manifest
from bridgetower.data.own import PAIRS, PairsConfig, split_images
from bridgetower.data.schema import CAPTIONS
from bridgetower.files import write_text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(20):
        Image.new("RGB", (5, 4), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    return tmp_path


@pytest.fixture
def manifest() -> Iterator[Manifest]:
    with new_manifest(CAPTIONS) as made:
        yield made


def row(name: str, *captions: str, split: str | None = None) -> dict[str, object]:
    return {"image": name, "captions": captions} | ({} if split is None else {"split": split})


def good_rows(count: int = 20) -> list[dict[str, object]]:
    return [row(f"{number:02d}.png", f"shade {number}") for number in range(count)]


def listed(manifest: Manifest, root: Path, rows: Iterable[object]) -> Manifest:
    write_text(root / "table.jsonl", "\n".join(map(json.dumps, rows)))
    PAIRS.fill(root / "table.jsonl", manifest, PairsConfig())
    manifest.finish()
    return manifest


def captions(manifest: Manifest, split: str = "") -> dict[str, tuple[object, ...]]:
    return {entry.image_id: entry.texts for entry in manifest.entries(split)}


class TestListRows:
    def test_rows_about_one_picture_become_one(self, manifest: Manifest, root: Path) -> None:
        rows = [row("00.png", " first "), row("01.png", "other"), row("00.png", "second", "first")]
        listed(manifest, root, rows)
        assert captions(manifest) == {"00.png": ("first", "second", "first"), "01.png": ("other",)}
        assert manifest.errors() == []

    def test_a_missing_value_of_pandas_is_no_caption(self, manifest: Manifest, root: Path) -> None:
        rows = [{"image": "00.png", "captions": math.nan}, {"image": "01.png", "captions": [math.nan, "b"]}]
        listed(manifest, root, rows)
        assert captions(manifest) == {"01.png": ("b",)}
        assert len(manifest.errors()) == 2
        assert all("empty caption" in error for error in manifest.errors())

    def test_missing_pictures_and_empty_captions_are_named(self, manifest: Manifest, root: Path) -> None:
        rows = [
            row("00.png", "fine"),
            row("none.png", "x"),
            row("01.png", " \n"),
            row("02.png"),
            row("00.png", "", "also fine"),
        ]
        listed(manifest, root, rows)
        assert manifest.errors() == [
            "line 3: empty caption of '01.png'",
            "line 4: no caption of '02.png'",
            "line 5: empty caption of '00.png'",
            "line 2: no file 'none.png'",
        ]
        assert captions(manifest) == {"00.png": ("fine", "also fine")}

    def test_pictures_without_any_caption(self, manifest: Manifest, root: Path) -> None:
        with pytest.raises(ValueError, match=r"images but no captions; expected captions\.txt in it or a \.txt file"):
            listed(manifest, root, [row("00.png"), row("01.png")])

    def test_refuses_contradicting_splits(self, manifest: Manifest, root: Path) -> None:
        rows = [row("00.png", "a", split="train"), row("00.png", "b", split="test")]
        with pytest.raises(ValueError, match=r"'00\.png' is in test and in train; give it one split"):
            listed(manifest, root, rows)


class TestSplitPictures:
    def test_by_fraction(self, manifest: Manifest, root: Path) -> None:
        config = PairsConfig(test_fraction=0.25, validation_fraction=0.1)
        rule = split_images(root, listed(manifest, root, good_rows()), config)
        assert rule == "images ranked by hash of seed and name"
        assert manifest.counts() == {"train": 13, "validation": 2, "test": 5}
        assert len({entry.image_id for split in manifest.counts() for entry in manifest.entries(split)}) == 20

    @pytest.mark.parametrize("count", [3, 4, 5, 9])
    def test_few_pictures_are_in_every_split_with_a_fraction(self, manifest: Manifest, root: Path, count: int) -> None:
        split_images(root, listed(manifest, root, good_rows(count)), PairsConfig())
        assert manifest.counts() == {"train": count - 2, "validation": 1, "test": 1}

    def test_a_fraction_of_zero_gives_none(self, manifest: Manifest, root: Path) -> None:
        split_images(root, listed(manifest, root, good_rows(5)), PairsConfig(test_fraction=0))
        assert manifest.counts() == {"train": 4, "validation": 1}

    @pytest.mark.parametrize("count", [1, 2])
    def test_too_few_pictures_are_said_to_be(self, manifest: Manifest, root: Path, count: int) -> None:
        rule = split_images(root, listed(manifest, root, good_rows(count)), PairsConfig())
        assert set(manifest.counts()) == {"train"}
        assert f"{count} are too few for test and validation, which need 3" in rule

    def test_takes_given_ones(self, manifest: Manifest, root: Path) -> None:
        rows = [row("00.png", "a", split="test"), row("01.png", "b", split="train")]
        assert split_images(root, listed(manifest, root, rows), PairsConfig()) == "as in the source's split column"
        assert captions(manifest, "test") == {"00.png": ("a",)}
        with pytest.raises(ValueError, match="has a split column, so fractions would be ignored"):
            split_images(root, manifest, PairsConfig(test_fraction=0.5))

    def test_refuses_a_split_for_some(self, manifest: Manifest, root: Path) -> None:
        rows = [row("00.png", "a", split="train"), row("01.png", "b")]
        with pytest.raises(ValueError, match=r"gives 1 images a split but not '01\.png'"):
            split_images(root, listed(manifest, root, rows), PairsConfig())

    def test_refuses_nothing(self, manifest: Manifest, root: Path) -> None:
        with pytest.raises(ValueError, match="has no usable row"):
            split_images(root, listed(manifest, root, []), PairsConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_fraction": -0.1}, "give >= 0, together below 1"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, "give >= 0, together below 1"),
        ({"max_errors": -1}, "max_errors is -1"),
        ({"shard_rows": 0}, "shard_rows 0"),
        ({"num_workers": 0}, "num_workers 0"),
    ],
)
def test_config_refuses(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairsConfig(**changes)  # type: ignore[arg-type]
