"""COCO and Flickr30k from Karpathy's files."""

from pathlib import Path

import pytest

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets import prepare_set
from bridgetower.data.prepared_set import read_info
from miniature import change, counts, jpeg, write_coco, write_flickr30k
from rows import read_rows


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    write_coco(tmp_path / "coco")
    return tmp_path / "coco"


class TestCoco:
    def test_splits(self, coco: Path, tmp_path: Path) -> None:
        info = prepare_set("coco", coco, tmp_path / "out")
        assert counts(info) == {"train": (7, 34), "validation": (2, 10), "test": (2, 11)}
        assert info == read_info(tmp_path / "out")
        assert (info.kind, info.left_out) == ("captions", {"repeated caption": 1})
        assert set(info.sources) == {"dataset_coco.json"}
        rows = read_rows(tmp_path / "out", "train")
        assert rows[0]["id"] == "COCO_train2014_000000057870.jpg"
        assert rows[0]["entries"] == [
            *(f"Picture 57870, caption {number}." for number in range(3)),
            "A restaurant has modern wooden tables and chairs.",
        ]
        assert rows[0]["images"] == [jpeg(57870)]
        assert rows[4]["id"] == "COCO_val2014_000000318219.jpg"  # of restval

    def test_some_splits(self, coco: Path, tmp_path: Path) -> None:
        (coco / "train2014").rename(tmp_path / "elsewhere")
        info = prepare_set("coco", coco, tmp_path / "out", PrepareConfig(splits=("validation", "test")))
        assert counts(info) == {"validation": (2, 10), "test": (2, 11)}
        with pytest.raises(ValueError, match="coco has no split val; it has train, validation, test"):
            prepare_set("coco", coco, tmp_path / "other", PrepareConfig(splits=("val",)))

    def test_an_unknown_split_is_bad(self, coco: Path, tmp_path: Path) -> None:
        change(coco / "dataset_coco.json", lambda content: content["images"][0].update(split="dev"))
        with pytest.raises(ValueError, match=r"1 bad .*COCO_train2014_000000057870\.jpg: split 'dev', expected one of"):
            prepare_set("coco", coco, tmp_path / "out")

    def test_an_empty_caption_is_left_out(self, coco: Path, tmp_path: Path) -> None:
        change(coco / "dataset_coco.json", lambda content: content["images"][0]["sentences"][0].update(raw=" "))
        info = prepare_set("coco", coco, tmp_path / "out")
        assert info.splits["train"].examples == 33
        assert info.some_left_out["empty caption"] == ["COCO_train2014_000000057870.jpg"]


def test_flickr30k(tmp_path: Path) -> None:
    write_flickr30k(tmp_path / "flickr")
    info = prepare_set("flickr30k", tmp_path / "flickr", tmp_path / "out")
    assert counts(info) == {"train": (3, 15), "validation": (1, 5), "test": (2, 10)}
    assert [row["id"] for row in read_rows(tmp_path / "out", "test")] == ["1000092799.jpg", "1000092800.jpg"]
