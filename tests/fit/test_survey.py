"""What the columns of a source are taken for, and the splits that follow."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from bridgetower.fitting.rules import choose_splits
from bridgetower.fitting.survey import ColumnValues, FitColumns, choose_task, survey_source
from helpers.contracts import check_contract

TABLES = json.loads((Path(__file__).parent / "tables.json").read_text())


def task_of(folder, table):
    """Writes a table whose values come in turn, with its images but for the first `missing`."""
    source = folder / "table.jsonl"
    rows = []
    for number in range(table.get("rows", 12)):
        image = f"{number}.png"
        if number >= table.get("missing", 0):
            Image.new("RGB", (8, 8), "red").save(folder / image)
        rows.append(
            {
                name: image if values == "images" else values[number % len(values)]
                for name, values in table["columns"].items()
            }
        )
    source.write_text("\n".join([table.get("first", ""), *map(json.dumps, rows)]))
    columns = FitColumns(**table.get("named", {}))
    return choose_task(str(source), survey_source(str(source), columns), columns)


@pytest.mark.parametrize("name", [name for name in TABLES if "task" in TABLES[name]])
def test_the_task_follows_from_the_columns(name, tmp_path):
    assert task_of(tmp_path, TABLES[name]).kind == TABLES[name]["task"]


def test_settings_and_lines_of_each_column(tmp_path):
    tasks = {}
    for name, table in TABLES.items():
        if "task" in table:
            (tmp_path / name).mkdir()
            task = task_of(tmp_path / name, table)
            tasks[name] = {"settings": task.settings, "lines": task.lines}
    check_contract("surveys", tasks)


@pytest.mark.parametrize("name", [name for name in TABLES if "error" in TABLES[name]])
def test_columns_that_make_no_task_are_named(name, tmp_path):
    with pytest.raises(ValueError, match=TABLES[name]["error"]):
        task_of(tmp_path, TABLES[name])


def test_of_many_values_a_thousand_are_counted():
    values = ColumnValues()
    for number in range(999):
        values.add(f"a{number}")
    assert values.summary().startswith("999 values: a0 1, a1 1")
    for text in ("a999", "a1000", "a0"):
        values.add(text)
    assert values.summary() == "at least 1,000 values"
    assert values.counts.total() == 1001


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
