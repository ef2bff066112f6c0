"""Custom sets: each kind from a table, splits that stay, bad rows, and attempts that were killed."""

import json
import subprocess
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image as Picture

from bridgetower.data.sets.answers import read_vocabulary
from bridgetower.data.sets.custom import (
    CustomSetConfig,
    CustomSetSpec,
    LabelledConfig,
    PairsConfig,
    VqaSetConfig,
    prepare_custom,
    read_classes,
)
from bridgetower.data.sets.prepared_set import PreparedSet, read_info, split_of
from bridgetower.data.sets.schema import CAPTIONS
from helpers.checkpoints import folder_snapshot


def write_photo(path, number):
    draw = np.random.default_rng(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(draw.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(path)


def write_rows(folder, rows, images=40):
    for number in range(images):
        write_photo(folder / f"{number}.png", number)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def split_entries(folder, *splits):
    return [row["entry"] for row in PreparedSet(folder, splits or None).scan()]


def prepared_entries(folder, kind, rows, config=None):
    """Returns the entries of prepared rows, each with the image of its number if it names none."""
    source = write_rows(
        folder, [{"image": f"{number}.png", **row} for number, row in enumerate(rows)]
    )
    prepare_custom(kind, source, folder / "out", config)
    return split_entries(folder / "out")


class TestKinds:
    def test_pairs(self, tmp_path):
        rows = [{"caption": [f"one {n}", f"two {n}", f"one {n}"]} for n in range(40)]
        entries_read = prepared_entries(
            tmp_path, "pairs", [*rows, {"image": "7.png", "caption": "one 7"}]
        )
        assert sorted(entries_read) == sorted(
            f"{word} {n}" for n in range(40) for word in ("one", "two")
        )
        assert sum(split.images for split in read_info(tmp_path / "out").splits.values()) == 40
        assert str(tmp_path) not in (tmp_path / "out" / "dataset.json").read_text()

    @pytest.mark.parametrize("multi_label", [False, True])
    def test_classification(self, multi_label, tmp_path):
        rows = [{"label": [f"c{n % 3}", "x"] if multi_label else f"c{n % 3}"} for n in range(40)]
        alone = {"image": None, "text": "words alone", "label": [] if multi_label else "c1"}
        by_id = {
            entry["example_id"]: entry
            for entry in prepared_entries(tmp_path, "classification", [*rows, alone])
        }
        classes = read_classes(tmp_path / "out")
        assert (classes.names, classes.multi_label) == (
            ("c0", "c1", "c2", *(["x"] if multi_label else [])),
            multi_label,
        )
        assert by_id["5"]["labels"] == (["c1", "x"] if multi_label else ["c1"])
        assert (by_id["41"]["text"], by_id["41"]["labels"]) == (
            "words alone",
            [] if multi_label else ["c1"],
        )

    @pytest.mark.parametrize("kind", ["classification", "regression"])
    def test_blank_labels_are_unknown(self, kind, tmp_path):
        blanks = ("", " ", "\t ", None)
        entries_read = prepared_entries(
            tmp_path, kind, [{"label": label} for label in ("1", "2", *blanks)]
        )
        assert sorted(entry["labels"] for entry in entries_read) == [[], [], [], [], ["1"], ["2"]]
        assert [entry["labelled"] for entry in entries_read].count(False) == 4

    @pytest.mark.parametrize(
        ("cells", "separator", "names"),
        [
            ((10, "2", "b", "a", "10"), None, ("2", "10", "a", "b")),
            (("x;y", " y ; ;x", "z"), ";", ("x", "y", "z")),
            (("x;y", "z"), None, ("x;y", "z")),
        ],
    )
    def test_classes_are_numbers_by_value_and_then_names(self, cells, separator, names, tmp_path):
        rows = [{"label": cell} for cell in cells]
        entries_read = prepared_entries(
            tmp_path, "classification", rows, LabelledConfig(label_separator=separator)
        )
        assert read_classes(tmp_path / "out").names == names
        assert read_classes(tmp_path / "out").multi_label == (separator is not None)
        if separator:
            assert sorted(entry["labels"] for entry in entries_read) == [
                ["x", "y"],
                ["y", "x"],
                ["z"],
            ]

    def test_lists_and_single_labels_are_not_mixed(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"line 2 has a list of labels and .* line 1 a single one"
        ):
            prepared_entries(tmp_path, "classification", [{"label": "a"}, {"label": ["b"]}])

    def test_answers_of_annotators(self, tmp_path):
        """As VQA's annotations have them, or in one cell."""
        annotated = [
            {"answer": "a cat", "answer_id": 1},
            {"answer": " Dog ", "answer_id": 2},
            {"answer": ""},
        ]
        cells = (annotated, "cat; dog ;;cat", "a", 7, [None, "b"])
        rows = [{"question": f"{number}?", "answers": cell} for number, cell in enumerate(cells)]
        entries_read = prepared_entries(
            tmp_path,
            "vqa",
            rows,
            VqaSetConfig(answer_separator=";", test_fraction=0, validation_fraction=0),
        )
        answers = {entry["question"]: entry["answers"] for entry in entries_read}
        assert answers == {
            "0?": ["a cat", "Dog"],
            "1?": ["cat", "dog", "cat"],
            "2?": ["a"],
            "3?": ["7"],
            "4?": ["b"],
        }
        # "a" is an article
        assert set(read_vocabulary(tmp_path / "out")) == {
            "cat",
            "dog",
            "7",
            "b",
        }

    def test_an_answer_counts_once_for_a_question(self, tmp_path):
        cells = (["rare", "Rare.", "common"], ["common", "blue"], ["blue"], ["once"])
        rows = [{"question": f"{number}?", "answers": cell} for number, cell in enumerate(cells)]
        prepared_entries(
            tmp_path, "vqa", rows, VqaSetConfig(min_count=2, test_fraction=0, validation_fraction=0)
        )
        assert set(read_vocabulary(tmp_path / "out")) == {"common", "blue"}

    @pytest.mark.parametrize(
        ("word", "meant"), [("True", True), ("yes", True), (1, True), ("NO", False), (0, False)]
    )
    def test_truths_in_other_words(self, word, meant, tmp_path):
        row = {"image": None, "left": "0.png", "right": "1.png", "statement": "so", "label": word}
        (entry,) = prepared_entries(tmp_path, "image-pairs", [row])
        assert entry["label"] == str(meant)

    def test_classification_by_folders(self, tmp_path):
        for split in ("train", "test"):
            for number in range(6):
                write_photo(
                    tmp_path / "in" / split / f"c{number % 2}" / f"{number}.png",
                    number + 100 * (split == "test"),
                )
        info = prepare_custom("classification", tmp_path / "in", tmp_path / "out")
        assert {name: split.examples for name, split in info.splits.items()} == {
            "train": 6,
            "test": 6,
        }
        assert read_classes(tmp_path / "out").names == ("c0", "c1")

    def test_regression(self, tmp_path):
        entries_read = prepared_entries(
            tmp_path, "regression", [{"rating": n / 3} for n in range(20)]
        )
        assert read_classes(tmp_path / "out").numbers
        assert sorted(float(entry["labels"][0]) for entry in entries_read) == [
            n / 3 for n in range(20)
        ]

    def test_vqa(self, tmp_path):
        """Answers come in lists and alone. Those of few questions are no choice."""
        rows = [{"question": f"what is {n}?", "answer": f"No. {n % 4}"} for n in range(40)]
        rows += [
            {"image": f"{n}.png", "question": f"and {n}?", "answer": ["Yes."]} for n in range(40)
        ]
        types = {"answer_type": "other", "question_type": "then"}
        rows += [
            {"image": "0.png", "question": "then?", "answer": ["yes", "rare", "Rare."], **types}
        ]
        by_question = {
            entry["question"]: entry
            for entry in prepared_entries(tmp_path, "vqa", rows, VqaSetConfig(min_count=2))
        }
        assert sorted(read_vocabulary(tmp_path / "out")) == [*(f"no {n}" for n in range(4)), "yes"]
        assert (by_question["what is 9?"]["answers"], by_question["then?"]["answers"]) == (
            ["No. 1"],
            ["yes", "rare", "Rare."],
        )
        assert by_question["then?"].items() > types.items()
        (tmp_path / "split").mkdir()
        splits = {"red": "train", "blue": "train", "green": "validation", "grey": "test"}
        rows = [
            {"question": "what?", "answer": answer, "split": split}
            for answer, split in splits.items()
        ]
        prepared_entries(tmp_path / "split", "vqa", rows)
        assert read_vocabulary(tmp_path / "split" / "out") == ("red", "blue")
        for number in ("7", "q7"):
            (tmp_path / number).mkdir()
            with pytest.raises(
                ValueError, match=f"question_id '{number}' comes twice or is no whole number"
            ):
                prepared_entries(
                    tmp_path / number, "vqa", [{**row, "question_id": number} for row in rows]
                )

    def test_answers_that_a_model_can_choose_are_those_of_training_questions(self, tmp_path):
        """Only training questions give answers, also where a hash decides on the splits."""
        prepared_entries(
            tmp_path, "vqa", [{"question": f"what is {n}?", "answer": f"no {n}"} for n in range(40)]
        )
        training = [entry["answers"][0] for entry in split_entries(tmp_path / "out", "train")]
        assert 20 < len(training) < 40
        assert read_vocabulary(tmp_path / "out") == tuple(training)
        (tmp_path / "test").mkdir()
        prepared_entries(
            tmp_path / "test", "vqa", [{"question": "what?", "answer": "red", "split": "test"}] * 2
        )
        with pytest.raises(FileNotFoundError, match="give a VQA set with a training split"):
            read_vocabulary(tmp_path / "test" / "out")

    @pytest.mark.parametrize(
        ("kind", "read"), [("vqa", read_vocabulary), ("classification", read_classes)]
    )
    def test_names_of_classes_are_read_at_urls(self, kind, read, tmp_path):
        prepared_entries(
            tmp_path,
            kind,
            [{"question": "?", "answer": "cd"[n % 2], "label": "ab"[n % 2]} for n in range(40)],
        )
        url = f"memory://set-of-{kind}"
        fsspec.filesystem("memory").put(str(tmp_path / "out"), url, recursive=True)
        assert read(url) == read(f"{url}/") == read(tmp_path / "out")
        with pytest.raises(FileNotFoundError, match=f"in {url}/no; give a "):
            read(f"{url}/no")

    def test_entailment(self, tmp_path):
        labels = ("contradiction", "neutral", "entailment")
        rows = [
            {"hypothesis": f"says {n}", "label": labels[n % 3] if n % 2 else n % 3}
            for n in range(20)
        ]
        label_of_text = {
            entry["text"]: entry["label"]
            for entry in prepared_entries(tmp_path, "entailment", rows)
        }
        assert label_of_text == {f"says {n}": labels[n % 3] for n in range(20)}

    @pytest.mark.parametrize(("kind", "field"), [("vqa", "question"), ("entailment", "text")])
    def test_the_text_is_in_the_column_that_is_asked_for(self, kind, field, tmp_path):
        cells = {"question": "no", "hypothesis": "no", "label": "neutral"}
        rows = [{"words": f"w{n}", **cells, "answer": "xy"[n % 2]} for n in range(40)]
        config = (VqaSetConfig if kind == "vqa" else CustomSetConfig)(text_column="words")
        entries_read = prepared_entries(tmp_path, kind, rows, config)
        assert sorted(entry[field] for entry in entries_read) == sorted(f"w{n}" for n in range(40))

    def test_image_pairs(self, tmp_path):
        pairs = [
            {"image": None, "left": f"{n}.png", "right": f"{n + 1}.png", "n": n}
            for n in range(0, 39, 3)
        ]
        rows = [
            {**pair, "statement": f"says {pair['n']}", "label": pair["n"] % 2 == 1}
            for pair in pairs
        ]
        prepared_entries(tmp_path, "image-pairs", rows)
        opened = PreparedSet(tmp_path / "out")
        for row in opened.scan():
            number = int(row["entry"]["text"].split()[1])
            assert row["entry"]["label"] == str(bool(number % 2))
            assert opened.images(row["images"]) == [
                (tmp_path / f"{n}.png").read_bytes() for n in (number, number + 1)
            ]


class TestSplits:
    def _splits(self, folder, out, count):
        rows = [{"image": f"{n}.png", "caption": f"number {n}"} for n in range(count)]
        prepare_custom("pairs", write_rows(folder, rows, count), out)
        return {
            entry: split for split in read_info(out).splits for entry in split_entries(out, split)
        }

    def test_an_image_keeps_its_split_when_others_are_added(self, tmp_path):
        few, many = (self._splits(tmp_path / str(n), tmp_path / f"out{n}", n) for n in (60, 120))
        assert few == {name: many[name] for name in few}

    def test_shares_are_those_of_the_config(self):
        names = [split_of(b"%d" % n, {"test": 0.2, "validation": 0.05}, 3) for n in range(20_000)]
        assert abs(names.count("test") / 20_000 - 0.2) < 0.01
        assert abs(names.count("validation") / 20_000 - 0.05) < 0.005

    def test_folds_share_out_all_images(self, tmp_path):
        """Also where the hash leaves one empty. Answers and classes are those of all folds."""
        rows = [{"question": "what?", "answer": f"answer {n}"} for n in range(40)]
        prepared_entries(tmp_path, "vqa", rows, VqaSetConfig(folds=5))
        splits = read_info(tmp_path / "out").splits
        assert list(splits) == [f"fold-{n}" for n in range(1, 6)]
        assert sum(split.images for split in splits.values()) == 40
        assert min(split.images for split in splits.values()) > 0
        assert len(read_vocabulary(tmp_path / "out")) == 40
        draws = [split_of(b"%d" % n, dict.fromkeys("abcd", 0.2), 3) for n in range(20_000)]
        assert all(
            abs(draws.count(fold) / 20_000 - 0.2) < 0.01 for fold in ("a", "b", "c", "d", "")
        )

        few = write_rows(
            tmp_path / "few", [{"image": f"{n}.png", "caption": "x"} for n in range(5)]
        )
        prepare_custom("pairs", few, tmp_path / "few-out", PairsConfig(folds=4))
        assert {split.images for split in read_info(tmp_path / "few-out").splits.values()} <= {1, 2}

    def test_folds_are_refused_beside_splits(self, tmp_path):
        rows = [{"caption": "x", "split": "train"}]
        with pytest.raises(ValueError, match="leave folds out"):
            prepared_entries(tmp_path, "pairs", rows, PairsConfig(folds=5))
        with pytest.raises(ValueError, match="expected 0, or 2 to 20"):
            PairsConfig(folds=1)

    def test_equal_images_come_into_one_split_as_one_image(self, tmp_path):
        for number in range(30):
            write_photo(tmp_path / "in" / f"{number}.png", number % 3)
            (tmp_path / "in" / f"{number}.txt").write_text(f"caption {number}")
        info = prepare_custom("pairs", tmp_path / "in", tmp_path / "out")
        assert sum(split.images for split in info.splits.values()) == 3
        assert sum(split.examples for split in info.splits.values()) == 30

    @pytest.mark.parametrize("count", [3, 10])
    def test_small_sets_have_every_split(self, count, tmp_path):
        splits = self._splits(tmp_path / "in", tmp_path / "out", count)
        assert set(splits.values()) == {"train", "validation", "test"}
        assert len(splits) == count

    @pytest.mark.parametrize(
        ("fractions", "expected"),
        [
            ({"test_fraction": 0.0}, {"train", "validation"}),
            ({"validation_fraction": 0.0}, {"train", "test"}),
            ({"test_fraction": 0.0, "validation_fraction": 0.0}, {"train"}),
        ],
    )
    def test_a_split_of_share_0_has_no_image(self, fractions, expected, tmp_path):
        rows = [{"image": f"{n}.png", "caption": f"number {n}"} for n in range(12)]
        info = prepare_custom(
            "pairs", write_rows(tmp_path, rows, 12), tmp_path / "out", PairsConfig(**fractions)
        )
        assert set(info.splits) == expected
        assert sum(split.images for split in info.splits.values()) == 12

    @pytest.mark.parametrize("count", [1, 2])
    def test_no_split_is_emptied_to_fill_another(self, count, tmp_path):
        splits = self._splits(tmp_path / "in", tmp_path / "out", count)
        assert len(splits) == len(set(splits.values())) == count
        assert count == 1 or "train" in splits.values()

    @pytest.mark.parametrize(
        ("test", "validation"), [(0.5, 0.5), (-0.1, 0.1), (0.1, -0.1), (1.0, 0.0), (0.3, 0.8)]
    )
    def test_shares_that_leave_nothing_for_training(self, test, validation):
        with pytest.raises(ValueError, match=r"give >= 0, together below 1"):
            CustomSetConfig(test_fraction=test, validation_fraction=validation)
        assert CustomSetConfig(test_fraction=0.5, validation_fraction=0.49)

    def test_small_splits_are_warned_of(self, tmp_path, caplog):
        sizes = {"train": 5, "validation": 30, "test": 29, "more": 1}
        names = {"more": "test"}
        rows = [
            {"split": names.get(split, split), "caption": "c"}
            for split, size in sizes.items()
            for _ in range(size)
        ]
        rows = [{**row, "image": f"{number}.png"} for number, row in enumerate(rows)]
        prepare_custom("pairs", write_rows(tmp_path, rows, 65), tmp_path / "enough")
        assert caplog.text == ""
        prepare_custom("pairs", write_rows(tmp_path, rows[:-1], 65), tmp_path / "few")
        (record,) = caplog.records
        assert record.message.startswith(
            f"{tmp_path / 'rows.jsonl'}: test is small (29): metrics of so few hardly"
        )
        caplog.clear()
        texts = [
            {"text": f"t{number}", "label": f"{number % 2}", "split": "test"} for number in range(2)
        ]
        prepare_custom("classification", write_rows(tmp_path, texts, 0), tmp_path / "texts")
        assert "test is small (2): " in caplog.text

    @pytest.mark.parametrize(
        ("splits", "error"),
        [
            (
                {"image": "1.png", "split": "test"},
                r"1 images, such as 1\.png, are in train and in test",
            ),
            ({"image": "2.png"}, "has a split and .* none"),
        ],
    )
    def test_splits_that_contradict_each_other(self, splits, error, tmp_path):
        rows = [{"image": "1.png", "caption": "a", "split": "train"}, {"caption": "b", **splits}]
        with pytest.raises(ValueError, match=error):
            prepare_custom("pairs", write_rows(tmp_path, rows, 3), tmp_path / "out")

    def test_a_copy_of_an_image_in_another_split_is_told(self, tmp_path, caplog):
        rows = [
            {"image": f"{n}.png", "caption": f"c{n}", "split": ("train", "test")[n // 2]}
            for n in range(4)
        ]
        source = write_rows(tmp_path, rows)
        (tmp_path / "3.png").write_bytes((tmp_path / "1.png").read_bytes())
        info = prepare_custom("pairs", source, tmp_path / "out")
        assert "1 images of train, such as 1.png, are in test too" in caplog.text
        assert [(split.images, split.examples) for split in info.splits.values()] == [
            (2, 2),
            (2, 2),
        ]


class TestBadRows:
    def test_they_are_named_counted_and_left_out(self, tmp_path):
        rows = [{"image": f"{n}.png", "caption": f"c{n}"} for n in range(30)]
        rows += [
            {"image": "no.png", "caption": "x"},
            {"image": "3.png", "caption": ""},
            {"caption": "alone"},
        ]
        source = write_rows(tmp_path, rows)
        (tmp_path / "5.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"4 bad items.*line 32.*line 33.*line 6.*line 31"):
            prepare_custom("pairs", source, tmp_path / "out", PairsConfig(max_errors=3))
        info = prepare_custom("pairs", source, tmp_path / "out", PairsConfig(max_errors=4))
        assert info.left_out["cannot be used"] == 4
        # of the finished set
        with pytest.raises(ValueError, match=r"out: 4 bad items, allowed are 3 .*line 32"):
            prepare_custom("pairs", source, tmp_path / "out", PairsConfig(max_errors=3))
        assert prepare_custom("pairs", source, tmp_path / "out", PairsConfig(max_errors=9)) == info
        assert sorted(split_entries(tmp_path / "out")) == sorted(
            f"c{n}" for n in range(30) if n != 5
        )

    @pytest.mark.parametrize(
        ("kind", "row", "config", "error"),
        [
            *json.loads(Path(__file__).with_name("refused_rows.json").read_text()),
            (
                "classification",
                {"image": "1.png", "x": 1},
                LabelledConfig(label_column="y"),
                "no column y",
            ),
        ],
    )
    def test_errors_say_what_is_wrong(self, kind, row, config, error, tmp_path):
        with pytest.raises(ValueError, match=error):
            prepare_custom(kind, write_rows(tmp_path, [row]), tmp_path / "out", config)

    def test_a_name_with_a_zero_character_is_one_bad_item(self, tmp_path):
        rows = [{"image": "1.png", "caption": "a shade"}, {"image": "\0", "caption": "nothing"}]
        source = write_rows(tmp_path, rows)
        with pytest.raises(
            ValueError, match=r"1 bad item, .*the name '\\x00' has a zero character"
        ):
            prepare_custom("pairs", source, tmp_path / "out")
        info = prepare_custom("pairs", source, tmp_path / "out", PairsConfig(max_errors=1))
        assert sum(counts.examples for counts in info.splits.values()) == 1

    def test_names_that_are_not_utf8(self, tmp_path):
        folder = tmp_path / "caf\udce9"
        for number, name in enumerate(("a", "b", "caf\udce9")):
            write_photo(folder / f"{name}.png", number)
            (folder / f"{name}.txt").write_text("a shade")
        with pytest.raises(
            ValueError,
            match=r"2 bad items.*the name 'caf\\udce9\.\w+' is not UTF-8; rename the file",
        ):
            prepare_custom("pairs", folder, tmp_path / "out")
        info = prepare_custom("pairs", folder, tmp_path / "out", PairsConfig(max_errors=2))
        assert sum(counts.examples for counts in info.splits.values()) == 2
        assert info == read_info(tmp_path / "out")
        assert info == prepare_custom("pairs", folder, tmp_path / "out", PairsConfig(max_errors=2))
        with pytest.raises(
            ValueError, match=r"caf\\udce9/out.* is not UTF-8; choose another folder"
        ):
            prepare_custom("pairs", folder, folder / "out", PairsConfig(max_errors=2))


class TestAttempts:
    def test_a_killed_attempt_is_continued_to_the_same_set(self, tmp_path, forked):
        source = write_rows(
            tmp_path, [{"image": f"{n}.png", "caption": f"c{n}"} for n in range(120)], 120
        )
        whole = prepare_custom("pairs", source, tmp_path / "whole")
        code = (
            "import os, sys\nfrom pathlib import Path\nfrom bridgetower.data.sets import prepared_set\n"
            "prepared_set._COMMIT_BYTES = 8_000\nfrom bridgetower.data.sets.custom import PairsConfig, prepare_custom\n"
            "commit, calls = prepared_set.SetWriter._commit, []\n"
            "def counted(self):\n    commit(self)\n    calls.append(0)\n    if len(calls) == 2: os._exit(9)\n"
            "prepared_set.SetWriter._commit = counted\n"
            "prepare_custom('pairs', sys.argv[1], Path(sys.argv[2]), PairsConfig(num_workers=1))"
        )
        killed = subprocess.run([forked / "python", "-c", code, source, tmp_path / "out"])
        assert killed.returncode == 9
        assert not (tmp_path / "out" / "dataset.json").exists()
        info = prepare_custom("pairs", source, tmp_path / "out")
        assert (info.digest, info.splits) == (whole.digest, whole.splits)

    def test_a_complete_set_is_left_as_it_is_and_another_one_refused(self, tmp_path):
        source = write_rows(
            tmp_path, [{"image": f"{n}.png", "caption": f"c{n}"} for n in range(20)], 20
        )
        first = prepare_custom("pairs", source, tmp_path / "out")
        before = folder_snapshot(tmp_path / "out")
        assert (
            prepare_custom(
                "pairs", source, tmp_path / "out", PairsConfig(num_workers=1, max_errors=3)
            )
            == first
        )
        assert folder_snapshot(tmp_path / "out") == before
        with pytest.raises(ValueError, match="is a file; give a folder"):
            prepare_custom("pairs", source, source)
        with pytest.raises(ValueError, match="differs in seed"):
            prepare_custom("pairs", source, tmp_path / "out", PairsConfig(seed=1))
        source.write_text(source.read_text().replace('"c3"', '"d3"'))  # of the same size
        with pytest.raises(ValueError, match="differs in source"):
            prepare_custom("pairs", source, tmp_path / "out")


def named_problems(example, config, seen):
    """Makes one caption of the name of an image."""
    if example.id == "3.png":
        raise ValueError("it is the third")
    return [f"number {Path(example.id).stem}"]


def test_a_kind_of_ones_own(tmp_path):
    custom_sets = {
        "entries": named_problems,
        "files": lambda seen, config, training: {
            "lines.json": [seen.rows, config.seed, len(list(training))]
        },
    }
    names = CustomSetSpec(name="names", schema=CAPTIONS, summary="Images.", **custom_sets)
    source = write_rows(tmp_path, [{"image": f"{n // 2}.png", "n": n} for n in range(40)], 20)
    with pytest.raises(ValueError, match=r"2 bad items.* rows\.jsonl line 7: it is the third"):
        prepare_custom(names, source, tmp_path / "out", CustomSetConfig(seed=3))
    info = prepare_custom(names, source, tmp_path / "out", CustomSetConfig(seed=3, max_errors=2))
    assert sorted(split_entries(tmp_path / "out")) == sorted(
        f"number {n}" for n in range(20) if n != 3
    )
    assert json.loads((tmp_path / "out" / "lines.json").read_text()) == [
        40,
        3,
        info.splits["train"].examples,
    ]
    with pytest.raises(
        ValueError, match="no kind of set called 'pair'; there are pairs, classification"
    ):
        prepare_custom("pair", source, tmp_path / "out")
    with pytest.raises(ValueError, match="names takes a CustomSetConfig, given is a PairsConfig"):
        prepare_custom(names, source, tmp_path / "out", PairsConfig())
