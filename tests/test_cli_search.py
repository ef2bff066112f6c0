"""The verbs of data and search: JSON lines for scripts, tables for readers, one line for user errors."""

import hashlib
import sys

import pytest
from PIL import Image

from bridgetower import cli
from bridgetower.data.sets.datasets import DATASETS, prepare_set
from bridgetower.data.sets.prepared_set import PreparedSet
from bridgetower.files import write_json
from bridgetower.search.index import Index, Unrelated
from bridgetower.search.searcher import Searcher
from helpers.published_sets import (
    FREQUENT_ANSWERS,
    SET_WRITERS,
    write_coco,
    write_nlvr2_arrow,
    write_vg_arrow,
    write_visual_genome,
    write_vqav2,
)
from helpers.sources import SUBTITLE_TEXTS, SUBTITLES, write_clip


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (24 + number, 24), colour).save(folder / f"{colour}.png")
    return folder


class TestIndex:
    def test_makes_and_updates(self, run, tiny_checkpoint, photos, tmp_path):
        command = ("index", photos, "--out", tmp_path / "photos.lance", "--model", tiny_checkpoint)
        (first,) = run(*command)
        assert first.pop("seconds") > 0
        counts = {
            "images": 3,
            "added": 3,
            "changed": 0,
            "removed": 0,
            "reused": 0,
            "cut": 0,
            "bad": [],
        }
        assert first == {"index": str(tmp_path / "photos.lance"), **counts}
        (photos / "broken.png").write_text("")
        (second,) = run(*command, "--max-errors", 1, "--batch-size", 1)
        assert second["bad"] == ["'broken.png': it is empty (0 bytes); fetch the image again"]

    def test_errors(self, refused, tiny_checkpoint, photos, tmp_path):
        command = ("index", photos, "--out", tmp_path / "photos.lance", "--model", tiny_checkpoint)
        (photos / "broken.png").write_text("")
        assert (
            "1 bad item, allowed are 0 (--max-errors N allows more); the other 3 are in the"
            in refused(*command)
        )
        (tmp_path / "none").mkdir()
        for source, out, message in (  # no model is loaded for what is wrong anyway
            (photos, "photos.lance", "no-model"),
            (photos, "photos", "is no name for a table"),
            (tmp_path / "nowhere", "a.lance", "nowhere"),
            (tmp_path / "none", "a.lance", "has nothing that can be read"),
        ):
            arguments = ("--out", tmp_path / out, "--model", tmp_path / "no-model")
            assert message in refused("index", source, *arguments)


class TestSearch:
    @pytest.fixture
    def index(self, run, tiny_checkpoint, photos, tmp_path):
        (photos / "red.txt").write_text("[bold]\x1b[2J\nwine\n")
        run("index", photos, "--out", tmp_path / "photos.lance", "--model", tiny_checkpoint)
        return tmp_path / "photos.lance"

    def test_lines_for_scripts(self, run, index, photos, tiny_checkpoint):
        rows = run("search", index, "red bar")
        expected = Searcher(index, tiny_checkpoint).search("red bar")
        assert [row["rank"] for row in rows] == [1, 2, 3]
        assert [row["path"] for row in rows] == [hit.path for hit in expected]
        assert [(row["cosine"], row["score"]) for row in rows] == [
            (hit.cosine, hit.score) for hit in expected
        ]
        (red,) = run(
            "search", index, "red bar", "--where", "path = 'red.png'", "--model", tiny_checkpoint
        )
        assert red.pop("cosine") < 1
        assert red.pop("score") < 1
        (hit,) = Searcher(index, tiny_checkpoint).search("red bar", where="path = 'red.png'")
        assert red.pop("rank_score") == pytest.approx(hit.rank_score, abs=1e-5)
        assert red.pop("weak") == hit.weak
        assert red == {
            "rank": 1,
            "against": "images",
            "digest": hashlib.sha256((photos / "red.png").read_bytes()).hexdigest(),
            "path": "red.png",
            "file": str(photos / "red.png"),
            "size": (photos / "red.png").stat().st_size,
            **{"width": 24, "height": 24, "captions": ["[bold]\x1b[2J", "wine"]},
        }

    def test_by_picture_with_options(self, run, index, photos, tmp_path):
        (hit,) = run(
            "search",
            index,
            "--image",
            photos / "blue.png",
            "--top",
            1,
            "--sheet",
            tmp_path / "hits.png",
        )
        assert hit["path"] == "blue.png"
        assert "score" not in hit
        assert Image.open(tmp_path / "hits.png").width > 500
        (hit,) = run("search", index, "a", "--against", "captions", "--rerank", 0)
        assert (hit["path"], hit["against"], hit["rank_score"]) == (
            "red.png",
            "captions",
            hit["cosine"],
        )
        photos.rename(tmp_path / "moved")
        assert len(run("search", index, "a", "--root", tmp_path / "moved")) == 3

    def test_a_table_on_a_terminal(self, run, capsys, monkeypatch, index):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "120")
        cli.main(["search", str(index), "red"])
        table = capsys.readouterr().out
        assert table.splitlines()[-1] == f"Next: bridgetower serve --index {index}"
        assert r"[bold]\u001b[2J (and 1 more)" in table  # no markup
        assert table.count("score 0.") == 3
        assert f"{Searcher(index).search('red')[0].rank_score:.3f}" in table
        assert "24x" in table
        assert run("search", index, "red", "--json")[0]["rank"] == 1
        for options in ([], ["--json"]):
            cli.main(["search", str(index), "red", "--where", "width > 999", *options])
            assert capsys.readouterr() == ("", "No image meets the condition.\n")
        cli.main(["search", str(index), "the", "--against", "words"])
        assert capsys.readouterr() == ("", "No image has these words.\n")

    def test_weak_hits_are_told(self, run, capsys, monkeypatch, index):
        opened = Index(index)
        message = "All hits are weak: unrelated texts find images that are just as near.\n"
        cosines = sorted((hit.cosine for hit in Searcher(opened).search("red")), reverse=True)
        for limit, expected in (
            (cosines[1], [False, True, True]),
            (1.0, [True] * 3),
            (-1.0, [False] * 3),
        ):
            opened.set_unrelated(Unrelated(rows=3, images=limit))
            assert [row["weak"] for row in run("search", index, "red", "--rerank", 0)] == expected
            cli.main(["search", str(index), "red", "--json"])
            assert capsys.readouterr().err == (message if all(expected) else "")
        opened.set_unrelated(Unrelated(rows=3, images=cosines[1]))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        cli.main(["search", str(index), "red"])
        table, log = capsys.readouterr()
        assert (table.count(" weak"), log) == (2, "")
        for options in (["--image", str(opened.root / "red.png")], ["--against", "words"]):
            cli.main(["search", str(index), *(["wine"] if "words" in options else []), *options])
            table, log = capsys.readouterr()
            assert ("red.png" in table, " weak" in table, log) == (True, False, "")

    def test_moments(self, run, tiny_checkpoint, tmp_path):
        write_clip(tmp_path / "talk.mp4")
        (tmp_path / "talk.srt").write_text(SUBTITLES, encoding="utf-8")
        command = (
            "index",
            tmp_path / "talk.mp4",
            "--out",
            tmp_path / "talk.lance",
            "--model",
            tiny_checkpoint,
        )
        (report,) = run(*command, "--every", 4, "--max-moments", 100)
        assert report["images"] == 3
        (hit,) = run("search", tmp_path / "talk.lance", "a red square", "--where", "start = 0")
        assert (hit["start"], hit["end"], hit["transcript"]) == (0, 4, SUBTITLE_TEXTS[0])
        assert hit["link"] == f"{(tmp_path / 'talk.mp4').as_uri()}#t=0.000,4.000"

    def test_errors(self, refused, index, tmp_path, monkeypatch):
        fingerprint = Index(index).info.fingerprint
        other = refused("search", index, "red", "--image-size", 40)
        assert f"was made with model {fingerprint}" in other
        assert "nothing to search for" in refused("search", index)
        sheet = tmp_path / "missing" / "hits.png"
        assert f"{sheet} cannot be written: {sheet.parent} is no folder" in refused(
            "search", index, "a", "--sheet", sheet
        )
        assert not sheet.parent.exists()
        monkeypatch.chdir(tmp_path)
        assert "demo, but there is no bridgetower-demo/held-out.lance here" in refused(
            "search", "demo", "red"
        )


NOT_NEEDED = {
    *("region_descriptions.json", "question_answers.json", "image_data.json"),
    *("7", "8", "9", "test2.json", "balanced_dev.json", "unbalanced_dev.json"),
    *("balanced_test1.json", "unbalanced_test1.json"),
}
"""Files and folders of the miniatures that the help of a set does not name."""


def test_every_set_is_here():
    assert SET_WRITERS.keys() == {name for name, spec in DATASETS.items() if spec.fill}


def test_prepares(run, tmp_path):
    write_visual_genome(tmp_path / "in")
    write_coco(tmp_path / "in")
    write_json(tmp_path / "in" / "answers.json", list(FREQUENT_ANSWERS))
    options = ("--answers", tmp_path / "in", "--leave-out", "test")
    (printed,) = run(
        "prepare", "vgqa", "--source", tmp_path / "in", "--out", tmp_path / "set", *options
    )
    assert printed["written"] == str(tmp_path / "set")
    questions = PreparedSet(tmp_path / "set").numbers
    assert printed["splits"] == {"train": {"images": 5, "questions": len(questions)}}
    assert len(questions) > 5


@pytest.mark.parametrize("name", SET_WRITERS)
def test_help_names_the_files(name, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["prepare", name, "--help"])
    text = capsys.readouterr().out
    SET_WRITERS[name](tmp_path)
    expected = {
        path.parent.name if path.suffix in (".jpg", ".png") else path.name
        for path in tmp_path.rglob("*.*")
    }
    assert [word for word in expected - NOT_NEEDED if word not in text] == []


def test_arrow(run, tmp_path):
    write_nlvr2_arrow(tmp_path / "arrows")
    write_vg_arrow(tmp_path / "arrows")
    printed = run("prepare", "arrow", "--source", tmp_path / "arrows", "--out", tmp_path / "out")
    assert printed == [
        {
            "written": str(tmp_path / "out" / "vg"),
            "splits": {"train": {"images": 2, "captions": 4}},
            "left_out": {},
        },
        {
            "written": str(tmp_path / "out" / "nlvr2"),
            "splits": {
                name: {"images": 2, "statements": 4} for name in ("train", "validation", "test1")
            },
            "left_out": {},
        },
    ]


@pytest.fixture
def questions_folder(tmp_path):
    write_vqav2(tmp_path / "vqa")
    prepare_set("vqav2", tmp_path / "vqa", tmp_path / "out")
    return tmp_path / "out"


def test_inspect_json_and_page(run, questions_folder, tmp_path):
    (printed,) = run(
        "inspect", questions_folder, "--html", tmp_path / "page.html", "--num-samples", 2, "--check"
    )
    train = printed["splits"]["train"]
    assert (printed["name"], printed["kind"], train["images"], train["texts"]) == (
        "vqav2",
        "vqa",
        7,
        28,
    )
    assert train["published"] == {"images": 82_783, "texts": 443_757, "source": "visualqa.org"}
    assert train["words"]["median"] == 6
    assert train["classes"] == {"yes/no": 14, "number": 7, "other": 7}
    assert printed["html"] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_inspect_tables(questions_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main(["inspect", str(questions_folder)])
    text = capsys.readouterr().out
    assert "7 of 82,783" in text
    assert "8 of 107,394" in text
    assert "train: yes/no 14, number 7, other 7" in text
