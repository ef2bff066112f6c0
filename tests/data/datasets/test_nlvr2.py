"""NLVR2 from its JSON lines and folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets import prepare_set
from miniature import change, counts, jpeg, write_nlvr2
from rows import png, read_rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_nlvr2(tmp_path / "nlvr")
    return tmp_path / "nlvr"


def test_a_row_is_a_pair_with_its_statements(source: Path, tmp_path: Path) -> None:
    info = prepare_set("nlvr2", source, tmp_path / "out")
    assert counts(info) == dict.fromkeys(("train", "validation", "test1"), (3, 6))
    row = read_rows(tmp_path / "out", "train")[1]
    assert row["id"] == "train-10-0"
    assert row["images"] == [png(1), jpeg(1)]  # a JPEG, whatever its name
    assert row["entries"] == [
        {"statement_id": "train-10-0-0", "text": "Statement 0 about train-10-0.", "label": "False"},
        {"statement_id": "train-10-0-1", "text": "Statement 1 about train-10-0.", "label": "True"},
    ]


def test_further_splits(source: Path, tmp_path: Path) -> None:
    splits = ("balanced-validation", "unbalanced-test1", "test2")
    info = prepare_set("nlvr2", source, tmp_path / "out", PrepareConfig(splits=splits))
    assert counts(info) == {"balanced-validation": (1, 2), "test2": (3, 6), "unbalanced-test1": (2, 4)}
    row = read_rows(tmp_path / "out", "test2")[0]
    assert [statement["label"] for statement in row["entries"]] == ["", ""]


@pytest.mark.parametrize("folder", ["nlvr/nlvr2", ""])
def test_other_places(source: Path, tmp_path: Path, folder: str) -> None:
    target = source / folder
    target.mkdir(parents=True, exist_ok=True)
    (source / "nlvr2" / "data").rename(target / "data")
    for split in ("dev", "test1"):
        (source / split).rename(source / "images" / split)
    assert prepare_set("nlvr2", source, tmp_path / "out").splits["test1"].images == 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        *(
            (lambda rows, label=label: rows[1].update(label=label), f"label {label!r}, expected the text")
            for label in (True, "true", None, "")
        ),
        (lambda rows: rows.append(rows[1]), "comes twice"),
    ],
)
def test_bad_rows(source: Path, tmp_path: Path, edit: Callable[[Any], object], message: str) -> None:
    change(source / "nlvr2" / "data" / "dev.json", edit)
    with pytest.raises(ValueError, match=rf"1 bad .*dev-0-0-1 of dev\.json:? {message}"):
        prepare_set("nlvr2", source, tmp_path / "out")


def test_an_empty_statement_is_bad(source: Path, tmp_path: Path) -> None:
    change(source / "nlvr2" / "data" / "dev.json", lambda rows: rows[1].update(sentence=" \n"))
    with pytest.raises(ValueError, match=r"1 bad .*dev-0-0: statement 'dev-0-0-1' is empty$"):
        prepare_set("nlvr2", source, tmp_path / "out")
    info = prepare_set("nlvr2", source, tmp_path / "out", PrepareConfig(max_errors=1))
    assert info.splits["validation"].examples == 5
    change(source / "nlvr2" / "data" / "dev.json", lambda rows: rows[1].update(sentence=None))
    with pytest.raises(ValueError, match=r"dev\.json is not as published"):
        prepare_set("nlvr2", source, tmp_path / "other")


def test_a_missing_second_picture(source: Path, tmp_path: Path) -> None:
    (source / "images" / "train" / "8" / "train-10-0-img1.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 bad .*train-10-0: 'images/train/8/train-10-0-img1\.png': there is no such"
    ):
        prepare_set("nlvr2", source, tmp_path / "out")
