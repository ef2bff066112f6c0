"""`dataset.json`: what is written is what is read, and what is wrong is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bridgetower.data.folder import DatasetInfo, SplitInfo, read_info, read_split, split_digests, write_info
from bridgetower.data.records import write_split
from bridgetower.data.schema import CAPTIONS
from rows import record


def description(**changes: object) -> DatasetInfo:
    values: dict[str, object] = {
        "name": "greys",
        "seed": 3,
        "split_rule": "by shade",
        "sources": {"greys": "1.0"},
        "licences": {"images": "CC0"},
        "settings": {"num_test": 1, "column": None},
        "splits": {"train": SplitInfo(images=2, texts=4, files={"train.parquet": "00"})},
        "left_out": {"too dark": ["0", "1"]},
    }
    return DatasetInfo(**{**values, **changes})  # type: ignore[arg-type]


class TestInfo:
    def test_its_kind_is_that_of_the_schema(self, tmp_path: Path) -> None:
        greys = replace(CAPTIONS, name="greys")  # the same columns and entries
        write_split(tmp_path / "train.parquet", [record(1)])
        assert len(read_split(tmp_path, "train", schema=greys)) == 1
        write_info(tmp_path, description())
        assert len(read_split(tmp_path, "train")) == 1
        with pytest.raises(ValueError, match=f"{tmp_path} is a set of kind captions; use a set of kind greys"):
            read_split(tmp_path, "train", schema=greys)

    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        write_info(tmp_path, description())
        assert read_info(tmp_path) == description()
        write_info(tmp_path, description(kind="nlvr2", protocol="published splits"))
        assert read_info(tmp_path).kind == "nlvr2"

    def test_digests_of_all_splits(self) -> None:
        splits = {name: SplitInfo(images=1, texts=1, files={f"{name}.parquet": name}) for name in ("train", "test")}
        assert description(splits=splits).digests() == {"train.parquet": "train", "test.parquet": "test"}

    def test_counts_of_what_is_left_out(self) -> None:
        info = description(left_out={"too dark": ["0", "1"], "dead link": ["2"]}, num_left_out={"dead link": 1003})
        assert info.left_out_counts() == {"too dark": 2, "dead link": 1003}

    def test_digest_of_a_split(self, tmp_path: Path) -> None:
        write_info(tmp_path, description())
        assert split_digests(tmp_path, "train") == {"train.parquet": "00"}
        with pytest.raises(
            ValueError, match=r"dataset\.json in .* has no split 'test'; run `bridgetower prepare` again"
        ):
            split_digests(tmp_path, "test")
        with pytest.raises(FileNotFoundError, match=r"no dataset\.json in"):
            split_digests(tmp_path / "..", "train")

    def test_says_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no dataset\.json in"):
            read_info(tmp_path)

    @pytest.mark.parametrize("content", ["{}", '{"splits": {}}', '{"splits": {"train": {"rows": 1}}}'])
    def test_refuses_other_content(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=r"dataset\.json.* lacks \["):
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
        with pytest.raises(ValueError, match="format 3, this version reads 2; prepare it again"):
            description(format=3)
        with pytest.raises(ValueError, match="unknown split 'Dev'"):
            description(splits={"Dev": SplitInfo(images=1, texts=1, files={})})

    def test_asks_to_prepare_a_set_of_an_earlier_version_again(self, tmp_path: Path) -> None:
        earlier = {"format": 1, "name": "greys", "splits": {"train": {"images": 1, "captions": 1, "sha256": "00"}}}
        (tmp_path / "dataset.json").write_text(json.dumps(earlier))
        with pytest.raises(ValueError, match=r"dataset\.json has format 1, this version reads 2; prepare it again"):
            read_info(tmp_path)


def test_shards_add_up() -> None:
    shards = [SplitInfo(images=n, texts=2 * n, files={f"{n}.parquet": str(n)}) for n in (1, 2)]
    assert SplitInfo.of_shards(shards) == SplitInfo(images=3, texts=6, files={"1.parquet": "1", "2.parquet": "2"})
