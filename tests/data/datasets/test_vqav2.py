"""VQAv2 from its question and annotation files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgetower.data.answers import read_vocabulary
from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets import prepare_set
from miniature import ANSWERS, change, coco_name, counts, jpeg, write_vqav2
from rows import read_rows

TRAIN_QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
TRAIN_ANNOTATIONS = "v2_mscoco_train2014_annotations.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_vqav2(tmp_path / "vqa")
    return tmp_path / "vqa"


def test_questions_keep_what_people_said(source: Path, tmp_path: Path) -> None:
    info = prepare_set("vqav2", source, tmp_path / "out")
    assert counts(info) == {"train": (7, 28), "validation": (5, 20), "test": (3, 12), "test-dev": (2, 8)}
    assert (info.kind, info.left_out, len(info.sources)) == ("vqa", {}, 6)
    row = read_rows(tmp_path / "out", "validation")[1]
    assert row["id"] == "43"
    assert row["images"] == [jpeg(43)]
    assert [question["question_id"] for question in row["entries"]] == [43000, 43001, 43002, 43003]
    assert row["entries"][2] == {
        "question_id": 43002,
        "question": "What is number 2 of 43?",
        "question_type": "what is",
        "answer_type": "yes/no",
        "answers": ["no."] * 7 + ["The  dog", "dont know", "no."],
    }


def test_test_questions_have_no_answers_and_their_own_pictures(source: Path, tmp_path: Path) -> None:
    prepare_set("vqav2", source, tmp_path / "out")
    for split in ("test", "test-dev"):
        row = read_rows(tmp_path / "out", split)[0]
        assert row["images"] == [jpeg(1)]
        assert row["entries"][0] == {
            "question_id": 1000,
            "question": "What is number 0 of 1?",
            "question_type": "",
            "answer_type": "",
            "answers": [],
        }


def test_vocabulary_is_that_of_both_annotated_splits(source: Path, tmp_path: Path) -> None:
    prepare_set("vqav2", source, tmp_path / "all")
    # Of picture 9, whose annotations come first, those of the questions 3, 2, 1, 0 in this order.
    assert read_vocabulary(tmp_path / "all") == ("no", "yes", "2")
    assert set(ANSWERS) == {"no", "yes", "2"}
    prepare_set("vqav2", source, tmp_path / "some", PrepareConfig(splits=("validation",)))
    assert read_vocabulary(tmp_path / "some") == ("no", "yes", "2")


def test_other_places(source: Path, tmp_path: Path) -> None:
    (source / "vqav2").mkdir()
    for file in source.glob("*.json"):
        file.rename(source / "vqav2" / file.name)
    assert prepare_set("vqav2", source, tmp_path / "out").splits["train"].examples == 28


def test_test_splits_alone_take_no_annotations(source: Path, tmp_path: Path) -> None:
    for file in source.glob("*_annotations.json"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"no file {TRAIN_ANNOTATIONS} or vqav2/"):
        prepare_set("vqav2", source, tmp_path / "out", PrepareConfig(max_errors=9))
    info = prepare_set("vqav2", source, tmp_path / "out", PrepareConfig(splits=("test", "test-dev")))
    assert list(info.splits) == ["test", "test-dev"]
    assert not (tmp_path / "out" / "answers.json").exists()
    assert "answers.json, which takes the annotations of train and validation" in info.left_out


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (TRAIN_ANNOTATIONS, lambda content: content["annotations"].pop(0), "question 9003 of train has no annotation"),
        (TRAIN_QUESTIONS, lambda content: content["questions"].pop(0), "annotation of question 9000 of train has no q"),
        (
            TRAIN_QUESTIONS,
            lambda content: content["questions"].append(content["questions"][0]),
            "question 9000 of train comes twice",
        ),
        (
            TRAIN_ANNOTATIONS,
            lambda content: content["annotations"][0].update(image_id=10),
            "question 9003 of train has an annotation of another image",
        ),
    ],
)
def test_files_that_do_not_fit(
    source: Path, tmp_path: Path, file: str, edit: Callable[[Any], object], message: str
) -> None:
    change(source / file, edit)
    with pytest.raises(ValueError, match=f"1 bad item.*{message}"):
        prepare_set("vqav2", source, tmp_path / "out")
    assert prepare_set("vqav2", source, tmp_path / "out", PrepareConfig(max_errors=1)).left_out["cannot be used"]


def test_an_empty_question_is_bad(source: Path, tmp_path: Path) -> None:
    change(source / TRAIN_QUESTIONS, lambda content: content["questions"][0].update(question=" "))
    with pytest.raises(ValueError, match=r"1 bad item.*: 9: question 9000 is empty$"):
        prepare_set("vqav2", source, tmp_path / "out")
    info = prepare_set("vqav2", source, tmp_path / "out", PrepareConfig(max_errors=1))
    assert info.splits["train"].examples == 27


def test_a_missing_picture_is_counted_once(source: Path, tmp_path: Path) -> None:
    (source / "train2014" / coco_name(9, "train2014")).unlink()
    with pytest.raises(
        ValueError, match=r"1 bad .*: 9: 'train2014/COCO_train2014_000000000009\.jpg': there is no such"
    ):
        prepare_set("vqav2", source, tmp_path / "out")
