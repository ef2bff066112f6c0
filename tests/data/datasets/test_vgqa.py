"""VG-QA from Visual Genome's files."""

from dataclasses import replace
from pathlib import Path

import pytest

from bridgetower.data.answers import read_vocabulary
from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets import prepare_set
from bridgetower.data.datasets.vg import VgqaConfig
from bridgetower.files import write_json
from miniature import change, jpeg, write, write_coco, write_visual_genome
from rows import read_rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_visual_genome(tmp_path / "vg")
    write_coco(tmp_path / "coco")
    return tmp_path / "vg"


@pytest.fixture
def config(tmp_path: Path) -> VgqaConfig:
    (tmp_path / "vqa").mkdir()
    write_json(tmp_path / "vqa" / "answers.json", ["yes", "no", "2"])
    return VgqaConfig(answers=tmp_path / "vqa", karpathy=tmp_path / "coco" / "dataset_coco.json")


def test_pictures_of_coco_that_are_held_out_are_left_out(source: Path, tmp_path: Path, config: VgqaConfig) -> None:
    info = prepare_set("vgqa", source, tmp_path / "out", config)
    assert [row["id"] for row in read_rows(tmp_path / "out", "train")] == ["1", "2", "4", "5"]
    assert info.some_left_out["image in COCO's val or test split"] == ["3"]
    wider = prepare_set("vgqa", source, tmp_path / "wider", replace(config, leave_out=("restval", "val", "test")))
    assert [row["id"] for row in read_rows(tmp_path / "wider", "train")] == ["1", "2", "5"]
    assert wider.settings["leave_out"] == ["restval", "val", "test"]


def test_questions_with_one_answer_of_the_vocabulary(source: Path, tmp_path: Path, config: VgqaConfig) -> None:
    info = prepare_set("vgqa", source, tmp_path / "out", config)
    row = read_rows(tmp_path / "out", "train")[0]
    assert row["images"] == [jpeg(1)]
    asked = [(question["question_id"], question["question"], question["answers"]) for question in row["entries"]]
    assert asked == [
        (1_000_100, "Is it red?", ["Yes."]),
        (1_000_101, "How many?", ["Two."]),
        (1_000_107, "Is it  red?", ["No"]),
    ]
    assert info.splits["train"].examples == 12
    assert info.left_out == {
        "answer not in the vocabulary": 8,
        "question that was asked before": 4,
        "question with several answers": 8,
        "image in COCO's val or test split": 1,
    }
    assert read_vocabulary(tmp_path / "out") == ("yes", "no", "2")


def test_an_empty_question_is_bad(source: Path, tmp_path: Path, config: VgqaConfig) -> None:
    change(source / "annotations" / "question_answers.json", lambda rows: rows[0]["qas"][1].update(question=""))
    with pytest.raises(ValueError, match=r"1 bad item.*: 1: question 1000101 is empty$"):
        prepare_set("vgqa", source, tmp_path / "out", config)
    assert prepare_set("vgqa", source, tmp_path / "out", replace(config, max_errors=1)).splits["train"].examples == 11


def test_sources_are_named(source: Path, tmp_path: Path, config: VgqaConfig) -> None:
    (tmp_path / "coco" / "dataset_coco.json").rename(source / "dataset_coco.json")
    info = prepare_set("vgqa", source, tmp_path / "out", replace(config, karpathy=None))
    assert info.sources.keys() == {
        "answers.json",
        "dataset_coco.json",
        "image_data.json",
        "annotations/question_answers.json",
    }


def test_no_held_out_picture_gets_into_training_whatever_may_be_bad(
    source: Path, tmp_path: Path, config: VgqaConfig
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file dataset_coco\.json or karpathy"):
        prepare_set("vgqa", source, tmp_path / "out", replace(config, karpathy=None, max_errors=9))
    write(tmp_path / "other.json", {"images": [{"cocoid": 9, "split": "train"}, {"cocoid": 1, "split": "val"}]})
    with pytest.raises(ValueError, match=r"other\.json has no image of split test; check that it is the right file"):
        prepare_set("vgqa", source, tmp_path / "out", replace(config, karpathy=tmp_path / "other.json", max_errors=9))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        prepare_set("vgqa", source, tmp_path / "out", replace(config, karpathy=tmp_path / "nowhere.json", max_errors=9))
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_missing_files(source: Path, tmp_path: Path, config: VgqaConfig) -> None:
    (source / "image_data.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file image_data\.json or annotations/image_data\.json"):
        prepare_set("vgqa", source, tmp_path / "out", replace(config, max_errors=9))
    with pytest.raises(FileNotFoundError, match=r"no answers\.json in"):
        prepare_set("vgqa", source, tmp_path / "out", replace(config, answers=source))
    (source / "annotations" / "question_answers.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file question_answers\.json or annotations/question_answers"):
        prepare_set("vgqa", source, tmp_path / "out", replace(config, max_errors=9, leave_out=()))
    with pytest.raises(ValueError, match="vgqa takes a VgqaConfig, given is a PrepareConfig"):
        prepare_set("vgqa", source, tmp_path / "out", PrepareConfig())
