"""The on-disk form: what is written is what is read, and what is wrong is said."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bridgetower.data.records import (
    DatasetInfo,
    Record,
    SplitInfo,
    assign_splits,
    by_split,
    is_own_parquet,
    parquet_path,
    read_info,
    read_split,
    sha256_of,
    split_digest,
    write_info,
    write_split,
)


def png(shade: int, size: int = 4) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def record(number: int, **changes: object) -> Record:
    values: dict[str, object] = {
        "image": png(number),
        "file_name": f"{number}.png",
        "image_id": f"id-{number}",
        "captions": (f"shade {number}", "grey"),
    }
    return Record(**{**values, **changes})  # type: ignore[arg-type]


def description(**changes: object) -> DatasetInfo:
    values: dict[str, object] = {
        "name": "greys",
        "seed": 3,
        "split_rule": "by shade",
        "sources": {"greys": "1.0"},
        "licences": {"pictures": "CC0"},
        "settings": {"num_test": 1, "column": None},
        "splits": {"train": SplitInfo(images=2, captions=4, sha256="00")},
        "left_out": {"too dark": ["0", "1"]},
    }
    return DatasetInfo(**{**values, **changes})  # type: ignore[arg-type]


class TestRecord:
    @pytest.mark.parametrize("captions", [(), ("",), ("fine", " "), (" not stripped",)])
    def test_refuses_captions(self, captions: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match=r"captions of record 'id-1'.*at least one, stripped"):
            record(1, captions=captions)

    def test_refuses_empty_picture(self) -> None:
        with pytest.raises(ValueError, match="'id-1' has 0 bytes"):
            record(1, image=b"")

    def test_refuses_empty_id(self) -> None:
        with pytest.raises(ValueError, match=r"'1\.png' has an empty image_id"):
            record(1, image_id="")


class TestSplit:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        text = datasets.Value("string")
        records = [record(n, extra={"colour": "grey", "tags": ["a", str(n)]}) for n in range(5)]
        path = parquet_path(tmp_path, "train")
        written = write_split(path, records, columns={"colour": text, "tags": datasets.List(text)})
        read = read_split(tmp_path, "train", columns=["image", "tags"])
        assert written == SplitInfo(images=5, captions=10, sha256=sha256_of(path))
        assert read.column("image_id") == [f"id-{n}" for n in range(5)]
        assert read.row(3) == {
            "image": {"bytes": png(3), "path": "3.png"},
            "image_id": "id-3",
            "captions": ["shade 3", "grey"],
            "colour": "grey",
            "tags": ["a", "3"],
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

    def test_says_which_splits_there_are(self, tmp_path: Path) -> None:
        write_split(tmp_path / "train.parquet", [record(1)])
        write_split(tmp_path / "test.parquet", [record(2)])
        with pytest.raises(FileNotFoundError, match=r"no split 'validation' in .*; there: train, test"):
            read_split(tmp_path, "validation")

    def test_says_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no dataset folder"):
            read_split(tmp_path / "none", "train")
        with pytest.raises(ValueError, match=r"unknown split 'dev'; splits are train, validation, test"):
            read_split(tmp_path, "dev")
        write_split(tmp_path / "train.parquet", [record(1)])
        with pytest.raises(ValueError, match="has no column name; it has image, image_id, captions"):
            read_split(tmp_path, "train", columns=["image", "name"])

    def test_refuses_what_is_no_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(ValueError, match=r"train\.parquet is no Parquet file"):
            read_split(tmp_path, "train")

    def test_knows_its_own_files(self, tmp_path: Path) -> None:
        write_split(tmp_path / "train.parquet", [record(1)])
        datasets.Dataset.from_dict({"a": [1]}).to_parquet(str(tmp_path / "other.parquet"))
        assert is_own_parquet(tmp_path / "train.parquet")
        assert not is_own_parquet(tmp_path / "other.parquet")


class TestInfo:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        write_info(tmp_path, description())
        assert read_info(tmp_path) == description()

    def test_digest_of_a_split(self, tmp_path: Path) -> None:
        write_info(tmp_path, description())
        assert split_digest(tmp_path, "train") == "00"
        with pytest.raises(
            ValueError, match=r"dataset\.json in .* has no split 'test'; run `bridgetower prepare` again"
        ):
            split_digest(tmp_path, "test")
        with pytest.raises(FileNotFoundError, match=r"no dataset\.json in"):
            split_digest(tmp_path / "..", "train")

    def test_says_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no dataset\.json in"):
            read_info(tmp_path)

    @pytest.mark.parametrize("content", ["{}", '{"splits": {}}', '{"splits": {"train": {"rows": 1}}}'])
    def test_refuses_other_content(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match="is not a dataset description"):
            read_info(tmp_path)

    @pytest.mark.parametrize(("content", "message"), [("{", "is not valid JSON"), ("[]", "expected a JSON object")])
    def test_refuses_damaged_content(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_info(tmp_path)

    def test_refuses_unknown_keys_formats_and_splits(self, tmp_path: Path) -> None:
        write_info(tmp_path, description())
        content = json.loads((tmp_path / "dataset.json").read_text())
        (tmp_path / "dataset.json").write_text(json.dumps({**content, "colour": "grey"}))
        with pytest.raises(ValueError, match="colour"):
            read_info(tmp_path)
        with pytest.raises(ValueError, match="format 2, this version reads 1"):
            description(format=2)
        with pytest.raises(ValueError, match="unknown split 'dev'"):
            description(splits={"dev": SplitInfo(images=1, captions=1, sha256="00")})


def test_by_split_keeps_the_order_and_leaves_empty_splits_out() -> None:
    assert by_split([("test", 3), ("train", 2), ("test", 1)]) == {"train": [2], "test": [3, 1]}
    assert by_split([]) == {}


class TestAssignSplits:
    @given(
        keys=st.sets(st.text(max_size=5), min_size=4, max_size=30),
        seed=st.integers(0, 9),
        num_test=st.integers(0, 2),
        num_validation=st.integers(0, 1),
    )
    def test_counts_are_exact_and_order_does_not_matter(
        self, keys: set[str], seed: int, num_test: int, num_validation: int
    ) -> None:
        split_of = assign_splits(sorted(keys), seed=seed, num_test=num_test, num_validation=num_validation)
        again = assign_splits(sorted(keys, reverse=True), seed=seed, num_test=num_test, num_validation=num_validation)
        counts = {split: list(split_of.values()).count(split) for split in ("test", "validation", "train")}
        assert split_of == again
        assert split_of.keys() == keys
        assert counts == {
            "test": num_test,
            "validation": num_validation,
            "train": len(keys) - num_test - num_validation,
        }

    def test_a_new_key_moves_at_most_one_over_each_border(self) -> None:
        keys = [f"key {n}" for n in range(100)]
        before = assign_splits(keys, seed=0, num_test=20, num_validation=10)
        after = assign_splits([*keys, "new"], seed=0, num_test=20, num_validation=10)
        assert sum(before[key] != after[key] for key in keys) <= 2

    def test_seeds_differ(self) -> None:
        keys = [str(n) for n in range(50)]
        test = [
            {
                key
                for key, split in assign_splits(keys, seed=seed, num_test=10, num_validation=0).items()
                if split == "test"
            }
            for seed in (0, 1)
        ]
        assert test[0] != test[1]

    @pytest.mark.parametrize(("num_test", "num_validation"), [(2, 1), (3, 0), (-1, 1)])
    def test_refuses_counts_that_leave_nothing(self, num_test: int, num_validation: int) -> None:
        with pytest.raises(ValueError, match="leave nothing for train"):
            assign_splits("abc", seed=0, num_test=num_test, num_validation=num_validation)
