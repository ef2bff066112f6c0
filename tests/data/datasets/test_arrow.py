"""ViLT-style Arrow files of every set."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pytest

from bridgetower.data.sets.answers import read_vocabulary, soft_targets
from bridgetower.data.sets.datasets import DATASETS, prepare_arrow
from bridgetower.data.sets.datasets.spec import ArrowConfig
from helpers.published_sets import (
    ARROW_VOCABULARY,
    coco_name,
    noise_jpeg,
    split_counts,
    write_arrow_file,
    write_cc3m_arrow,
    write_coco_arrow,
    write_flickr30k_arrow,
    write_nlvr2_arrow,
    write_sbu_arrow,
    write_snli_ve_arrow,
    write_vg_arrow,
    write_vgqa_arrow,
    write_vqav2_arrow,
)
from helpers.sets import png_of_shade, read_rows

Counts = Mapping[str, tuple[int, int]]
SETS = {
    "coco": (write_coco_arrow, {"train": (4, 20), "validation": (2, 10), "test": (2, 10)}),
    "flickr30k": (
        write_flickr30k_arrow,
        {"train": (2, 10), "validation": (2, 10), "test": (2, 10)},
    ),
    "cc3m": (write_cc3m_arrow, {"train": (31, 31)}),
    "sbu": (write_sbu_arrow, {"train": (9, 9)}),
    "vg": (write_vg_arrow, {"train": (2, 4)}),
    "vqav2": (
        write_vqav2_arrow,
        dict.fromkeys(("train", "validation", "test", "test-dev"), (2, 4)),
    ),
    "vgqa": (write_vgqa_arrow, {"train": (1, 2), "validation": (1, 2)}),
    "vgqa-coco": (write_vgqa_arrow, {"train": (1, 2), "validation": (1, 2)}),
    "snli-ve": (write_snli_ve_arrow, dict.fromkeys(("train", "validation", "test"), (2, 6))),
    "nlvr2": (write_nlvr2_arrow, dict.fromkeys(("train", "validation", "test1"), (2, 4))),
}


def test_every_set_is_here():
    assert {name for name, spec in DATASETS.items() if spec.arrow} == SETS.keys()


def test_a_folder_with_all_of_them(tmp_path):
    for write, _ in SETS.values():
        write(tmp_path / "arrows")
    prepared = prepare_arrow(tmp_path / "arrows", tmp_path / "out")
    assert {name: split_counts(info) for name, info in prepared.items()} == {
        name: files for name, (_, files) in SETS.items()
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(SETS)
    config = ArrowConfig(sets=("nlvr2", "cc3m"), splits=("validation", "balanced-test1"))
    prepared = prepare_arrow(tmp_path / "arrows", tmp_path / "some", config)
    assert {name: split_counts(info) for name, info in prepared.items()} == {
        "cc3m": {"validation": (1, 1)},
        "nlvr2": {"validation": (2, 4), "balanced-test1": (2, 4)},
    }


class TestCaptions:
    def test_rows(self, tmp_path):
        write_coco_arrow(tmp_path / "arrows")
        info = prepare_arrow(tmp_path / "arrows", tmp_path / "out")["coco"]
        assert read_rows(tmp_path / "out" / "coco", "train")[3] == {
            "id": coco_name(3, "val2014"),  # of restval
            "images": [noise_jpeg(3)],
            "entries": [f"Caption {n} of {coco_name(3, 'val2014')}." for n in range(5)],
        }
        size = (tmp_path / "arrows" / "coco_caption_karpathy_test.arrow").stat().st_size
        assert info.sources["coco_caption_karpathy_test.arrow"] == f"{size} bytes"

    def test_missing_shards_are_named(self, tmp_path):
        write_cc3m_arrow(tmp_path / "arrows")
        for number in (7, 30):
            (tmp_path / "arrows" / f"conceptual_caption_train_{number}.arrow").unlink()
        message = r"2 bad .*: no file .*_train_7\.arrow in .* no file .*_train_30\.arrow"
        with pytest.raises(ValueError, match=message):
            prepare_arrow(tmp_path / "arrows", tmp_path / "out")
        info = prepare_arrow(tmp_path / "arrows", tmp_path / "out", ArrowConfig(max_errors=2))[
            "cc3m"
        ]
        assert info.splits["train"].images == 29

    def test_a_missing_file_of_a_split_is_an_error_whatever_may_be_bad(self, tmp_path):
        write_coco_arrow(tmp_path / "arrows")
        write_sbu_arrow(tmp_path / "arrows")
        (tmp_path / "arrows" / "coco_caption_karpathy_restval.arrow").unlink()
        message = r"no file coco_caption_karpathy_restval\.arrow in .*; put it there, or leave out train \(splits\)"
        with pytest.raises(FileNotFoundError, match=message):
            prepare_arrow(tmp_path / "arrows", tmp_path / "out", ArrowConfig(max_errors=9))
        config = ArrowConfig(max_errors=9, splits=("validation", "test"))
        assert list(
            prepare_arrow(tmp_path / "arrows", tmp_path / "out", config)["coco"].splits
        ) == list(config.splits)
        config = ArrowConfig(max_errors=9, sets=("cc3m",), splits=("validation",))
        with pytest.raises(FileNotFoundError, match=r"no file conceptual_caption_val_0\.arrow in"):
            prepare_arrow(tmp_path / "arrows", tmp_path / "out", config)

    def test_more_shards_than_the_official_ones(self, tmp_path):
        write_sbu_arrow(tmp_path / "arrows")
        for number in (9, 10):
            row = {
                "image": noise_jpeg(number),
                "caption": ["more"],
                "image_id": f"{number}_o.jpg",
                "split": "SBU",
            }
            write_arrow_file(tmp_path / "arrows" / f"sbu_{number}.arrow", [row])
        info = prepare_arrow(tmp_path / "arrows", tmp_path / "out")["sbu"]
        assert info.splits["train"].images == 11
        assert [row["entries"] for row in read_rows(tmp_path / "out" / "sbu", "train")][-1] == [
            "more"
        ]


class TestQuestions:
    def test_answers_give_the_scores_of_the_file(self, tmp_path):
        write_vqav2_arrow(tmp_path / "arrows")
        prepare_arrow(tmp_path / "arrows", tmp_path / "out")
        entries = read_rows(tmp_path / "out" / "vqav2", "validation")[1]
        assert (entries["id"], entries["images"][0]) == ("11", noise_jpeg(11))
        first, second = entries["entries"]
        assert (first["question_id"], first["question"]) == (11000, "What is behind him?")
        assert soft_targets(first["answers"], ARROW_VOCABULARY) == {"net": 1.0, "pitcher": 0.3}
        assert soft_targets(second["answers"], ARROW_VOCABULARY) == {"yes": 0.6, "no": 0.9}
        assert len(first["answers"]) == len(second["answers"]) == 10
        assert read_rows(tmp_path / "out" / "vqav2", "test-dev")[0]["entries"][0]["answers"] == []
        assert read_vocabulary(tmp_path / "out" / "vqav2") == ARROW_VOCABULARY

    def test_one_answer_of_one_person_is_no_certain_answer(self, tmp_path):
        write_vqav2_arrow(tmp_path / "arrows")
        single_question = {
            "questions": ["?"],
            "answers": [["net"]],
            "answer_labels": [[0]],
            "answer_scores": [[0.3]],
        }
        file = tmp_path / "arrows" / "vqav2_val_fix.arrow"
        write_arrow_file(
            file,
            [
                {
                    "image": noise_jpeg(1),
                    **single_question,
                    "image_id": 1,
                    "question_id": [1],
                    "split": "val",
                }
            ],
        )
        prepare_arrow(tmp_path / "arrows", tmp_path / "out")
        (question,) = read_rows(tmp_path / "out" / "vqav2", "validation")[0]["entries"]
        assert soft_targets(question["answers"], ARROW_VOCABULARY) == {"net": 0.3}

    def test_no_vocabulary_of_only_some_classes(self, tmp_path):
        write_vgqa_arrow(tmp_path / "arrows")
        info = prepare_arrow(tmp_path / "arrows", tmp_path / "out")["vgqa"]
        assert "answers.json" in info.left_out
        assert not (tmp_path / "out" / "vgqa" / "answers.json").exists()
        (question, _) = read_rows(tmp_path / "out" / "vgqa", "train")[0]["entries"]
        assert question["answers"] == ["yes"]

    def test_files_with_normal_answers_come_first(self, tmp_path):
        for ending in ("", "_fix"):
            write_vqav2_arrow(tmp_path / "arrows", ending=ending)
        info = prepare_arrow(tmp_path / "arrows", tmp_path / "out")["vqav2"]
        expected = {f"vqav2_{split}_fix.arrow" for split in ("train", "val", "test", "test-dev")}
        assert {name for name in info.sources if name.endswith(".arrow")} == expected
        for path in (tmp_path / "arrows").glob("*_fix.arrow"):
            path.unlink()
        assert (
            "vqav2_train.arrow"
            in prepare_arrow(tmp_path / "arrows", tmp_path / "raw")["vqav2"].sources
        )


class TestStatements:
    def test_snli_ve(self, tmp_path):
        write_snli_ve_arrow(tmp_path / "arrows")
        prepare_arrow(tmp_path / "arrows", tmp_path / "out")
        entries = read_rows(tmp_path / "out" / "snli-ve", "validation")[1]
        assert (entries["id"], entries["images"][0]) == ("snli_dev-1", noise_jpeg(3))
        assert entries["entries"] == [
            {"statement_id": "snli_dev-1-0", "text": "A man.", "label": "entailment"},
            {"statement_id": "snli_dev-1-1", "text": "A cat.", "label": "contradiction"},
            {"statement_id": "snli_dev-1-2", "text": "Sleeping.", "label": "neutral"},
        ]

    def test_nlvr2(self, tmp_path):
        write_nlvr2_arrow(tmp_path / "arrows")
        prepare_arrow(tmp_path / "arrows", tmp_path / "out")
        entries = read_rows(tmp_path / "out" / "nlvr2", "validation")[1]
        assert entries["images"] == [png_of_shade(1), noise_jpeg(1)]
        assert entries["entries"] == [
            {"statement_id": "dev-1-0#0", "text": "One of them is grey.", "label": "True"},
            {"statement_id": "dev-1-0#1", "text": "Both are.", "label": "False"},
        ]


def test_identifiers_of_nlvr2_are_kept_where_the_file_has_them(tmp_path):
    texts = {"dev-3-1-1": "Both.", "dev-3-1-4": "None.", "dev-3-2-4": "Odd."}
    rows = [
        {**PAIR, "questions": [text], "answers": ["True"], "identifier": name}
        for name, text in texts.items()
    ]
    write_arrow_file(tmp_path / "arrows" / "nlvr2_dev.arrow", rows)
    prepare_arrow(tmp_path / "arrows", tmp_path / "out", ArrowConfig(splits=("validation",)))
    first, second = (read_rows(tmp_path / "out" / "nlvr2", "validation")[n] for n in (0, 1))
    assert first["id"] == "dev-3-1"
    assert [entry["statement_id"] for entry in first["entries"]] == ["dev-3-1-1", "dev-3-1-4"]
    assert [entry["statement_id"] for entry in second["entries"]] == ["dev-3-2-4"]


PHOTO = {"image": noise_jpeg(1), "caption": ["x"], "image_id": "1.jpg"}
PAIR = {
    "image_0": png_of_shade(1),
    "image_1": png_of_shade(2),
    "identifier": "dev-1-0",
    "questions": ["Both."],
    "answers": ["True"],
}
STATED = {"image": noise_jpeg(1), "sentences": [["p", "A man."]], "labels": [2]}
ASKED = {
    "image": noise_jpeg(4),
    "answers": [],
    "answer_labels": [],
    "answer_scores": [],
    "image_id": 4,
}


@pytest.mark.parametrize(
    ("name", "file", "rows", "message"),
    [
        ("vg", "vg", [PHOTO, PHOTO], r"1 bad .*vg\.arrow, row 1: 1\.jpg comes twice$"),
        (
            "vg",
            "vg",
            [PHOTO, {**PHOTO, "image": None, "image_id": "2.jpg"}],
            r"1 bad .*row 1: no image of 2\.jpg$",
        ),
        (
            "vg",
            "vg",
            [{**PHOTO, "caption": "a cat"}],
            r"vg\.arrow has str in column caption; expected lists",
        ),
        (
            "snli-ve",
            "snli_dev",
            [{**STATED, "sentences": [["p", " "]]}],
            "1 bad .*row 0: statement .* is empty$",
        ),
        (
            "snli-ve",
            "snli_dev",
            [{**STATED, "labels": [3]}],
            "1 bad .*snli_dev-0-0: label 3, expected 0 to 2",
        ),
        (
            "nlvr2",
            "nlvr2_dev",
            [{**PAIR, "questions": [""]}],
            "1 bad .*row 0: statement .* is empty$",
        ),
        (
            "nlvr2",
            "nlvr2_dev",
            [{**PAIR, "answers": ["yes"]}],
            "1 bad .*dev-1-0#0: label 'yes', expected the text",
        ),
        (
            "nlvr2",
            "nlvr2_dev",
            [
                {
                    **PAIR,
                    "questions": ["A.", "B."],
                    "answers": ["True", "True"],
                    "identifier": "dev-3-2-5",
                }
            ],
            "1 bad .*: dev-3-2-5: 2 statements, expected the one that the identifier",
        ),
        (
            "vqav2",
            "vqav2_test",
            [{**ASKED, "questions": [""], "question_id": [40]}],
            "1 bad .*: question 40 is empty$",
        ),
    ],
)
def test_bad_rows(tmp_path, name, file, rows, message):
    """A text in the place of a list, of which each letter would be a caption, is an error of the file."""
    write_arrow_file(tmp_path / "arrows" / f"{file}.arrow", rows)
    split = {"vg": "train", "vqav2": "test"}.get(name, "validation")
    with pytest.raises(ValueError, match=message):
        prepare_arrow(
            tmp_path / "arrows", tmp_path / "out", ArrowConfig(sets=(name,), splits=(split,))
        )


@pytest.mark.parametrize("column", ["image", "caption", "caption.item", "image_id"])
@pytest.mark.parametrize("end", [-1, -(2**31), 0, 2**31 - 1])
def test_cells_that_end_elsewhere(column, end, tmp_path):
    """Else they would be read from other memory of the process, or end it."""
    ends = {
        name: np.array([0, 1, 2], dtype=np.int32)
        for name in ("image", "caption", "caption.item", "image_id")
    }

    def cells(name, kind):
        return pa.Array.from_buffers(kind, 2, [None, pa.py_buffer(ends[name]), pa.py_buffer(b"ab")])

    texts = cells("caption.item", pa.string())
    lists = pa.Array.from_buffers(
        pa.list_(pa.string()), 2, [None, pa.py_buffer(ends["caption"])], children=[texts]
    )
    columns = [cells("image", pa.binary()), lists, cells("image_id", pa.string())]
    batch = pa.record_batch(columns, names=["image", "caption", "image_id"])
    ends[column][-1] = end  # the library itself makes no such arrays
    with (
        pa.OSFile(str(tmp_path / "vg.arrow"), "wb") as sink,
        pa.RecordBatchFileWriter(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    number = batch.schema.get_field_index(column.removesuffix(".item"))
    message = rf"vg\.arrow is no Parquet or Arrow file \((In column {number}|Invalid (Block|IPC message)).*\); copy"
    with pytest.raises(ValueError, match=message):
        prepare_arrow(tmp_path, tmp_path / "out")


def test_errors(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*nowhere; give the folder with ViLT-style Arrow files"
    ):
        prepare_arrow(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="has no file; expected Arrow files"):
        prepare_arrow(tmp_path, tmp_path / "out")
    write_arrow_file(
        tmp_path / "other" / "data-00000-of-00001.arrow",
        [{"image": noise_jpeg(1), "caption": ["a"]}],
    )
    with pytest.raises(
        FileNotFoundError, match=r"has data-00000-of-00001\.arrow; expected Arrow files as the"
    ):
        prepare_arrow(tmp_path / "other", tmp_path / "out")
    with pytest.raises(ValueError, match="no set called coc; sets are coco, flickr30k"):
        prepare_arrow(tmp_path, tmp_path / "out", ArrowConfig(sets=("coc",)))
    write_vg_arrow(tmp_path)
    with pytest.raises(ValueError, match="no split test of vg; splits are train"):
        prepare_arrow(tmp_path, tmp_path / "out", ArrowConfig(splits=("test",)))
