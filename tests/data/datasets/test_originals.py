"""Original files: where they may lie, and what is said when they are not as published."""

import pytest

from bridgetower.data.sets.datasets import prepare_set
from bridgetower.data.sets.datasets.spec import DatasetSpec, Originals
from bridgetower.data.sets.schema import CAPTIONS
from helpers.published_sets import write_coco, write_file, write_json_lines
from helpers.sets import png_of_shade, read_rows


@pytest.fixture
def originals(tmp_path):
    return Originals(folder=tmp_path, splits=("train",))


def test_an_annotation_is_at_the_first_place_that_has_it(originals, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no file a\.json or b/a\.json in .*, or leave out what needs it"
    ):
        originals.annotation("a.json", "b/a.json")
    write_file(tmp_path / "karpathy" / "a.json", {})
    assert originals.annotation("a.json", "karpathy/a.json") == tmp_path / "karpathy" / "a.json"
    write_file(tmp_path / "a.json", {})
    assert originals.annotation("a.json", "karpathy/a.json") == tmp_path / "a.json"
    assert len(originals.used) == 2


class TestItems:
    def test_one_by_one(self, originals, tmp_path):
        write_file(
            tmp_path / "a.json",
            {"info": {"images": [0]}, "images": [{"id": 2**40, "x": 0.5}, {"id": "ü"}]},
        )
        assert list(originals.items(tmp_path / "a.json", "images")) == [
            {"id": 2**40, "x": 0.5},
            {"id": "ü"},
        ]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"images": [{"id": 1}, {"id"', r"is not valid JSON \(.*\); copy it again$"),
            ("<html>", "is not valid JSON"),
            ('{"annotations": [1]}', "has no images list; check that it is the right file"),
            ('{"images": []}', "has no images list"),
        ],
    )
    def test_says_what_is_wrong(self, originals, tmp_path, content, message):
        write_file(tmp_path / "a.json", content)
        with pytest.raises(ValueError, match=message):
            list(originals.items(tmp_path / "a.json", "images"))


class TestLines:
    def test_one_by_one(self, originals, tmp_path):
        write_file(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": "\\u2028 ü"}\n')
        assert list(originals.lines(tmp_path / "a.jsonl")) == [{"a": 1}, {"a": "\u2028 ü"}]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("[1]", "line 2 holds a list; expected a JSON object"),
            ('{"a"', "line 2 is not valid JSON"),
            ("[" * 9999, "line 2 is nested too deep"),
        ],
    )
    def test_says_what_is_wrong(self, originals, tmp_path, line, message):
        write_file(tmp_path / "a.jsonl", '{"a": 1}\n' + line)
        with pytest.raises(ValueError, match=message):
            list(originals.lines(tmp_path / "a.jsonl"))


def test_a_picture_at_the_place_that_has_it(originals, tmp_path):
    write_file(tmp_path / "b" / "1.jpg", b"x")
    assert originals.image("a/1.jpg", "b/1.jpg").name == "b/1.jpg"
    assert originals.image("a/2.jpg", "b/2.jpg").name == "a/2.jpg"


def test_a_field_that_is_not_there_is_named(tmp_path):
    write_coco(tmp_path / "coco")
    write_file(
        tmp_path / "coco" / "dataset_coco.json",
        {"images": [{"file_name": "a.jpg", "split": "train"}]},
    )
    with pytest.raises(
        ValueError, match=r"dataset_coco\.json is not as published \(KeyError\('filename'\)\)"
    ):
        prepare_set("coco", tmp_path / "coco", tmp_path / "out")


def test_a_set_of_ones_own(tmp_path):
    def fill(originals, writer, config):
        for row in originals.lines(originals.annotation("list.jsonl")):
            writer.add(
                [originals.image(row["file"])], [row["text"]], name=row["file"], split="train"
            )

    for number in range(3):
        write_file(tmp_path / "mine" / f"{number}.png", png_of_shade(number))
    write_json_lines(
        tmp_path / "mine" / "list.jsonl",
        [{"file": f"{n}.png", "text": f"shade {n}"} for n in range(3)],
    )
    mine = DatasetSpec(name="mine", schema=CAPTIONS, splits=("train",), fill=fill)
    info = prepare_set(mine, tmp_path / "mine", tmp_path / "out")
    assert (info.name, info.splits["train"].images) == ("mine", 3)
    assert read_rows(tmp_path / "out", "train")[2]["entries"] == ["shade 2"]


def test_no_such_set(tmp_path):
    with pytest.raises(ValueError, match="no set called 'emoji'; sets are coco, flickr30k"):
        prepare_set("emoji", tmp_path, tmp_path / "out")
