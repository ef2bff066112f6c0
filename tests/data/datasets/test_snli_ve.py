"""SNLI-VE from its JSON lines."""

from pathlib import Path

import pytest

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets import prepare_set
from miniature import change, counts, write_snli_ve
from rows import read_rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_snli_ve(tmp_path / "snli")
    return tmp_path / "snli"


def test_splits(source: Path, tmp_path: Path) -> None:
    info = prepare_set("snli-ve", source, tmp_path / "out")
    assert counts(info) == dict.fromkeys(("train", "validation", "test"), (2, 10))
    row = read_rows(tmp_path / "out", "validation")[0]
    assert row["id"] == "3416050490.jpg"
    assert row["entries"][1] == {
        "statement_id": "3416050490.jpg#1r1c",
        "text": "Statement 1 about 3416050490.",
        "label": "contradiction",
    }


def test_the_folder_of_the_official_code(source: Path, tmp_path: Path) -> None:
    (source / "snli_ve").mkdir()
    for file in source.glob("*.jsonl"):
        file.rename(source / "snli_ve" / file.name)
    assert prepare_set("snli-ve", source, tmp_path / "out").splits["test"].examples == 10


def test_pairs_without_an_id_are_numbered(source: Path, tmp_path: Path) -> None:
    change(source / "snli_ve_test.jsonl", lambda rows: [row.pop("pairID") for row in rows])
    prepare_set("snli-ve", source, tmp_path / "out")
    rows = [row["entries"] for row in read_rows(tmp_path / "out", "test")]
    assert [statement["statement_id"] for row in rows for statement in row] == [f"test-{n}" for n in range(1, 11)]


@pytest.mark.parametrize("label", ["-", "Entailment", ""])
def test_a_wrong_label_is_bad(source: Path, tmp_path: Path, label: str) -> None:
    change(source / "snli_ve_dev.jsonl", lambda rows: rows[2].update(gold_label=label))
    with pytest.raises(ValueError, match=rf"1 bad .*snli_ve_dev\.jsonl, line 3: label '{label}', expected one of"):
        prepare_set("snli-ve", source, tmp_path / "out")
    info = prepare_set("snli-ve", source, tmp_path / "out", PrepareConfig(max_errors=1))
    assert info.splits["validation"].examples == 9


def test_repeated_and_empty_ones(source: Path, tmp_path: Path) -> None:
    change(source / "snli_ve_train.jsonl", lambda rows: (rows.append(rows[0]), rows[1].update(sentence2=" ")))
    with pytest.raises(ValueError, match=r"line 11: pair '3416050480\.jpg#0r0n' comes twice"):
        prepare_set("snli-ve", source, tmp_path / "out", PrepareConfig(max_errors=1))
    info = prepare_set("snli-ve", source, tmp_path / "out", PrepareConfig(max_errors=2))
    assert info.some_left_out["cannot be used"] == [
        "snli_ve_train.jsonl, line 2: statement '3416050480.jpg#1r1c' is empty",
        "snli_ve_train.jsonl, line 11: pair '3416050480.jpg#0r0n' comes twice",
    ]
    assert info.splits["train"].examples == 9
