"""Rows in files: every row comes back from its place, files are whole or not there, and mappings do not pile up."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bridgetower.rows as rows_module
from bridgetower.rows import RowFiles


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
