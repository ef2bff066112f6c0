"""Rows of tensors, written once and in parts: in memory, or in memory-mapped files so that writing can go on later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridgetower.files import differences, read_json, remove_leftovers, replacing, write_json

FILE_BYTES = 2**26
"""About the size of one file."""

CONTENT = "content.json"
"""Tells what the files of a folder were computed from."""

_MOST_MAPPED = 2**28  # bytes that were read, after which files are mapped anew: until then they count as memory


class Rows(ABC):
    """Numbered rows, each with one tensor per field; the first axis of a field may differ from row to row."""

    def __init__(self, *, num_rows: int, rows_per_part: int) -> None:
        """Plans the parts.

        Args:
            num_rows: In all of them.
            rows_per_part: The last part may have fewer.
        """
        self.num_rows, self.rows_per_part = num_rows, rows_per_part

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_parts(self) -> int:
        """Number of parts, written or not."""
        return -(-self.num_rows // self.rows_per_part)

    def missing(self) -> list[int]:
        """Returns the numbers of the parts that are not written yet."""
        return [number for number in range(self.num_parts) if not self._is_written(number)]

    def rows_of(self, number: int) -> range:
        """Returns the rows of a part."""
        return range(number * self.rows_per_part, min((number + 1) * self.rows_per_part, self.num_rows))

    @abstractmethod
    def write(self, number: int, fields: Mapping[str, Sequence[Tensor]]) -> None:
        """Writes a part.

        Args:
            number: Of the part.
            fields: The tensors of all its rows by field; those of one field have the same dtype, and the same shape
                beyond the first axis.

        Raises:
            OSError: It could not be written, on a full disk for example.
        """

    def read(self, field: str, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yields one field of some rows, without copying it: copy what is kept for longer."""
        for row in rows:
            values, ends = self._part(row // self.rows_per_part, field)
            place = row % self.rows_per_part
            yield values[ends[place - 1] if place else 0 : ends[place]]

    @abstractmethod
    def _is_written(self, number: int) -> bool: ...

    @abstractmethod
    def _part(self, number: int, field: str) -> tuple[Tensor, list[int]]:
        """Returns the rows of a part, one after the other, and where each of them ends."""


class MemoryRows(Rows):
    """Rows in memory."""

    def __init__(self, *, num_rows: int, rows_per_part: int) -> None:
        super().__init__(num_rows=num_rows, rows_per_part=rows_per_part)
        self._parts: dict[int, dict[str, tuple[Tensor, list[int]]]] = {}

    def write(self, number: int, fields: Mapping[str, Sequence[Tensor]]) -> None:
        """Keeps a part."""
        self._parts[number] = {
            name: (torch.cat(list(rows)).cpu(), torch.tensor([len(row) for row in rows]).cumsum(0).tolist())
            for name, rows in fields.items()
        }

    def _is_written(self, number: int) -> bool:
        return number in self._parts

    def _part(self, number: int, field: str) -> tuple[Tensor, list[int]]:
        return self._parts[number][field]


class RowFiles(Rows):
    """Rows in files, one for each part, which is written whole or not at all.

    A row is read from the mapping of its file, so that only what is read takes memory, and not for long.
    """

    def __init__(self, folder: Path, name: str, *, num_rows: int, rows_per_part: int) -> None:
        """Plans the files; nothing is opened or written.

        Args:
            folder: Of the files.
            name: What their names begin with.
            num_rows: In all of them.
            rows_per_part: The last file may have fewer.
        """
        super().__init__(num_rows=num_rows, rows_per_part=rows_per_part)
        self.folder, self.name = folder, name
        self._forget()

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_mapped": {}, "_handed_out": 0}  # each process maps for itself

    def write(self, number: int, fields: Mapping[str, Sequence[Tensor]]) -> None:
        """Writes a file.

        Raises:
            OSError: It could not be written, on a full disk for example.
        """
        tensors: dict[str, Tensor] = {}
        for name, rows in fields.items():
            tensors[name] = torch.cat(list(rows)).cpu().contiguous()
            tensors[f"{name}.ends"] = torch.tensor([len(row) for row in rows]).cumsum(0)
        with replacing(self._path(number), (SafetensorError,)) as temporary:
            save_file(tensors, temporary)

    def read(self, field: str, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yields one field of some rows, mapped from the file: copy what is kept for longer."""
        for values in super().read(field, rows):
            self._handed_out += values.nbytes
            yield values

    def _is_written(self, number: int) -> bool:
        return self._path(number).exists()

    def _part(self, number: int, field: str) -> tuple[Tensor, list[int]]:
        if self._handed_out > _MOST_MAPPED:
            self._forget()
        if (number, field) not in self._mapped:
            file: Any = safe_open(self._path(number), framework="pt")
            self._mapped[number, field] = file.get_tensor(field), file.get_tensor(f"{field}.ends").tolist()
        return self._mapped[number, field]

    def _forget(self) -> None:
        self._mapped: dict[tuple[int, str], tuple[Tensor, list[int]]] = {}
        self._handed_out = 0

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.safetensors"


def claim_rows(folder: Path, content: Mapping[str, Any]) -> None:
    """Notes what the files of a folder are computed from, or checks that they were computed from the same.

    Args:
        folder: Made if it is not there.
        content: As JSON would give it back.

    Raises:
        ValueError: They were not; what differs is named.
    """
    path = folder / CONTENT
    if not path.exists():
        write_json(path, content)
        return
    remove_leftovers(folder)
    changed = list(differences(read_json(path), content))
    if changed:
        raise ValueError(
            f"{folder} was computed with other values of {', '.join(changed)}; put them back as they were, or remove "
            "the folder to compute it anew"
        )
