"""Dataset folders: whole or not there, continued after any end, readable by others."""

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import datasets
import duckdb
import pytest
from PIL import Image

import kills
from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets import prepare_set
from bridgetower.data.folder import parquet_files, read_info
from bridgetower.files import locked
from folders import snapshot
from miniature import coco_name, jpeg, write, write_coco

NUM_PICTURES = 120


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    write_coco(tmp_path / "coco")
    return tmp_path / "coco"


def write_many(folder: Path) -> None:
    """Writes a larger training split."""
    images = []
    for number in range(NUM_PICTURES):
        name = coco_name(number, "train2014")
        sentences = [{"raw": f"Picture {number}."}]
        images.append({"filepath": "train2014", "filename": name, "split": "train", "sentences": sentences})
        write(folder / "train2014" / name, jpeg(number, size=(64, 64)))
    write(folder / "dataset_coco.json", {"images": images})


def prepared_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


class TestBad:
    def test_missing_and_broken_pictures_are_named(self, coco: Path, tmp_path: Path) -> None:
        missing = coco / "train2014" / coco_name(9, "train2014")
        broken = coco / "val2014" / coco_name(391895, "val2014")
        missing.unlink()
        broken.write_bytes(broken.read_bytes()[:200])
        with pytest.raises(ValueError, match=rf"has 1 bad .*no file 'train2014/{missing.name}'"):
            prepare_set("coco", coco, tmp_path / "out")
        with pytest.raises(ValueError, match=rf"has 2 bad .*{missing.name}.*{broken.name}': .*damaged"):
            prepare_set("coco", coco, tmp_path / "out", PrepareConfig(max_errors=1))
        assert not (tmp_path / "out" / "dataset.json").exists()
        info = prepare_set("coco", coco, tmp_path / "out", PrepareConfig(max_errors=2))
        assert info.splits["train"].images == 6
        assert info.splits["test"].images == 1
        assert [message.partition(":")[0] for message in info.left_out["cannot be used"]] == [
            missing.name,
            f"'val2014/{broken.name}'",
        ]

    def test_a_lower_limit_on_a_complete_set(self, coco: Path, tmp_path: Path) -> None:
        broken = coco / "train2014" / coco_name(9, "train2014")
        broken.write_bytes(b"no picture")
        prepare_set("coco", coco, tmp_path / "out", PrepareConfig(max_errors=1))
        with pytest.raises(ValueError, match=r"has 1 bad .*allowed are 0"):
            prepare_set("coco", coco, tmp_path / "out")
        assert read_info(tmp_path / "out").splits["train"].images == 6

    def test_a_repaired_picture_is_written_and_the_rest_kept(self, coco: Path, tmp_path: Path) -> None:
        picture = coco / "train2014" / coco_name(9, "train2014")
        whole = picture.read_bytes()
        picture.write_bytes(b"no picture")
        with pytest.raises(ValueError, match="has 1 bad"):
            prepare_set("coco", coco, tmp_path / "out")
        before = (tmp_path / "out" / "test.parquet").stat().st_mtime_ns
        picture.write_bytes(whole)
        info = prepare_set("coco", coco, tmp_path / "out")
        assert info.splits["train"].images == 7
        assert info.left_out == {}
        assert (tmp_path / "out" / "test.parquet").stat().st_mtime_ns == before

    def test_a_missing_annotation_file(self, coco: Path, tmp_path: Path) -> None:
        (coco / "dataset_coco.json").unlink()
        message = r"no file dataset_coco\.json or karpathy/dataset_coco\.json in"
        for max_errors in (0, 100):
            with pytest.raises(FileNotFoundError, match=message):
                prepare_set("coco", coco, tmp_path / "out", PrepareConfig(max_errors=max_errors))
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; give the folder with the original files"):
            prepare_set("coco", tmp_path / "nowhere", tmp_path / "out")

    def test_a_split_of_which_nothing_is_left(self, coco: Path, tmp_path: Path) -> None:
        for number in (391895, 60623):
            (coco / "val2014" / coco_name(number, "val2014")).write_bytes(b"no picture")
        with pytest.raises(ValueError, match="has no usable image of test"):
            prepare_set("coco", coco, tmp_path / "out", PrepareConfig(max_errors=2))
        for number in (391895, 60623):
            (coco / "val2014" / coco_name(number, "val2014")).unlink()
        with pytest.raises(ValueError, match="has no usable image of test; check"):
            prepare_set("coco", coco, tmp_path / "out", PrepareConfig(max_errors=2))
        assert not (tmp_path / "out" / "dataset.json").exists()


class TestComplete:
    def test_is_left_alone(self, coco: Path, tmp_path: Path) -> None:
        first = prepare_set("coco", coco, tmp_path / "out")
        before = snapshot(tmp_path / "out")
        assert prepare_set("coco", coco, tmp_path / "out", PrepareConfig(num_workers=1, max_errors=3)) == first
        assert snapshot(tmp_path / "out") == before

    def test_of_other_settings_is_refused(self, coco: Path, tmp_path: Path) -> None:
        prepare_set("coco", coco, tmp_path / "out")
        with pytest.raises(ValueError, match="holds a dataset that differs in sources, splits"):
            prepare_set("coco", coco, tmp_path / "out", PrepareConfig(splits=("test",)))

    def test_a_damaged_file_is_written_again(self, coco: Path, tmp_path: Path) -> None:
        prepare_set("coco", coco, tmp_path / "out", PrepareConfig(shard_rows=2))
        before = prepared_files(tmp_path / "out")
        os.truncate(tmp_path / "out" / "train-00001-of-00004.parquet", 100)
        prepare_set("coco", coco, tmp_path / "out", PrepareConfig(shard_rows=2))
        assert prepared_files(tmp_path / "out") == before

    def test_nobody_else_may_write(self, coco: Path, tmp_path: Path) -> None:
        with locked(tmp_path / "out"), pytest.raises(FileExistsError, match="another process works in"):
            prepare_set("coco", coco, tmp_path / "out")


class TestDigests:
    def test_follow_the_content_and_not_the_time(self, coco: Path, tmp_path: Path) -> None:
        first = prepare_set("coco", coco, tmp_path / "first")
        for path in (coco / "train2014").iterdir():
            os.utime(path, (0, 0))
        assert prepare_set("coco", coco, tmp_path / "second") == first

    def test_originals_that_are_unpacked_again_are_the_same_set(self, coco: Path, tmp_path: Path) -> None:
        first = prepare_set("coco", coco, tmp_path / "out")
        before = snapshot(tmp_path / "out")
        shutil.copytree(coco, tmp_path / "again", copy_function=shutil.copyfile)
        shutil.rmtree(coco)
        assert prepare_set("coco", tmp_path / "again", tmp_path / "out") == first
        assert snapshot(tmp_path / "out") == before
        picture = tmp_path / "again" / "train2014" / coco_name(9, "train2014")
        picture.write_bytes(jpeg(9, size=(64, 64)))
        with pytest.raises(ValueError, match="holds a dataset that differs in sources"):
            prepare_set("coco", tmp_path / "again", tmp_path / "out")

    def test_nothing_but_the_set_is_left(self, coco: Path, tmp_path: Path) -> None:
        prepare_set("coco", coco, tmp_path / "out")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names <= {".lock", "dataset.json", "train.parquet", "validation.parquet", "test.parquet"}


class TestCutOff:
    def kill(self, python: Path, source: Path, out: Path) -> int:
        """Lets a process die right before it has finished a fourth file."""
        killed = [python, kills.__file__, "*.parquet", "4", "SIGKILL", "self"]
        command = [*killed, "prepare", "coco", "--source", source, "--out", out, "--shard-rows", "2"]
        return subprocess.run([*map(str, command)], check=False).returncode

    def test_by_a_kill(self, forked: Path, tmp_path: Path) -> None:
        write_many(tmp_path / "coco")
        out, whole = tmp_path / "out", tmp_path / "whole"
        for _ in range(3):
            assert self.kill(forked / "python", tmp_path / "coco", out) == -signal.SIGKILL
            assert not (out / "dataset.json").exists()
        finished = {path: path.stat().st_mtime_ns for path in parquet_files(out)}
        (out / ".train.parquet.partial-x.parquet").write_bytes(b"left over")
        for folder in (out, whole):
            prepare_set("coco", tmp_path / "coco", folder, PrepareConfig(shard_rows=2))
        assert prepared_files(out) == prepared_files(whole)
        assert len(finished) == 9
        assert all(path.stat().st_mtime_ns == time for path, time in finished.items())

    def test_by_a_full_disk(self, tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
        write_many(tmp_path / "coco")
        disk, config = small_disk(300), PrepareConfig(shard_rows=20)
        with pytest.raises(OSError, match="No space left") as caught:
            prepare_set("coco", tmp_path / "coco", disk, config)
        assert caught.value.errno == errno.ENOSPC
        assert not (disk / "dataset.json").exists()
        assert not list(disk.glob("*.partial-*"))
        assert len(parquet_files(disk)) >= 1


class TestOtherReaders:
    @pytest.fixture
    def folder(self, coco: Path, tmp_path: Path) -> Path:
        prepare_set("coco", coco, tmp_path / "out", PrepareConfig(shard_rows=3))
        return tmp_path / "out"

    def test_datasets(self, folder: Path) -> None:
        files = {"train": str(folder / "train*.parquet"), "test": str(folder / "test*.parquet")}
        read = datasets.load_dataset("parquet", data_files=files)
        assert len(read["train"]) == 7
        assert isinstance(read["test"][0]["image"], Image.Image)
        assert read["test"][0]["captions"][5] == "Picture 391895, caption 5."

    def test_duckdb(self, folder: Path) -> None:
        query = f"SELECT image_id, len(captions), octet_length(image.bytes) FROM '{folder}/train*.parquet' ORDER BY 1"
        rows = duckdb.sql(query).fetchall()
        assert len(rows) == 7
        assert rows[0] == (coco_name(9, "train2014"), 5, len(jpeg(9)))
