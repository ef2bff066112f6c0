"""What the columns of a source are taken for, and the splits that follow."""

import csv
from collections import Counter

import pytest
from PIL import Image

from bridgetower.fitting.rules import choose_splits
from bridgetower.fitting.survey import FitColumns, choose_task, survey_source


def write_table(folder, heading, rows):
    """Writes a CSV whose images are there."""
    for row in rows:
        for cell in row:
            if str(cell).endswith(".png"):
                Image.new("RGB", (8, 8), "red").save(folder / cell)
    path = folder / "table.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heading.split(","), *rows])
    return str(path)


def task_of(folder, heading, rows, **columns):
    source = write_table(folder, heading, rows)
    columns = FitColumns(**columns)
    return choose_task(source, survey_source(source, columns), columns)


NAMES = [f"{number}.png" for number in range(12)]
TASKS = {
    "captions": ("image_name,comment", [(name, "a dog") for name in NAMES], "pairs", {}),
    "questions": (
        "image,question,answer",
        [(name, "how many?", "2") for name in NAMES],
        "vqa",
        {},
    ),
    "answers of several people": (
        "image,question,answers",
        [(name, "how many?", "2;two;2") for name in NAMES],
        "vqa",
        {"answer_separator": ";"},
    ),
    "classes": (
        "file,label",
        [(name, "dog" if name < "5" else "cat") for name in NAMES],
        "classification",
        {},
    ),
    "classes beside captions": (
        "image,caption,label",
        [(name, "a dog", f"good {name < '5'}") for name in NAMES],
        "classification",
        {},
    ),
    "several classes": (
        "image,tags",
        [(name, "dog|wet" if name < "5" else "dog") for name in NAMES],
        "classification",
        {"label_separator": "|"},
    ),
    "classes as numbers": (
        "image,label",
        [(name, int(name < "5")) for name in NAMES],
        "classification",
        {},
    ),
    "ratings": ("image,rating", [(name, int(name < "5")) for name in NAMES], "regression", {}),
    "numbers called labels": (
        "image,label",
        [(name, f"{number}.5") for number, name in enumerate(NAMES)],
        "regression",
        {},
    ),
    "numbers of many values": (
        "image,label",
        [(name, number) for number, name in enumerate(NAMES)],
        "regression",
        {},
    ),
    "entailment": (
        "image,hypothesis,label",
        [(name, "a dog", "Neutral") for name in NAMES],
        "entailment",
        {},
    ),
    "pairs of images": (
        "image_1,image_2,statement,label",
        [(name, "0.png", "both show a dog", "true") for name in NAMES],
        "image-pairs",
        {},
    ),
    "an empty column of labels": (
        "image,caption,label",
        [(name, "a dog", "") for name in NAMES],
        "pairs",
        {},
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_task_follows_from_the_columns(name, tmp_path):
    heading, rows, kind, settings = TASKS[name]
    task = task_of(tmp_path, heading, rows)
    assert (task.kind, task.settings) == (kind, settings)


def test_each_column_has_a_line(tmp_path):
    rows = [
        (name, "a dog", "dog" if number % 3 else "cat", number) for number, name in enumerate(NAMES)
    ]
    task = task_of(tmp_path, "image_name,comment,label_name,weight", rows)
    assert task.lines[:-1] == [
        "image_name: images, 12 different",
        "comment: texts, in 12 rows",
        "label_name: labels, 2 values: dog 8, cat 4",
        "not used: weight",
    ]


def test_named_columns_and_a_named_task_come_first(tmp_path):
    rows = [(name, "a dog", "dog" if name < "5" else "cat", "1") for name in NAMES]
    heading = "image,caption,kind,label"
    task = task_of(tmp_path, heading, rows, label_column="kind")
    assert (task.kind, task.settings) == ("classification", {"label_column": "kind"})
    task = task_of(tmp_path, heading, rows, task="pairs", text_column="caption")
    assert (task.kind, task.settings) == ("pairs", {"text_column": "caption"})


def test_a_folder_of_folders_has_classes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8), "red").save(tmp_path / name / f"{number}.png")
    survey = survey_source(str(tmp_path), FitColumns())
    assert choose_task(str(tmp_path), survey, FitColumns()).kind == "classification"
    (tmp_path / "cat" / "1.txt").write_text("a cat")
    (tmp_path / "dog" / "1.txt").write_text("a dog")
    survey = survey_source(str(tmp_path), FitColumns())
    assert choose_task(str(tmp_path), survey, FitColumns()).kind == "pairs"


@pytest.mark.parametrize(
    ("heading", "row", "message"),
    [
        ("name,caption", ("dog", "a dog"), "no column of images; it has name, caption"),
        ("image,height", ("0.png", "4"), "has image, height: give text_column"),
        ("image,caption", ("", "a dog"), "no row with an image"),
        ("image,label", ("0.png", "dog"), "one value only \\(dog\\); expected at least two"),
        ("image,rating", ("0.png", "3"), "one value only \\(3\\); expected at least two"),
    ],
)
def test_columns_that_make_no_task_are_named(heading, row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        task_of(tmp_path, heading, [row] * 12)


def test_labels_that_no_two_rows_share_are_refused(tmp_path):
    rows = [("0.png", f"dog {number}") for number in range(12)]
    with pytest.raises(ValueError, match=r"each of 12 rows.*set text_column to label"):
        task_of(tmp_path, "image,label", rows)
    assert task_of(tmp_path, "image,label", [*rows, rows[0]]).kind == "classification"


@pytest.mark.parametrize(
    ("num_images", "of_source", "uses"),
    [
        (499, {"": 499}, (("fold-1", "fold-2", "fold-3", "fold-4", "fold-5"), "", "", ())),
        (500, {"": 500}, (("train",), "validation", "test", (0.1, 0.2))),
        (800, {"": 900}, (("train",), "validation", "test", (0.1, 0.125))),
        (20_000, {"": 20_000}, (("train",), "validation", "test", (0.1, 0.1))),
        (60, {"train": 40, "validation": 9, "test": 11}, (("train",), "validation", "test", ())),
        (60, {"train": 40, "test": 20}, (("train",), "", "test", ())),
        (60, {"train": 40, "validation": 20}, (("train",), "", "validation", ())),
    ],
)
def test_splits_follow_from_the_source_or_the_number_of_images(num_images, of_source, uses):
    splits = choose_splits(num_images, Counter(of_source))
    assert (splits.train, splits.validation, splits.test, splits.fractions) == uses
    assert bool(splits.folds) == (not splits.test)


@pytest.mark.parametrize("of_source", [{"train": 60}, {"test": 60}])
def test_splits_without_anything_to_train_or_to_test_are_refused(of_source):
    with pytest.raises(ValueError, match="expected train and test"):
        choose_splits(60, Counter(of_source))
    with pytest.raises(ValueError, match="at least 10"):
        choose_splits(9, Counter({"": 9}))
