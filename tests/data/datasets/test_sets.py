"""Published sets from the files of their authors: what becomes of them, where they may lie, and what is bad."""

from dataclasses import replace
from pathlib import Path

import pytest

from bridgetower.data.config import PrepareConfig
from bridgetower.data.sets.answers import read_vocabulary
from bridgetower.data.sets.datasets import prepare_set
from bridgetower.data.sets.datasets.sets import DATASETS, VgConfig, VgqaConfig
from bridgetower.data.sets.prepared_set import read_info
from bridgetower.files import write_json
from helpers.published_sets import (
    FREQUENT_ANSWERS,
    SET_WRITERS,
    change_json,
    coco_name,
    noise_jpeg,
    split_counts,
    write_coco,
    write_file,
)
from helpers.sets import png_of_shade, read_rows


@pytest.fixture
def source(tmp_path):
    def make(name):
        SET_WRITERS[name](tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def set_config(tmp_path):
    """Of VG-QA, with the splits of COCO and a vocabulary."""
    write_coco(tmp_path / "coco")
    (tmp_path / "vqa").mkdir()
    write_json(tmp_path / "vqa" / "answers.json", ["yes", "no", "2"])
    return VgqaConfig(answers=tmp_path / "vqa", karpathy=tmp_path / "coco" / "dataset_coco.json")


@pytest.fixture(scope="module")
def prepared_folders(tmp_path_factory):
    """Each set with its usual splits, but VG-QA."""
    folder = tmp_path_factory.mktemp("sets")
    folders = {}
    for name, writer in SET_WRITERS.items():
        writer(folder / "originals" / name)
        if name != "vgqa":
            config = VgConfig() if name == "vg" else PrepareConfig()
            folders[name] = (
                folder / name,
                prepare_set(name, folder / "originals" / name, folder / name, config),
            )
    return folders


@pytest.mark.parametrize(
    ("name", "sizes", "files"),
    [
        ("coco", {"train": (7, 34), "validation": (2, 10), "test": (2, 11)}, 1),
        ("flickr30k", {"train": (3, 15), "validation": (1, 5), "test": (2, 10)}, 1),
        ("vg", {"train": (5, 10)}, 1),
        (
            "vqav2",
            {"train": (7, 28), "validation": (5, 20), "test": (3, 12), "test-dev": (2, 8)},
            6,
        ),
        ("snli-ve", dict.fromkeys(("train", "validation", "test"), (2, 10)), 3),
        ("nlvr2", dict.fromkeys(("train", "validation", "test1"), (3, 6)), 3),
        ("winoground", {"test": (3, 3)}, 1),
        ("sugarcrepe", {"test": (3, 14)}, 7),
        ("aro", dict.fromkeys(("relation", "attribution"), (4, 4)), 2),
    ],
)
def test_sizes(prepared_folders, name, sizes, files):
    folder, info = prepared_folders[name]
    assert split_counts(info) == sizes
    assert info == read_info(folder)
    spec = DATASETS[name]
    for field in ("name", "split_rule", "protocol", "licences"):
        assert getattr(info, field) == getattr(spec, field)
    assert len(info.sources) == files
    left_out = {"coco": {"repeated caption": 1}, "vg": {"empty description": 5}}
    assert info.left_out == left_out.get(name, {})


@pytest.fixture(scope="module")
def row(prepared_folders):
    return lambda name, split, number: read_rows(prepared_folders[name][0], split)[number]


def test_rows_of_captions(row):
    coco = row("coco", "train", 0)
    region = row("vg", "train", 1)
    assert (coco["id"], coco["images"]) == ("COCO_train2014_000000057870.jpg", [noise_jpeg(57870)])
    assert coco["entries"][:3] == [f"Picture 57870, caption {number}." for number in range(3)]
    assert coco["entries"][3:] == ["A restaurant has modern wooden tables and chairs."]
    assert row("coco", "train", 4)["id"] == "COCO_val2014_000000318219.jpg"  # of restval
    assert row("flickr30k", "test", 0)["id"] == "1000092799.jpg"
    assert region == {
        "id": "2",
        "images": [noise_jpeg(2)],
        "entries": ["the clock is green", "shade is along street 2"],
    }
    assert row("vg", "train", 4)["id"] == "5"  # 6 has no description


def test_rows_of_questions(row):
    question = row("vqav2", "validation", 1)
    assert (question["id"], question["images"]) == ("43", [noise_jpeg(43)])
    answers = ["no."] * 7 + ["The  dog", "dont know", "no."]
    types = {"question_type": "what is", "answer_type": "yes/no"}
    expected = {
        "question_id": 43002,
        "question": "What is number 2 of 43?",
        **types,
        "answers": answers,
    }
    assert question["entries"][2] == expected
    for split in ("test", "test-dev"):
        question_row = row("vqav2", split, 0)
        types = {"question_type": "", "answer_type": ""}
        assert question_row["images"] == [noise_jpeg(1)]
        unanswered = {
            "question_id": 1000,
            "question": "What is number 0 of 1?",
            **types,
            "answers": [],
        }
        assert question_row["entries"][0] == unanswered


def test_rows_of_statements(row):
    stated = row("snli-ve", "validation", 0)
    paired = row("nlvr2", "train", 1)
    assert stated["id"] == "3416050490.jpg"
    statement = {"statement_id": "3416050490.jpg#1r1c", "text": "Statement 1 about 3416050490."}
    assert stated["entries"][1] == {**statement, "label": "contradiction"}
    # The second image is a JPEG, whatever its name.
    assert (paired["id"], paired["images"]) == (
        "train-10-0",
        [png_of_shade(1), noise_jpeg(1)],
    )
    statement = {"statement_id": "train-10-0-1", "text": "Statement 1 about train-10-0."}
    assert paired["entries"][1] == {**statement, "label": "True"}


def test_vocabulary_is_that_of_both_annotated_splits(prepared_folders, source, tmp_path):
    # Of picture 9, whose annotations come first, those of the questions 3, 2, 1, 0 in this order.
    assert read_vocabulary(prepared_folders["vqav2"][0]) == ("no", "yes", "2")
    assert set(FREQUENT_ANSWERS) == {"no", "yes", "2"}
    prepare_set("vqav2", source("vqav2"), tmp_path / "some", PrepareConfig(splits=("validation",)))
    assert read_vocabulary(tmp_path / "some") == ("no", "yes", "2")


class TestSplits:
    def test_some(self, source, tmp_path):
        coco = source("coco")
        (coco / "train2014").rename(tmp_path / "elsewhere")
        info = prepare_set(
            "coco", coco, tmp_path / "out", PrepareConfig(splits=("validation", "test"))
        )
        assert split_counts(info) == {"validation": (2, 10), "test": (2, 11)}
        with pytest.raises(
            ValueError, match="coco has no split val; it has train, validation, test"
        ):
            prepare_set("coco", coco, tmp_path / "other", PrepareConfig(splits=("val",)))

    def test_further_ones_of_nlvr2(self, source, tmp_path):
        splits = ("balanced-validation", "unbalanced-test1", "test2")
        info = prepare_set("nlvr2", source("nlvr2"), tmp_path / "out", PrepareConfig(splits=splits))
        assert split_counts(info) == {
            "balanced-validation": (1, 2),
            "test2": (3, 6),
            "unbalanced-test1": (2, 4),
        }
        row = read_rows(tmp_path / "out", "test2")[0]
        assert [statement["label"] for statement in row["entries"]] == ["", ""]

    def test_those_of_vqav2_for_tests_take_no_annotations(self, source, tmp_path):
        folder = source("vqav2")
        for file in folder.glob("*_annotations.json"):
            file.unlink()
        with pytest.raises(
            FileNotFoundError, match=r"no file v2_mscoco_train2014_annotations\.json or vqav2/"
        ):
            prepare_set("vqav2", folder, tmp_path / "out", PrepareConfig(max_errors=9))
        info = prepare_set(
            "vqav2", folder, tmp_path / "out", PrepareConfig(splits=("test", "test-dev"))
        )
        assert list(info.splits) == ["test", "test-dev"]
        assert not (tmp_path / "out" / "answers.json").exists()
        assert "answers.json, which takes the annotations of train and validation" in info.left_out


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("vqav2", {"*.json": "vqav2"}),
        ("snli-ve", {"*.jsonl": "snli_ve"}),
        ("vg", {"images/*": ""}),
        ("nlvr2", {"nlvr2/data": "nlvr/nlvr2", "dev": "images", "test1": "images"}),
        ("nlvr2", {"nlvr2/data": ""}),
    ],
)
def test_other_places(prepared_folders, source, tmp_path, name, moves):
    folder = source(name)
    for pattern, target in moves.items():
        for path in list(folder.glob(pattern)):
            (folder / target).mkdir(parents=True, exist_ok=True)
            path.rename(folder / target / path.name)
    info = prepare_set(
        name, folder, tmp_path / "out", VgConfig() if name == "vg" else PrepareConfig()
    )
    assert info.digest == prepared_folders[name][1].digest


def _first(key, **values):
    return lambda content: content[key][0].update(**values)


def _second(**values):
    return lambda rows: rows[1].update(**values)


COCO = "dataset_coco.json"
NLVR2 = "nlvr2/data/dev.json"
SNLI_VE = "snli_ve_dev.jsonl"
QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"


@pytest.mark.parametrize(
    ("name", "file", "edit", "message"),
    [
        (
            "coco",
            COCO,
            _first("images", split="dev"),
            r"COCO_train2014_000000057870\.jpg: split 'dev', expected one",
        ),
        *(
            (
                "nlvr2",
                NLVR2,
                _second(label=label),
                rf"dev-0-0-1 of dev\.json: label {label!r}, expected the text",
            )
            for label in (True, "true", None, "")
        ),
        ("nlvr2", NLVR2, lambda rows: rows.append(rows[1]), r"dev-0-0-1 of dev\.json comes twice"),
        ("nlvr2", NLVR2, _second(sentence=" \n"), "dev-0-0: statement 'dev-0-0-1' is empty$"),
        *(
            (
                "snli-ve",
                SNLI_VE,
                _second(gold_label=label),
                rf"dev\.jsonl, line 2: label '{label}', expected one of",
            )
            for label in ("-", "Entailment", "")
        ),
        (
            "snli-ve",
            SNLI_VE,
            _second(sentence2=" "),
            r"dev\.jsonl, line 2: statement '3416050490\.jpg#1r1c' is empty$",
        ),
        (
            "snli-ve",
            SNLI_VE,
            lambda rows: rows.append(rows[0]),
            r"line 11: pair '3416050490\.jpg#0r0n' comes twice",
        ),
        (
            "vqav2",
            ANNOTATIONS,
            lambda content: content["annotations"].pop(0),
            "9003 of train has no annotation",
        ),
        (
            "vqav2",
            ANNOTATIONS,
            _first("annotations", image_id=10),
            "question 9003 of train has an annotation of",
        ),
        (
            "vqav2",
            QUESTIONS,
            lambda content: content["questions"].pop(0),
            "annotation of question 9000 of train",
        ),
        (
            "vqav2",
            QUESTIONS,
            lambda document: document["questions"].append(document["questions"][0]),
            "9000 of train comes twice",
        ),
        ("vqav2", QUESTIONS, _first("questions", question=" "), ": 9: question 9000 is empty$"),
        ("winoground", "examples.jsonl", lambda rows: rows.append(rows[0]), "id '0' comes twice"),
        ("winoground", "examples.jsonl", _second(caption_1=" "), "example '1' has an empty text"),
        (
            "aro",
            "visual_genome_relation.json",
            _second(bbox_w=10**9, bbox_h=10**9),
            "item 1: Image size",
        ),
        ("aro", "visual_genome_relation.json", _second(bbox_w=-5), "item 1: Coordinate 'right'"),
    ],
)
def test_bad_entries(source, tmp_path, name, file, edit, message):
    folder = source(name)
    change_json(folder / file, edit)
    with pytest.raises(ValueError, match=f"1 bad .*{message}"):
        prepare_set(name, folder, tmp_path / "out")


def test_a_bad_entry_may_be_left_out(source, tmp_path):
    folder = source("nlvr2")
    change_json(folder / NLVR2, _second(sentence=" \n"))
    info = prepare_set("nlvr2", folder, tmp_path / "out", PrepareConfig(max_errors=1))
    assert (info.splits["validation"].examples, info.left_out["cannot be used"]) == (5, 1)


def test_an_empty_caption_is_left_out(source, tmp_path):
    coco = source("coco")
    change_json(coco / COCO, lambda content: content["images"][0]["sentences"][0].update(raw=" "))
    info = prepare_set("coco", coco, tmp_path / "out")
    assert info.splits["train"].examples == 33
    assert info.some_left_out["empty caption"] == ["COCO_train2014_000000057870.jpg"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("nlvr2", "images/train/8/train-10-0-img1.png"),
        ("vg", "images/VG_100K/4.jpg"),
        ("vqav2", f"train2014/{coco_name(9, 'train2014')}"),  # of four questions, but one picture
    ],
)
def test_a_missing_picture(source, tmp_path, name, file):
    folder = source(name)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=rf"1 bad .*: '{file}': there is no such"):
        prepare_set(name, folder, tmp_path / "out", VgConfig() if name == "vg" else PrepareConfig())


def test_pairs_of_snli_ve_without_an_id_are_numbered(source, tmp_path):
    folder = source("snli-ve")
    change_json(folder / "snli_ve_test.jsonl", lambda rows: [row.pop("pairID") for row in rows])
    prepare_set("snli-ve", folder, tmp_path / "out")
    rows = [row["entries"] for row in read_rows(tmp_path / "out", "test")]
    assert [statement["statement_id"] for row in rows for statement in row] == [
        f"test-{n}" for n in range(1, 11)
    ]


class TestHeldOut:
    def test_of_captions(self, source, tmp_path, set_config):
        (folder := source("vg")).joinpath("image_data.json").rename(tmp_path / "kept.json")
        # it is not needed
        assert prepare_set("vg", folder, tmp_path / "all", VgConfig()).splits["train"].images == 5
        (tmp_path / "kept.json").rename(folder / "image_data.json")
        config_with_splits = VgConfig(leave_out=("val", "test"), karpathy=set_config.karpathy)
        info = prepare_set("vg", folder, tmp_path / "out", config_with_splits)
        assert [row["id"] for row in read_rows(tmp_path / "out", "train")] == ["1", "2", "4", "5"]
        assert info.some_left_out["image in COCO's val or test split"] == ["3"]

    def test_of_questions(self, source, tmp_path, set_config):
        folder = source("vgqa")
        info = prepare_set("vgqa", folder, tmp_path / "out", set_config)
        rows = read_rows(tmp_path / "out", "train")
        assert [row["id"] for row in rows] == ["1", "2", "4", "5"]
        assert info.some_left_out["image in COCO's val or test split"] == ["3"]
        wider = prepare_set(
            "vgqa",
            folder,
            tmp_path / "wider",
            replace(set_config, leave_out=("restval", "val", "test")),
        )
        assert [row["id"] for row in read_rows(tmp_path / "wider", "train")] == ["1", "2", "5"]
        assert wider.settings["leave_out"] == ["restval", "val", "test"]
        # Questions with one answer of the vocabulary:
        questions = [
            (entry["question_id"] % 1000, entry["question"], *entry["answers"])
            for entry in rows[0]["entries"]
        ]
        assert questions == [
            (100, "Is it red?", "Yes."),
            (101, "How many?", "Two."),
            (107, "Is it  red?", "No"),
        ]
        assert rows[0]["entries"][0]["question_id"] == 1_000_100
        assert (rows[0]["images"], info.splits["train"].examples) == ([noise_jpeg(1)], 12)
        assert info.left_out == {
            "answer not in the vocabulary": 8,
            "question that was asked before": 4,
            "question with several answers": 8,
            "image in COCO's val or test split": 1,
        }
        assert read_vocabulary(tmp_path / "out") == ("yes", "no", "2")

    def test_none_gets_into_training_whatever_may_be_bad(self, source, tmp_path, set_config):
        folder = source("vgqa")
        out = tmp_path / "out"
        write_file(
            tmp_path / "other.json",
            {"images": [{"cocoid": 9, "split": "train"}, {"cocoid": 1, "split": "val"}]},
        )
        for karpathy, error, message in (
            (None, FileNotFoundError, r"no file dataset_coco\.json or karpathy"),
            (
                tmp_path / "other.json",
                ValueError,
                r"other\.json has no image of split test; check that it is",
            ),
            (tmp_path / "nowhere.json", FileNotFoundError, r"nowhere\.json"),
        ):
            with pytest.raises(error, match=message):
                prepare_set(
                    "vgqa", folder, out, replace(set_config, karpathy=karpathy, max_errors=9)
                )
        assert not (out / "dataset.json").exists()

    def test_files(self, source, tmp_path, set_config):
        folder = source("vgqa")
        out = tmp_path / "out"
        (tmp_path / "coco" / "dataset_coco.json").rename(folder / "dataset_coco.json")
        set_config = replace(set_config, karpathy=None)
        assert prepare_set("vgqa", folder, out, set_config).sources.keys() == {
            "answers.json",
            "dataset_coco.json",
            "image_data.json",
            "annotations/question_answers.json",
        }
        with pytest.raises(FileNotFoundError, match=r"no answers\.json in"):
            prepare_set("vgqa", folder, tmp_path / "other", replace(set_config, answers=folder))
        for file in ("image_data.json", "annotations/question_answers.json"):
            (folder / file).rename(tmp_path / "moved.json")
            name = Path(file).name
            with pytest.raises(FileNotFoundError, match=rf"no file {name} or annotations/{name}"):
                prepare_set("vgqa", folder, tmp_path / "other", set_config)
            (tmp_path / "moved.json").rename(folder / file)
        with pytest.raises(ValueError, match="vgqa takes a VgqaConfig, given is a PrepareConfig"):
            prepare_set("vgqa", folder, out, PrepareConfig())


# Images and texts of each split, as far as their authors tell; of VQAv2 also those that the official code trains on.
PUBLISHED = {
    "coco": {
        "train": {(113_287, 566_747)},
        "validation": {(5_000, 25_010)},
        "test": {(5_000, 25_010)},
    },
    "flickr30k": {
        "train": {(29_000, 145_000)},
        "validation": {(1_014, 5_070)},
        "test": {(1_000, 5_000)},
    },
    "vg": {"train": {(108_077, None)}},
    "cc3m": {"train": {(3_318_333, 3_318_333)}, "validation": {(15_840, 15_840)}},
    "sbu": {"train": {(1_000_000, 1_000_000)}},
    "vqav2": {
        "train": {(82_783, 443_757), (82_774, 435_174), (82_774, 434_867)},
        "validation": {(40_504, 214_354), (40_503, 210_207), (40_503, 210_051)},
        "test": {(81_434, 447_793)},
        "test-dev": {(None, 107_394)},
    },
    "snli-ve": {
        "train": {(29_783, 529_527)},
        "validation": {(1_000, 17_858)},
        "test": {(1_000, 17_901)},
    },
    "nlvr2": {
        "train": {(None, 86_373)},
        "validation": {(None, 6_982)},
        "test1": {(None, 6_967)},
        "test2": {(None, 6_970)},
    },
    "winoground": {"test": {(None, 400)}},
}


@pytest.mark.parametrize("name", DATASETS)
def test_published_counts(name):
    published = DATASETS[name].published
    assert {split: {row[:2] for row in rows} for split, rows in published.items()} == PUBLISHED.get(
        name, {}
    )
