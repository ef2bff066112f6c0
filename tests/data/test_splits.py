"""Splits: their files, one or several, and how pictures are given to them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridgetower.data.folder import (
    assign_splits,
    by_split,
    check_split_names,
    parquet_path,
    read_split,
    shard_paths,
    split_files,
)
from bridgetower.data.records import write_split
from bridgetower.data.schema import SCHEMAS
from rows import record


def write_shards(folder: Path, split: str, count: int) -> list[Path]:
    """Writes two pictures per shard."""
    paths = shard_paths(folder, split, count)
    for number, path in enumerate(paths):
        write_split(path, [record(2 * number), record(2 * number + 1)])
    return paths


class TestNames:
    @pytest.mark.parametrize("name", ["train", "test-dev", "restval", "test1", "unbalanced-test1"])
    def test_fit(self, name: str, tmp_path: Path) -> None:
        check_split_names([name])
        assert parquet_path(tmp_path, name) == tmp_path / f"{name}.parquet"

    @pytest.mark.parametrize("name", ["", "Train", "a/b", "..", "-", "a-", "a b", "train-00000-of-00002"])
    def test_unfit(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"unknown split .*; a split is named in lower-case letters, digits and"):
            read_split(tmp_path, name)


class TestShards:
    def test_are_read_as_one(self, tmp_path: Path) -> None:
        paths = write_shards(tmp_path, "train", 3)
        assert [path.name for path in paths] == [f"train-0000{n}-of-00003.parquet" for n in range(3)]
        rows = read_split(tmp_path, "train")
        assert len(rows) == 6
        assert [rows.row(number)["image_id"] for number in range(6)] == rows.column("image_id").to_pylist()
        assert rows.column("image_id").to_pylist() == [f"id-{n}" for n in range(6)]

    def test_one_has_a_plain_name(self, tmp_path: Path) -> None:
        assert write_shards(tmp_path, "train", 1) == [tmp_path / "train.parquet"]

    def test_belong_to_their_split(self, tmp_path: Path) -> None:
        write_shards(tmp_path, "test", 2)
        write_shards(tmp_path, "test-dev", 1)
        assert len(split_files(tmp_path, "test")) == 2
        assert [path.name for path in split_files(tmp_path, "test-dev")] == ["test-dev.parquet"]
        with pytest.raises(
            FileNotFoundError, match=r"no split 'train' in .*; there: test, test-dev \(evaluate has --split"
        ):
            split_files(tmp_path, "train")

    def test_a_missing_one_is_named(self, tmp_path: Path) -> None:
        write_shards(tmp_path, "train", 3)[1].unlink()
        with pytest.raises(FileNotFoundError, match=r"no train-00001-of-00003\.parquet in"):
            read_split(tmp_path, "train")

    @pytest.mark.parametrize("other", [1, 2])
    def test_of_two_preparations_are_refused(self, tmp_path: Path, other: int) -> None:
        write_shards(tmp_path, "train", 3)
        write_shards(tmp_path, "train", other)
        with pytest.raises((ValueError, FileNotFoundError), match=r"prepare.* again"):
            read_split(tmp_path, "train")


class TestReadSplit:
    def test_says_which_splits_there_are(self, tmp_path: Path) -> None:
        write_split(tmp_path / "train.parquet", [record(1)])
        write_split(tmp_path / "test.parquet", [record(2)])
        with pytest.raises(FileNotFoundError, match=r"no split 'validation' in .*; there: train, test"):
            read_split(tmp_path, "validation")
        (tmp_path / "originals").mkdir()
        with pytest.raises(FileNotFoundError, match=r"no split in .*originals: it is not a set that `bridgetower"):
            read_split(tmp_path / "originals", "train")

    def test_says_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no dataset folder"):
            read_split(tmp_path / "none", "train")
        write_split(tmp_path / "train.parquet", [record(1)])
        with pytest.raises(
            ValueError, match=r"has no column questions; it has image, image_id, captions: use a set of kind vqa"
        ):
            read_split(tmp_path, "train", schema=SCHEMAS["vqa"])

    def test_refuses_what_is_no_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(ValueError, match=r"train\.parquet is no Parquet file"):
            read_split(tmp_path, "train")


def test_by_split_keeps_the_order_and_leaves_empty_splits_out() -> None:
    assert by_split([("test", 3), ("train", 2), ("test", 1)]) == {"train": [2], "test": [3, 1]}
    assert by_split([]) == {}
    assert list(by_split((name, 0) for name in ("restval", "test", "dev", "train"))) == [
        "train",
        "test",
        "dev",
        "restval",
    ]


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
