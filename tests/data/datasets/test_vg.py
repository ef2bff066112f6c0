"""Descriptions of Visual Genome's regions."""

from pathlib import Path

import pytest

from bridgetower.data.datasets import prepare_set
from bridgetower.data.datasets.vg import VgConfig
from miniature import jpeg, write_coco, write_visual_genome
from rows import read_rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_visual_genome(tmp_path / "vg")
    write_coco(tmp_path / "coco")
    return tmp_path / "vg"


def test_descriptions_are_captions(source: Path, tmp_path: Path) -> None:
    (source / "image_data.json").unlink()  # not needed
    info = prepare_set("vg", source, tmp_path / "out", VgConfig())
    rows = read_rows(tmp_path / "out", "train")
    assert [row["id"] for row in rows] == ["1", "2", "3", "4", "5"]  # 6 has no description
    assert rows[1]["entries"] == ["the clock is green", "shade is along street 2"]
    assert rows[1]["images"] == [jpeg(2)]
    assert info.some_left_out == {"empty description": ["12", "22", "32", "42", "52"]}


def test_pictures_that_coco_is_evaluated_on_can_be_left_out(source: Path, tmp_path: Path) -> None:
    config = VgConfig(leave_out=("val", "test"), karpathy=tmp_path / "coco" / "dataset_coco.json")
    info = prepare_set("vg", source, tmp_path / "out", config)
    assert [row["id"] for row in read_rows(tmp_path / "out", "train")] == ["1", "2", "4", "5"]
    assert info.some_left_out["image in COCO's val or test split"] == ["3"]


def test_other_places_of_pictures(source: Path, tmp_path: Path) -> None:
    for folder in (source / "images").iterdir():
        folder.rename(source / folder.name)
    assert prepare_set("vg", source, tmp_path / "out", VgConfig()).splits["train"].images == 5


def test_a_missing_picture(source: Path, tmp_path: Path) -> None:
    (source / "images" / "VG_100K" / "4.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 bad .*: 4: 'images/VG_100K/4\.jpg': there is no such file"):
        prepare_set("vg", source, tmp_path / "out", VgConfig())
