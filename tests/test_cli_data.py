"""`bridgetower prepare SET`: every set has its verb, and says what files it takes; `bridgetower inspect`."""

import sys

import pytest

from bridgetower import cli
from bridgetower.data.datasets import DATASETS, prepare_set
from bridgetower.files import write_json
from miniature import ANSWERS, WRITERS, write_coco, write_visual_genome, write_vqav2
from miniature_arrow import write_nlvr2_arrow, write_vg_arrow

NOT_NEEDED = {
    *("region_descriptions.json", "question_answers.json", "image_data.json"),
    *("7", "8", "9", "test2.json", "balanced_dev.json", "unbalanced_dev.json"),
    *("balanced_test1.json", "unbalanced_test1.json"),
}
"""Files and folders of the miniatures that the help of a set does not name."""


def test_every_set_is_here():
    assert WRITERS.keys() == {name for name, each in DATASETS.items() if each.fill}


def test_prepares(run, tmp_path):
    write_visual_genome(tmp_path / "in")
    write_coco(tmp_path / "in")
    write_json(tmp_path / "in" / "answers.json", list(ANSWERS))
    options = ("--answers", tmp_path / "in", "--leave-out", "test")
    (printed,) = run("prepare", "vgqa", "--source", tmp_path / "in", "--out", tmp_path / "set", *options)
    assert (printed["written"], printed["splits"]) == (str(tmp_path / "set"), {"train": 5})


@pytest.mark.parametrize("name", WRITERS)
def test_help_names_the_files(name, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["prepare", name, "--help"])
    text = capsys.readouterr().out
    WRITERS[name](tmp_path)
    expected = {path.parent.name if path.suffix in (".jpg", ".png") else path.name for path in tmp_path.rglob("*.*")}
    assert [word for word in expected - NOT_NEEDED if word not in text] == []


def test_arrow(run, tmp_path):
    write_nlvr2_arrow(tmp_path / "arrows")
    write_vg_arrow(tmp_path / "arrows")
    printed = run("prepare", "arrow", "--source", tmp_path / "arrows", "--out", tmp_path / "out")
    assert printed == [
        {"written": str(tmp_path / "out" / "vg"), "splits": {"train": 2}, "left_out": {}},
        {
            "written": str(tmp_path / "out" / "nlvr2"),
            "splits": {"train": 2, "validation": 2, "test1": 2},
            "left_out": {},
        },
    ]


@pytest.fixture
def folder(tmp_path):
    write_vqav2(tmp_path / "vqa")
    prepare_set("vqav2", tmp_path / "vqa", tmp_path / "out")
    return tmp_path / "out"


def test_inspect_json_and_page(run, folder, tmp_path):
    (printed,) = run("inspect", folder, "--html", tmp_path / "page.html", "--num-samples", 2, "--check")
    train = printed["splits"]["train"]
    assert (printed["name"], printed["kind"], train["images"], train["texts"]) == ("vqav2", "vqa", 7, 28)
    assert train["published"] == {"images": 82_783, "texts": 443_757, "source": "visualqa.org"}
    assert train["words"]["median"] == 6
    assert train["classes"] == {"yes/no": 14, "number": 7, "other": 7}
    assert printed["html"] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_inspect_tables(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main(["inspect", str(folder)])
    text = capsys.readouterr().out
    assert "7 of 82,783" in text
    assert "8 of 107,394" in text
    assert "train: yes/no 14, number 7, other 7" in text
