"""GLUE's files: columns, headers, quotes, labels, rows that are bad; rows as batches."""

import hashlib
import logging
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import originals
from bridgetower.data.batch import BatchKey
from bridgetower.data.config import GlueName
from bridgetower.data.single_tower import GLUE, GlueTexts, read_glue
from bridgetower.processor import Processor
from bridgetower.tasks.single_tower import GLUE_METRICS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return originals.write_glue(tmp_path_factory.mktemp("glue"))


def test_every_task_has_its_metrics() -> None:
    assert set(GLUE) == set(GLUE_METRICS) == set(get_args(GlueName))


@pytest.mark.parametrize("name", get_args(GlueName))
def test_every_split_of_every_task(folder: Path, name: Any) -> None:
    task = GLUE[name]
    for split in task.files:
        rows = read_glue(folder, name, split)
        assert {len(row.texts) for row in rows} == {len(task.texts)}
        assert all(text == text.strip() != "" for row in rows for text in row.texts)
        labels = {row.label for row in rows}
        assert labels == {""} if split.startswith("test") else labels <= (set(task.classes) or labels)
    assert read_glue(folder / task.folder, name, "train") == read_glue(folder, name, "train")


@pytest.mark.parametrize(
    ("name", "row", "texts", "label"),
    [
        ("cola", 1, ('The "car honked down the road.',), "0"),  # a quote is a letter
        ("sst-2", 0, ("hide new secretions from the parental units",), "0"),
        ("mrpc", 0, ("Amrozi accused his brother .", "Referring to him , Amrozi accused ."), "1"),  # after a BOM
        ("qqp", 1, ("How do I?", "How to?"), "1"),
        ("sts-b", 1, ("A man plays a flute.", "A man plays."), "3.80"),
        ("rte", 0, ("No weapons found.", "Weapons found."), "not_entailment"),
        ("qnli", 1, ("What is it?", "It is a cat."), "entailment"),
        ("mnli", 2, ("The old one.", "The new one"), "contradiction"),  # the gold label, not the first annotator's
    ],
)
def test_rows(folder: Path, name: Any, row: int, texts: tuple[str, ...], label: str) -> None:
    found = read_glue(folder, name, "train")[row]
    assert (found.texts, found.label) == (texts, label)


def test_bad_rows_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    originals.write_glue(tmp_path)
    path = tmp_path / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "7\t8\t9\tcut off\n10\t11\t12\ta?\tb?\tmaybe\n")
    with pytest.raises(
        ValueError, match=r"8 good and 2 bad rows \(line 10: 4 columns; line 11: label 'maybe'\); max_errors"
    ):
        read_glue(tmp_path, "qqp", "train", max_errors=1)
    with caplog.at_level(logging.WARNING):
        assert len(read_glue(tmp_path, "qqp", "train", max_errors=2)) == 8
    assert "2 bad rows are left out" in caplog.text


def test_rows_keep_their_numbers_and_a_test_split_takes_no_bad_one(tmp_path: Path) -> None:
    originals.write_glue(tmp_path)
    for file, bad in (("dev.tsv", "7\tcut off"), ("test.tsv", "7")):
        path = tmp_path / "RTE" / file
        header, *lines = path.read_text().splitlines()
        path.write_text("\n".join([header, lines[0], bad, *lines[1:]]) + "\n")
    assert [row.index for row in read_glue(tmp_path, "rte", "validation", max_errors=1)] == [0, *range(2, 9)]
    with pytest.raises(ValueError, match=r"test\.tsv has 2 good and 1 bad rows .*; max_errors is 0"):
        read_glue(tmp_path, "rte", "test", max_errors=1)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="RTE has no split 'validation-mismatched'; expected one of train, validation, t"
    ):
        read_glue(folder, "rte", "validation-mismatched")
    with pytest.raises(FileNotFoundError, match=r"no train\.tsv in .*; give the folder of GLUE's RTE"):
        read_glue(tmp_path, "rte", "train")
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "dev.tsv").write_bytes(b"index\tsentence1\tsentence2\tlabel\n9\tcaf\xe9\tb\tentailment\n")
    with pytest.raises(ValueError, match=r"dev\.tsv is not UTF-8"):
        read_glue(tmp_path, "rte", "validation")
    (tmp_path / "QNLI").mkdir()
    (tmp_path / "QNLI" / "dev.tsv").write_text("index\tsentence1\tsentence\n0\ta\tb\n")
    with pytest.raises(ValueError, match="has no column question, label; it has index, sentence1, sentence"):
        read_glue(tmp_path, "qnli", "validation")


def test_single_texts_and_classes(folder: Path, tiny_processor: Processor) -> None:
    texts = GlueTexts(folder, "sst-2", "train", tiny_processor)
    batch = texts[BatchKey((1, 0), 5)]
    expected = tiny_processor.texts(
        ["that loves its characters", "hide new secretions from the parental units"], truncate=True
    )
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert batch.labels.tolist() == [1, 0]
    assert texts.labels().tolist() == [0, 1] * 4
    assert (batch.ids, batch.seed) == (("1", "0"), 5)


def test_pairs_and_numbers(folder: Path, tiny_processor: Processor) -> None:
    texts = GlueTexts(folder, "sts-b", "train", tiny_processor)
    batch = texts[BatchKey((2, 1), 5)]
    ids = tiny_processor.pair_ids([("A man spreads cheese.", "He sleeps."), ("A man plays a flute.", "A man plays.")])
    assert torch.equal(batch.input_ids, tiny_processor.pad(ids).input_ids)
    assert batch.labels.tolist() == pytest.approx([0.0, 3.8])


def test_several_splits_and_no_labels(folder: Path, tiny_processor: Processor) -> None:
    assert len(GlueTexts(folder, "mnli", ("train", "validation-mismatched"), tiny_processor)) == 18
    texts = GlueTexts(folder, "mnli", "test", tiny_processor)
    assert texts[BatchKey((0, 1), 0)].labels is None
    with pytest.raises(ValueError, match=r"test_matched\.tsv has no labels; choose a split that has"):
        texts.labels()
    path = folder / "MNLI" / "test_matched.tsv"
    assert texts.digests() == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
