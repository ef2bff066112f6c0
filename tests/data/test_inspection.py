"""What a prepared set holds: counted, not believed."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridgetower.data.sets.datasets import DATASETS, prepare_set
from bridgetower.data.sets.inspection import inspect_set, word_lengths
from bridgetower.reports.samples import write_samples
from helpers.published_sets import write_coco, write_nlvr2, write_vqav2
from helpers.sets import CHOICES, Choice, caption_record, write_set


@pytest.fixture(scope="module")
def prepared_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for name, write in (("coco", write_coco), ("vqav2", write_vqav2), ("nlvr2", write_nlvr2)):
        write(folder / f"{name}-source")
        prepare_set(name, folder / f"{name}-source", folder / name)
    return folder


@pytest.fixture
def coco_folder(prepared_sets, tmp_path):
    return Path(shutil.copytree(prepared_sets / "coco", tmp_path / "coco"))


def test_captions(coco_folder):
    _, splits = inspect_set(coco_folder, check=True)
    split = splits["test"]
    assert (split.images, split.texts, dict(split.classes)) == (2, 11, {})
    assert split.words == {"shortest": 4, "median": 4, "mean": 4.0, "p95": 4, "longest": 4}
    assert (split.published.images, split.published.texts) == (5_000, 25_010)
    assert splits["train"].words["longest"] == 8


def test_questions_and_statements(prepared_sets):
    vqa, nlvr2 = (inspect_set(prepared_sets / name)[1] for name in ("vqav2", "nlvr2"))
    assert list(vqa["train"].classes.items()) == [("yes/no", 14), ("number", 7), ("other", 7)]
    assert vqa["test-dev"].classes == {"unknown": 8}
    assert nlvr2["validation"].classes == {"True": 3, "False": 3}
    assert nlvr2["validation"].images == 3


@pytest.mark.parametrize("table", ["images", "examples"])
def test_a_set_that_is_not_as_written(coco_folder, table):
    file = max(
        (coco_folder / f"{table}.lance" / "data").iterdir(), key=lambda path: path.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=rf"row \d+ of .*/{table}\.lance is damaged"):
        inspect_set(coco_folder, check=True)


def test_a_set_that_is_not_published(coco_folder):
    content = json.loads((coco_folder / "dataset.json").read_text())
    (coco_folder / "dataset.json").write_text(json.dumps({**content, "name": "mine"}))
    assert inspect_set(coco_folder)[1]["test"].published is None


def test_published_counts_that_are_equal_come_first():
    exact = DATASETS["vqav2"].published_count("train", 82_774, 435_174)
    assert exact.source.startswith("official code, answers in normal form")
    other = DATASETS["vqav2"].published_count("train", 5, 6)
    assert (other.images, other.texts, other.source) == (82_783, 443_757, "visualqa.org")
    assert DATASETS["vqav2"].published_count("other", 1, 1) is None


class TestSamples:
    def test_every_split_has_samples(self, prepared_sets, tmp_path):
        write_samples(prepared_sets / "nlvr2", tmp_path / "page.html", num_samples=2)
        page = (tmp_path / "page.html").read_text()
        headings = re.findall(r"<h2[^>]*>(\w+): (\d) rows, (\d) statements", page)
        assert headings == [(split, "3", "6") for split in ("train", "validation", "test1")]
        assert page.count("<figure ") == 6
        assert page.count('src="data:image/webp;base64,') == 12
        assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
        assert re.search(
            r"Statement 0 about train-\d+-0\.\s+<span class=\"label\">label: (True|False)</span>",
            page,
        )

    def test_answers_are_shown_once(self, prepared_sets, tmp_path):
        write_samples(prepared_sets / "vqav2", tmp_path / "page.html")
        assert "answers: 2, The  dog, dont know" in (tmp_path / "page.html").read_text()

    def test_what_texts_hold_is_no_markup(self, tmp_path):
        folder = write_set(
            tmp_path / "<b>", {"train": [caption_record(1, entries=("<script>alert(1)</script>",))]}
        )
        write_samples(folder, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert "&lt;script&gt;alert(1)" in page
        assert "<script>" not in page
        assert "<h1>&lt;b&gt;</h1>" in page

    def test_the_seed_chooses(self, prepared_sets, tmp_path):
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            write_samples(
                prepared_sets / "coco", tmp_path / f"{name}.html", num_samples=2, seed=seed
            )
        first, again, other = ((tmp_path / f"{name}.html").read_bytes() for name in "abc")
        assert first == again != other

    def test_refuses(self, prepared_sets, tmp_path):
        with pytest.raises(ValueError, match="num_samples is 0"):
            write_samples(prepared_sets / "coco", tmp_path / "a.html", num_samples=0)
        with pytest.raises(FileNotFoundError, match=r"no dataset\.json"):
            write_samples(tmp_path, tmp_path / "a.html")


@given(st.lists(st.integers(0, 20), min_size=1))
def test_lengths_are_those_of_the_sorted_list(values):
    lengths = word_lengths(Counter(values))
    ordered = sorted(values)
    assert (lengths["shortest"], lengths["longest"]) == (ordered[0], ordered[-1])
    assert lengths["median"] == ordered[(len(ordered) - 1) // 2]
    assert lengths["mean"] == pytest.approx(sum(values) / len(values), abs=0.0051)
    num_below = sum(value < lengths["p95"] for value in values)
    num_up_to = num_below + values.count(lengths["p95"])
    assert num_below < 0.95 * len(values) <= num_up_to


def test_all_texts_of_an_entry_are_counted_and_shown(tmp_path):
    row = caption_record(
        1, entries=(Choice(choice_id="1", question="what is it?", answers=("a dog", "cat")),)
    )
    folder = write_set(tmp_path / "set", {"train": [row]}, CHOICES)
    split = inspect_set(folder, schema=CHOICES)[1]["train"]
    assert (split.texts, split.words) == (
        1,
        {"shortest": 1, "median": 2, "mean": 2.0, "p95": 3, "longest": 3},
    )
    write_samples(folder, tmp_path / "page.html", schema=CHOICES)
    assert "what is it? · a dog · cat" in (tmp_path / "page.html").read_text()
