"""Reports of errors: the worst misses with their images, confusions, calibration and slices, in one offline file."""

import csv
import io
import re
from copy import copy
from dataclasses import replace
from html import unescape
from types import SimpleNamespace

import pytest
from PIL import Image

from bridgetower.data.sets.schema import SCHEMAS
from bridgetower.evaluation.config import Judgement, RetrievalConfig
from bridgetower.processor import open_image
from bridgetower.reports.errors import card, read_slices, write_errors
from bridgetower.tasks.table import evaluate
from helpers.sets import ANSWERS, question_records, write_entry_set, write_set


def tables(page):
    """The rows of each table by its caption."""
    tables = {}
    for content in re.findall(r"<table>(.*?)</table>", page, re.DOTALL):
        rows = [
            re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
            for row in re.findall(r"<tr[^>]*>(.*?)</tr>", content)
        ]
        caption = re.search("<caption>(.*?)</caption>", content)
        tables[caption[1]] = [[re.sub("<[^>]+>", "", cell) for cell in row] for row in rows]
    return tables


def judgement(number, **changes):
    values = {"target": "red", "prediction": "red", "score": 1.0, "error": 0.0, "probability": 0.9}
    return Judgement(id=str(number), images=(0,), text=f"text {number}", **{**values, **changes})


@pytest.fixture
def outcome(answering_predictor, tmp_path):
    """Of questions that the model answers at random."""
    folder = write_entry_set(tmp_path / "vqa", "vqa")
    return evaluate(answering_predictor, "vqav2", [folder], "validation", RetrievalConfig())


@pytest.fixture
def page_of(tmp_path):
    def write(judgements, images, title="", **options):
        write_errors(tmp_path / "errors.html", judgements, images, title=title, **options)
        return (tmp_path / "errors.html").read_text(encoding="utf-8")

    return write


def test_judgements_are_the_predictions(outcome):
    judgements = outcome.judge()
    assert [judgement.prediction for judgement in judgements] == [
        row["answer"] for row in outcome.predictions
    ]
    mean = sum(judgement.score for judgement in judgements) / len(judgements)
    assert mean == pytest.approx(outcome.metrics["vqa_score"], abs=5e-5)
    assert {name for judgement in judgements for name in judgement.groups} == {
        "answer_type",
        "question_type",
    }


def test_a_set_with_one_answer_each(outcome, answering_predictor, page_of, tmp_path):
    """As in sets of one's own: what is right is neither scored as wrong nor listed as a miss."""
    answers = {row["question_id"]: row["answer"] for row in outcome.predictions}
    records = question_records("validation", 5)
    first = records[0].entries[0].question_id

    def answered(question):
        answer = (
            "The other."
            if question.question_id == first
            else f"{answers[question.question_id].title()}."
        )
        return replace(question, answers=(answer,))

    records = [replace(record, entries=tuple(map(answered, record.entries))) for record in records]
    files = {"answers.json": list(ANSWERS)}
    changed = write_set(tmp_path / "changed", {"validation": records}, SCHEMAS["vqa"], **files)
    outcome = evaluate(answering_predictor, "vqav2", [changed], "validation", RetrievalConfig())
    assert outcome.metrics["vqa_score"] == pytest.approx(1 - 1 / len(answers), abs=5e-5)
    page = page_of(outcome.judge(), outcome.images)
    assert re.findall(r'<b class="mark">(.*?)</b>', page) == ["other"]


def test_the_answer_of_most_is_no_miss(outcome, page_of):
    judgements = [
        judgement(1, score=0.6, error=0.4),
        judgement(2, prediction="blue", score=0.6, error=0.3),
    ]
    assert re.findall(r'<p class="query">(.*?)</p>', page_of(judgements, outcome.images)) == [
        "text 2"
    ]


def test_images_are_on_the_background_of_the_model(tiny_processor):
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(file, "PNG")
    for background in (None, (255, 255, 255), (0, 128, 0)):
        processor = copy(tiny_processor)
        processor.config = replace(processor.config, background=background)
        images = SimpleNamespace(contents=lambda numbers: [file.getvalue()], processor=processor)
        small = card(judgement(1), images)["images"][0][0]
        expected = open_image(file.getvalue(), background=background).getpixel((4, 4))
        seen = Image.open(io.BytesIO(small)).convert("RGB").getpixel((4, 4))
        assert max(abs(a - b) for a, b in zip(seen, expected, strict=True)) <= 3
        assert expected == (background or (0, 0, 0))


def test_what_the_page_says(outcome, page_of):
    wrong = [
        judgement(
            1,
            prediction="blue",
            score=0.0,
            error=0.8,
            probability=0.8,
            groups={"shop": "north <b>"},
        ),
        judgement(
            2, prediction="blue", score=0.0, error=0.95, probability=0.95, groups={"shop": "south"}
        ),
        judgement(
            3, prediction="green", score=0.4, error=0.1, probability=0.25, groups={"shop": "south"}
        ),
    ]
    right = [judgement(number, groups={"shop": "north <b>"}) for number in range(4, 10)]
    page = page_of([*wrong, *right], outcome.images, "<my> model", misses=2)
    words = " ".join(re.sub(r"<[^>]+>", "", unescape(page)).split())
    assert "71 % of 9 examples are right; 3 are not, or not quite." in words
    # the surest miss first
    assert re.findall(r'<p class="query">(.*?)</p>', page) == [
        "text 2",
        "text 1",
    ]
    assert page.count("data:image/webp;base64,") == 2
    assert "<my>" not in page
    assert "north <b>" not in page
    assert not re.search(r"""(src|href)=["']https?://|<script""", page)
    page_tables = tables(page)
    assert page_tables["The most frequent"][1:] == [["red", "blue", "2"], ["red", "green", "1"]]
    shops = [[cell.replace("\xa0", " ") for cell in row] for row in page_tables["By shop"][1:]]
    assert shops == [
        ["south", "2", "20 %", "1.8 % to 78 %"],
        ["north &lt;b&gt;", "7", "86 %", "49 % to 97 %"],
    ]
    assert "By right answer" not in page_tables  # which is the same for all


def test_a_table_of_ones_own_to_slice_by(outcome, page_of, tmp_path):
    judgements = outcome.judge()
    table = tmp_path / "slices.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["id", "light"], *([judgement.id, "day"] for judgement in judgements[:4])]
        )
        csv.writer(file).writerows([[judgement.id, "night"] for judgement in judgements[4:]])
    counts = {
        row[0]: row[1]
        for row in tables(page_of(judgements, outcome.images, slices=read_slices(table)))[
            "By light"
        ][1:]
    }
    assert counts == {"day": "4", "night": str(len(judgements) - 4)}
    for content, message in {
        "name\na\n": "no rows with a column",
        "id,light\nx,day\n": "none of the 10",
        "id,light\nx,day\ny,day, or night\n": r"slices\.csv has a row with more cells than its header; quote",
        f"id,light\nx,{'a' * (csv.field_size_limit() + 1)}\n": r"slices\.csv cannot be read as CSV \(field larger than",
    }.items():
        table.write_text(content)
        with pytest.raises(ValueError, match=message):
            page_of(judgements, outcome.images, slices=read_slices(table))
    with pytest.raises(ValueError, match="no right answer is known"):
        page_of([], outcome.images)


def test_retrieval(predictor, tiny_dataset):
    outcome = evaluate(
        predictor, "retrieval", [tiny_dataset], "test", RetrievalConfig(candidates=4)
    )
    judgements = outcome.judge()
    assert len(judgements) == outcome.counts["num_texts"]
    recall = sum(judgement.score for judgement in judgements) / len(judgements)
    assert recall == pytest.approx(outcome.metrics["two_stage_text_to_image_r1"])
    assert [judgement.error == 0 for judgement in judgements] == [
        (judgement.predicted_image,) == judgement.images for judgement in judgements
    ]


def test_the_command(run, refused, tiny_checkpoint, tiny_dataset, tmp_path):
    page = tmp_path / "errors.html"
    command = ("evaluate", tiny_checkpoint, "retrieval", "--data", tiny_dataset, "--candidates", 4)
    run(*command, "--report", page)
    content = page.read_text(encoding="utf-8")
    assert [
        words for words in ("right image", "found first", "Calibration") if words not in content
    ] == []
    for options, message in {
        ("--slices", "a.csv"): "is for a report of errors; add --report",
        ("--report", tmp_path / "none" / "a.html"): "is no folder; make it, or choose another",
        ("--report", page, "--fold-size", 3): "ranks without folds",
        (
            "--report",
            page,
            "--slices",
            tmp_path / "a.csv",
        ): f"{tmp_path}/a.csv: No such file or directory",
    }.items():
        # before a model is looked for
        assert message in refused("evaluate", "no-model", *command[2:], *options)


@pytest.mark.parametrize("kind", ["snli-ve", "nlvr2"])
def test_statements(answering_predictor, page_of, tmp_path, kind):
    outcome = evaluate(
        answering_predictor,
        kind,
        [write_entry_set(tmp_path / kind, kind)],
        "validation",
        RetrievalConfig(),
    )
    judgements = outcome.judge()
    assert sum(judgement.score for judgement in judgements) / len(judgements) == pytest.approx(
        outcome.metrics["accuracy"]
    )
    misses = sum(judgement.score < 1 for judgement in judgements)
    assert page_of(judgements, outcome.images).count("data:image/webp") == misses * (
        2 if kind == "nlvr2" else 1
    )
