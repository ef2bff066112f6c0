"""Rows in files: every row comes back from its place, files are whole or not there, and mappings do not pile up."""

import logging
import os
import pickle
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bridgetower.rows as rows_module
from bridgetower.disk_cache import CONTENT
from bridgetower.files import locked
from bridgetower.rows import RowCache, RowFiles


def rows_of(numbers: range) -> dict[str, list[Tensor]]:
    """Row n has n % 3 + 1 words of width 2 in one field, and its number in another."""
    words = [n + torch.arange(2 * (n % 3 + 1)).reshape(-1, 2) / 10 for n in numbers]
    return {"words": words, "number": [torch.tensor([n]) for n in numbers]}


def written(folder: Path, num_rows: int = 7, rows_per_part: int = 3) -> RowFiles:
    files = RowFiles(folder, "set", num_rows=num_rows, rows_per_part=rows_per_part)
    for number in files.missing():
        files.write(number, rows_of(files.rows_of(number)))
    return files


def check(files: RowFiles, rows: list[int]) -> None:
    expected = [rows_of(range(row, row + 1)) for row in rows]
    for field in ("words", "number"):
        found = list(files.read(field, rows))
        assert all(torch.equal(one, other[field][0]) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows_per_part", [1, 3, 7, 100])
def test_rows_come_back_in_any_order_and_as_often_as_wanted(tmp_path: Path, rows_per_part: int) -> None:
    files = written(tmp_path, rows_per_part=rows_per_part)
    check(files, [6, 0, 3, 3, 2])
    check(files, [])
    assert len(files) == 7
    assert len(list(tmp_path.iterdir())) == -(-7 // rows_per_part)


def test_what_is_missing_is_told_and_nothing_else_written(tmp_path: Path) -> None:
    files = RowFiles(tmp_path, "set", num_rows=7, rows_per_part=3)
    assert files.missing() == [0, 1, 2]
    assert [list(files.rows_of(number)) for number in files.missing()] == [[0, 1, 2], [3, 4, 5], [6]]
    files.write(1, rows_of(files.rows_of(1)))
    assert files.missing() == [0, 2]
    check(files, [4])


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_damaged_file_is_named(tmp_path: Path, length: int) -> None:
    file = tmp_path / "set-00001.safetensors"
    files = written(tmp_path)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"set-00001\.safetensors is damaged \(.*\); remove it, and it is computed"):
        list(files.read("words", [0, 3]))


def test_a_pipe_is_no_file_and_is_not_waited_for(tmp_path: Path) -> None:
    files = written(tmp_path)
    file = tmp_path / "set-00001.safetensors"
    file.unlink()
    os.mkfifo(file)
    assert files.missing() == [1]
    with pytest.raises(FileExistsError, match="is a device, a pipe"):
        files.write(1, rows_of(files.rows_of(1)))


def test_another_process_maps_for_itself(tmp_path: Path) -> None:
    files = written(tmp_path)
    check(files, [5])
    content = pickle.dumps(files)
    assert len(content) < 1000
    check(pickle.loads(content), [5, 1])


def test_mappings_are_dropped_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_MOST_MAPPED", 20)
    files = written(tmp_path, rows_per_part=1)
    for row in range(7):
        check(files, [row])
        assert len(files._mapped) <= 4
    kept = next(files.read("words", [2]))
    list(files.read("words", [0, 1, 3]))
    assert torch.equal(kept, rows_of(range(2, 3))["words"][0])


def test_a_full_disk_leaves_no_half_file(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64)
    files = RowFiles(disk / "rows", "set", num_rows=2, rows_per_part=1)
    files.write(0, {"words": [torch.zeros(100, 10)]})
    with pytest.raises(OSError, match=r"set-00001\.safetensors could not be written .*; make room on the disk"):
        files.write(1, {"words": [torch.zeros(10000, 10)]})
    assert files.missing() == [1]
    assert [path.name for path in (disk / "rows").iterdir()] == ["set-00000.safetensors"]


class TestCache:
    """Entries of a cache have one part of about 4,000 bytes."""

    def put(self, cache: RowCache, name: str) -> Path:
        content = {"name": name}
        files = cache.files(content, 1, 4000)
        for number in cache.claim(files, content, 4000):
            files.write(number, {"words": [torch.zeros(1000, 1)]})
        assert cache.claim(files, content, 4000) == []
        return files.folder

    def test_the_longest_unused_are_removed(self, tmp_path: Path) -> None:
        (tmp_path / "not-ours").mkdir()
        (tmp_path / "not-ours" / "rows-00000.safetensors").touch()
        cache = RowCache(tmp_path, 13_000)
        with cache:
            folders = [self.put(cache, name) for name in "abc"]
        for age, folder in enumerate(folders):
            os.utime(folder / CONTENT, (age, age))
        with cache:
            self.put(cache, "a")  # used again
        with cache:
            self.put(cache, "d")
        assert [folder.exists() for folder in folders] == [True, False, True]
        assert (tmp_path / "not-ours" / "rows-00000.safetensors").exists()

    def test_what_a_run_holds_is_kept_beyond_the_limit(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with RowCache(tmp_path, 5000) as one, RowCache(tmp_path, 5000) as other:
            held = self.put(one, "a")
            assert self.put(other, "a") == held
            self.put(other, "b")
            assert held.exists()
        assert "the features of frozen towers that runs hold take more than the limit of 0.0 GiB" in caplog.text
        with RowCache(tmp_path, 5000) as third:
            self.put(third, "c")
        assert not held.exists()

    def test_a_small_disk_is_noticed_before_anything_is_computed(self, small_disk: Callable[[int], Path]) -> None:
        disk = small_disk(64)
        with RowCache(disk, 2**40) as cache:
            folder = self.put(cache, "a")
            files = cache.files({"name": "large"}, 1000, 4000)
            with pytest.raises(OSError, match=r"features of frozen towers take .* GiB, but the disk of .* has"):
                cache.claim(files, {"name": "large"}, 4000)
            assert folder.exists()
        with RowCache(disk, 2**40) as cache:  # which now may remove the first one
            files = cache.files({"name": "fits"}, 1, 60_000)
            assert cache.claim(files, {"name": "fits"}, 52_000) == [0]
        assert not folder.exists()

    def test_one_that_was_removed_while_another_waited_is_made_again(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        with RowCache(tmp_path, 2**40) as cache:
            folder = self.put(cache, "a")
        with ThreadPoolExecutor(1) as pool, RowCache(tmp_path, 2**40) as waiting:
            with locked(folder):
                result = pool.submit(self.put, waiting, "a")
                while "waiting for it" not in caplog.text:
                    time.sleep(0.01)
                shutil.rmtree(folder)
            assert result.result() == folder
        assert list(folder.glob("*.safetensors"))
