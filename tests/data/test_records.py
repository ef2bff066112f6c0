"""The on-disk form: what is written is what is read, and what is wrong is said."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bridgetower.data.folder import SplitInfo, parquet_path, read_split
from bridgetower.data.records import ImageFile, Record, is_own_parquet, write_split
from bridgetower.data.schema import CAPTIONS, NLVR2, SCHEMAS, SNLI_VE, VQA, Schema, Statement
from bridgetower.files import sha256_of
from rows import pair_record, png, question_record, record, statement_record

UNFIT: list[tuple[Schema, Record, str]] = [
    (CAPTIONS, record(1, entries=("fine", " ")), "captions of record 'id-1': caption is empty; leave it out"),
    (CAPTIONS, record(1, entries=(" a",)), "captions of record 'id-1': caption has spaces at its ends; leave it out"),
    (CAPTIONS, record(1, entries=()), "captions of record 'id-1' are missing; give at least one"),
    (CAPTIONS, record(1, image_id=""), r"record of .*'1\.png' of \d+ bytes.* has an empty image_id"),
    (CAPTIONS, record(1, images=()), "record 'id-1' has 0 images, expected 1"),
    (CAPTIONS, record(1, images=[ImageFile("1.png", b"")]), "image '1.png' of record 'id-1' has 0 bytes"),
    (CAPTIONS, record(1, extra={"b": "x"}), r"record 'id-1' has columns \['b'\], expected \[\]"),
    (VQA, question_record(1, entries=()), "questions of record 'id-1' are missing; give at least one"),
    (VQA, statement_record(1), "questions of record 'id-1': question is a Statement, expected a Question"),
    (SNLI_VE, pair_record(1), "record 'id-1' has 2 images, expected 1"),
    (NLVR2, statement_record(1), "record 'id-1' has 1 images, expected 2"),
    (
        NLVR2,
        pair_record(1, entries=(Statement(statement_id="x", text="a", label="entailment"),)),
        "statements of record 'id-1': statement 'x' has the label 'entailment', expected one of False, True",
    ),
]


@pytest.mark.parametrize(("schema", "unfit", "message"), UNFIT)
def test_unfit_records(schema: Schema, unfit: Record, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_split(tmp_path / "train.parquet", [unfit], schema=schema)
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Box:
    """An entry of a user's own schema."""

    name: str
    corners: tuple[float, ...]
    sure: bool = True


def test_a_users_own_schema(tmp_path: Path) -> None:
    boxes = Schema(name="boxes", entries="boxes", entry=Box, noun="box", texts=("name",), label="name")
    rows = [record(1, entries=(Box("dog", (0.5, 1.0)), Box("cat", ())))]
    written = write_split(tmp_path / "train.parquet", rows, schema=boxes)
    assert (written.images, written.texts) == (1, 2)
    assert read_split(tmp_path, "train", schema=boxes).row(0)["boxes"] == [
        {"name": "dog", "corners": [0.5, 1.0], "sure": True},
        {"name": "cat", "corners": [], "sure": True},
    ]
    with pytest.raises(ValueError, match="boxes of record 'id-1': box is empty"):
        write_split(tmp_path / "train.parquet", [record(1, entries=(Box(" ", ()),))], schema=boxes)


class TestSplit:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        records = [record(n, extra={"colour": "grey", "tags": ["a", str(n)]}) for n in range(5)]
        path = parquet_path(tmp_path, "train")
        written = write_split(path, records, columns={"colour": str, "tags": tuple[str, ...]})
        read = read_split(tmp_path, "train")
        assert written == SplitInfo(images=5, texts=10, files={"train.parquet": sha256_of(path)})
        assert read.column("image_id").to_pylist() == [f"id-{n}" for n in range(5)]
        assert read.row(3) == {
            "image": {"bytes": png(3), "path": "3.png"},
            "image_id": "id-3",
            "captions": ["shade 3", "grey"],
            "colour": "grey",
            "tags": ["a", "3"],
        }

    def test_questions(self, tmp_path: Path) -> None:
        path = parquet_path(tmp_path, "test-dev")
        written = write_split(path, map(question_record, range(3)), schema=SCHEMAS["vqa"])
        assert written == SplitInfo(images=3, texts=6, files={path.name: sha256_of(path)})
        assert read_split(tmp_path, "test-dev", schema=SCHEMAS["vqa"]).row(2) == {
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
        write_split(parquet_path(tmp_path, "test"), [statement_record(4)], schema=SCHEMAS["snli-ve"])
        assert read_split(tmp_path, "test", schema=SCHEMAS["snli-ve"]).row(0)["statements"] == [
            {"statement_id": "4#a", "text": "It is grey.", "label": "entailment"},
            {"statement_id": "4#b", "text": "It is a cat.", "label": ""},
        ]

    def test_picture_pairs(self, tmp_path: Path) -> None:
        write_split(parquet_path(tmp_path, "test1"), [pair_record(4)], schema=SCHEMAS["nlvr2"])
        assert read_split(tmp_path, "test1", schema=SCHEMAS["nlvr2"]).row(0) == {
            "image": {"bytes": png(4), "path": "4.png"},
            "image_2": {"bytes": png(104), "path": "4-2.png"},
            "image_id": "id-4",
            "statements": [{"statement_id": "dev-4-0-0", "text": "The left one is darker.", "label": "True"}],
        }

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
                yield record(number, images=[ImageFile("x.png", Counted(b"x" * 1000))])

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

    def test_refuses_a_column_that_every_set_has(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="further column captions has the name of a core column"):
            write_split(tmp_path / "train.parquet", [record(1)], columns={"captions": str})

    def test_knows_its_own_files(self, tmp_path: Path) -> None:
        write_split(tmp_path / "train.parquet", [record(1)])
        datasets.Dataset.from_dict({"a": [1]}).to_parquet(str(tmp_path / "other.parquet"))
        assert is_own_parquet(tmp_path / "train.parquet")
        assert not is_own_parquet(tmp_path / "other.parquet")
        (tmp_path / "none.parquet").write_text("not one at all")
        assert not is_own_parquet(tmp_path / "none.parquet")
