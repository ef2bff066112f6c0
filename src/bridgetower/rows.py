"""Rows of tensors in memory-mapped files, written once, file by file, so that writing can go on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridgetower.files import replacing

FILE_BYTES = 2**26
"""About the size of one file."""

_MOST_MAPPED = 2**28  # bytes that were read, after which files are mapped anew: until then they count as memory


class RowFiles:
    """Numbered rows, each with one tensor per field; the first axis of a field may differ from row to row.

    Files are written whole or not at all. A row is read from the mapping of its file, so that only what is read takes
    memory, and not for long.
    """

    def __init__(self, folder: Path, name: str, *, num_rows: int, rows_per_file: int) -> None:
        """Plans the files; nothing is opened or written.

        Args:
            folder: Of the files.
            name: What their names begin with.
            num_rows: In all of them.
            rows_per_file: The last file may have fewer.
        """
        self.folder, self.name, self.num_rows, self.rows_per_file = folder, name, num_rows, rows_per_file
        self._forget()

    def __len__(self) -> int:
        return self.num_rows

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_mapped": {}, "_handed_out": 0}  # each process maps for itself

    def missing(self) -> list[int]:
        """Returns the numbers of the files that are not written yet."""
        return [number for number in range(-(-self.num_rows // self.rows_per_file)) if not self._path(number).exists()]

    def rows_of(self, number: int) -> range:
        """Returns the rows of a file."""
        return range(number * self.rows_per_file, min((number + 1) * self.rows_per_file, self.num_rows))

    def write(self, number: int, fields: Mapping[str, Sequence[Tensor]]) -> None:
        """Writes a file.

        Args:
            number: Of the file.
            fields: The tensors of all its rows by field; those of one field have the same dtype, and the same shape
                beyond the first axis.

        Raises:
            OSError: It could not be written, on a full disk for example.
        """
        tensors: dict[str, Tensor] = {}
        for name, rows in fields.items():
            tensors[name] = torch.cat(list(rows)).cpu().contiguous()
            tensors[f"{name}.ends"] = torch.tensor([len(row) for row in rows]).cumsum(0)
        path = self._path(number)
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary)
            except SafetensorError as error:  # it hides the system's error
                raise OSError(f"{path} could not be written ({error}); make room on the disk") from error

    def read(self, field: str, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yields one field of some rows, mapped from the file: copy what is kept for longer."""
        for row in rows:
            values, ends = self._open(row // self.rows_per_file, field)
            place = row % self.rows_per_file
            found = values[ends[place - 1] if place else 0 : ends[place]]
            self._handed_out += found.nbytes
            yield found

    def _open(self, number: int, field: str) -> tuple[Tensor, list[int]]:
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
