"""The on-disk form: what is written is what is read, and what is wrong is said."""

from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bridgetower.data.info import SplitInfo
from bridgetower.data.kinds import Question, Statement
from bridgetower.data.records import PictureRecord, Record, is_own_parquet, write_split
from bridgetower.data.splits import parquet_path, read_split
from bridgetower.files import sha256_of
from rows import pair_record, png, question_record, record, statement_record


class TestRecord:
    @pytest.mark.parametrize("captions", [("",), ("fine", " "), (" not stripped",), ("\ud83d",)])
    def test_refuses_captions(self, captions: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match=r"captions of record 'id-1': caption .*; leave it out"):
            record(1, captions=captions)

    def test_refuses_empty_questions_and_statements(self) -> None:
        with pytest.raises(ValueError, match="questions of record 'id-1': question 7 is empty; leave it out"):
            question_record(1, questions=(Question(question_id=7, question=" "),))
        with pytest.raises(ValueError, match="statements of record 'id-1': statement 'x' is empty; leave it out"):
            statement_record(1, statements=(Statement(statement_id="x", text=""),))

    def test_refuses_empty_pictures(self) -> None:
        with pytest.raises(ValueError, match="'id-1' has 0 bytes"):
            record(1, image=b"")
        with pytest.raises(ValueError, match="second picture of record 'id-1' has 0 bytes"):
            pair_record(1, image_2=b"")

    @pytest.mark.parametrize(
        ("make", "column"),
        [
            (record, "captions"),
            (question_record, "questions"),
            (statement_record, "statements"),
            (pair_record, "statements"),
        ],
    )
    def test_refuses_no_text(self, make: Callable[..., PictureRecord], column: str) -> None:
        with pytest.raises(ValueError, match=f"{column} of record 'id-1' are missing; give at least one"):
            make(1, **{column: ()})

    @pytest.mark.parametrize(("make", "label"), [(statement_record, "True"), (pair_record, "entailment")])
    def test_refuses_labels_of_another_kind(self, make: Callable[..., PictureRecord], label: str) -> None:
        with pytest.raises(ValueError, match=f"label of statement 'x' is '{label}'; expected one of"):
            make(1, statements=(Statement(statement_id="x", text="a", label=label),))

    def test_refuses_empty_id(self) -> None:
        with pytest.raises(ValueError, match=r"'1\.png' has an empty image_id"):
            record(1, image_id="")


class TestSplit:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        text = datasets.Value("string")
        records = [record(n, extra={"colour": "grey", "tags": ["a", str(n)]}) for n in range(5)]
        path = parquet_path(tmp_path, "train")
        written = write_split(path, records, columns={"colour": text, "tags": datasets.List(text)})
        read = read_split(tmp_path, "train")
        assert written == SplitInfo(images=5, texts=10, files={"train.parquet": sha256_of(path)})
        assert read.column("image_id") == [f"id-{n}" for n in range(5)]
        assert read.row(3) == {
            "image": {"bytes": png(3), "path": "3.png"},
            "image_id": "id-3",
            "captions": ["shade 3", "grey"],
            "colour": "grey",
            "tags": ["a", "3"],
        }

    def test_questions(self, tmp_path: Path) -> None:
        path = parquet_path(tmp_path, "test-dev")
        written = write_split(path, map(question_record, range(3)), kind="vqa")
        assert written == SplitInfo(images=3, texts=6, files={path.name: sha256_of(path)})
        assert read_split(tmp_path, "test-dev", kind="vqa").row(2) == {
            "image": {"bytes": png(2), "path": "2.png"},
            "image_id": "id-2",
            "questions": [
                {
                    "question_id": 20,
                    "question": "How dark is it?",
                    "question_type": "how",
                    "answer_type": "number",
                    "answers": ["2"] * 10,
                },
                {"question_id": 21, "question": "What is it?", "question_type": "", "answer_type": "", "answers": []},
            ],
        }

    def test_statements(self, tmp_path: Path) -> None:
        write_split(parquet_path(tmp_path, "test"), [statement_record(4)], kind="snli-ve")
        assert read_split(tmp_path, "test", kind="snli-ve").row(0)["statements"] == [
            {"statement_id": "4#a", "text": "It is grey.", "label": "entailment"},
            {"statement_id": "4#b", "text": "It is a cat.", "label": ""},
        ]

    def test_picture_pairs(self, tmp_path: Path) -> None:
        write_split(parquet_path(tmp_path, "test1"), [pair_record(4)], kind="nlvr2")
        assert read_split(tmp_path, "test1", kind="nlvr2").row(0) == {
            "image": {"bytes": png(4), "path": "4.png"},
            "image_2": {"bytes": png(104), "path": "4-2.png"},
            "image_id": "id-4",
            "statements": [{"statement_id": "dev-4-0-0", "text": "The left one is darker.", "label": "True"}],
        }

    def test_refuses_records_of_another_kind(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="record 'id-1' is of kind snli-ve, expected nlvr2"):
            write_split(tmp_path / "dev.parquet", [statement_record(1)], kind="nlvr2")

    def test_any_reader_decodes_pictures(self, tmp_path: Path) -> None:
        write_split(tmp_path / "test.parquet", [record(7)])
        row = datasets.load_dataset("parquet", data_files=str(tmp_path / "test.parquet"), split="train")[0]
        assert isinstance(row["image"], Image.Image)
        assert row["image"].getpixel((0, 0)) == (7, 7, 7)

    def test_a_file_replaced_in_place_is_read_anew(self, tmp_path: Path) -> None:
        for number in (1, 2):
            write_split(tmp_path / "train.parquet", [record(number)])
            assert read_split(tmp_path, "train").row(0)["image_id"] == f"id-{number}"

    def test_memory_is_bounded_by_row_groups(self, tmp_path: Path) -> None:
        alive = 0
        most = 0

        class Counted(bytes):
            def __del__(self) -> None:
                nonlocal alive
                alive -= 1

        def stream() -> Iterator[Record]:
            nonlocal alive, most
            for number in range(40):
                alive += 1
                most = max(most, alive)
                yield record(number, image=Counted(b"x" * 1000))

        write_split(tmp_path / "train.parquet", stream(), row_group_bytes=5000)
        assert pq.ParquetFile(tmp_path / "train.parquet").num_row_groups == 8
        assert most <= 11  # two groups and one: a group stays until the next one is complete

    def test_an_error_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "train.parquet"
        write_split(path, [record(1)])
        before = path.read_bytes()
        with pytest.raises(ValueError, match="image_id 'id-2' comes twice"):
            write_split(path, [record(2), record(2)])
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["train.parquet"]

    def test_refuses_no_records(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no record to write"):
            write_split(tmp_path / "train.parquet", [])
        assert not list(tmp_path.iterdir())

    def test_refuses_other_columns(self, tmp_path: Path) -> None:
        text = datasets.Value("string")
        with pytest.raises(ValueError, match=r"has columns \['b'\], expected \['a'\]"):
            write_split(tmp_path / "train.parquet", [record(1, extra={"b": "x"})], columns={"a": text})
        with pytest.raises(ValueError, match="further column captions has the name of a core column"):
            write_split(tmp_path / "train.parquet", [record(1)], columns={"captions": text})

    def test_knows_its_own_files(self, tmp_path: Path) -> None:
        write_split(tmp_path / "train.parquet", [record(1)])
        datasets.Dataset.from_dict({"a": [1]}).to_parquet(str(tmp_path / "other.parquet"))
        assert is_own_parquet(tmp_path / "train.parquet")
        assert not is_own_parquet(tmp_path / "other.parquet")
        (tmp_path / "none.parquet").write_text("not one at all")
        assert not is_own_parquet(tmp_path / "none.parquet")
