"""What a prepared set holds: counted, not believed."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridgetower.data.inspection import Lengths, inspect
from bridgetower.data.prepare import prepare_set
from bridgetower.data.published.counts import published_counts
from miniature import write_coco, write_nlvr2, write_vqav2


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    write_coco(tmp_path / "coco")
    prepare_set("coco", tmp_path / "coco", tmp_path / "out")
    return tmp_path / "out"


def test_captions(coco: Path) -> None:
    report = inspect(coco, check=True)
    split = report.splits["test"]
    assert (split.images, split.texts, dict(split.classes)) == (2, 11, {})
    assert split.size == (coco / "test.parquet").stat().st_size
    assert split.words == Lengths(shortest=4, median=4, mean=4.0, p95=4, longest=4)
    assert split.published is not None
    assert (split.published.images, split.published.texts) == (5_000, 25_010)
    assert report.splits["train"].words.longest == 8


def test_questions_and_statements(tmp_path: Path) -> None:
    write_vqav2(tmp_path / "vqa")
    write_nlvr2(tmp_path / "nlvr")
    for name, source in (("vqav2", "vqa"), ("nlvr2", "nlvr")):
        prepare_set(name, tmp_path / source, tmp_path / name)
    vqa, nlvr2 = (inspect(tmp_path / name).splits for name in ("vqav2", "nlvr2"))
    assert list(vqa["train"].classes.items()) == [("yes/no", 14), ("number", 7), ("other", 7)]
    assert vqa["test-dev"].classes == {"unknown": 8}
    assert nlvr2["validation"].classes == {"True": 3, "False": 3}
    assert nlvr2["validation"].images == 3


def test_files_that_are_not_as_written(coco: Path, tmp_path: Path) -> None:
    whole = (coco / "test.parquet").read_bytes()
    (coco / "test.parquet").write_bytes((coco / "validation.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"test in .*out has 2 pictures and 10 texts, dataset\.json says 2 and 11"):
        inspect(coco)
    place = whole.index(b"caption")
    (coco / "test.parquet").write_bytes(whole[:place] + b"C" + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"test\.parquet in .* is not as it was written"):
        inspect(coco, check=True)
    (coco / "test.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="no split 'test'"):
        inspect(coco)


def test_a_set_that_is_not_published(coco: Path) -> None:
    content = json.loads((coco / "dataset.json").read_text())
    (coco / "dataset.json").write_text(json.dumps({**content, "name": "mine"}))
    assert inspect(coco).splits["test"].published is None


class TestPublished:
    def test_counts_that_are_equal_come_first(self) -> None:
        exact = published_counts("vqav2", "vqa", "train", 82_774, 435_174)
        assert exact is not None
        assert exact.source.startswith("official code, answers in normal form")
        other = published_counts("vqav2", "vqa", "train", 5, 6)
        assert other is not None
        assert (other.images, other.texts, other.source) == (82_783, 443_757, "visualqa.org")

    def test_unknown_sets_and_splits(self) -> None:
        assert published_counts("vqav2", "vqa", "other", 1, 1) is None
        assert published_counts("coco", "vqa", "train", 1, 1) is None


@given(st.lists(st.integers(0, 20), min_size=1))
def test_lengths_are_those_of_the_sorted_list(values: list[int]) -> None:
    lengths = Lengths.of({value: values.count(value) for value in values})
    ordered = sorted(values)
    assert (lengths.shortest, lengths.longest) == (ordered[0], ordered[-1])
    assert lengths.median == ordered[(len(ordered) - 1) // 2]
    assert lengths.mean == round(sum(values) / len(values), 2)
    assert sum(value <= lengths.p95 for value in values) >= 0.95 * len(values)
    assert sum(value < lengths.p95 for value in values) < 0.95 * len(values)
