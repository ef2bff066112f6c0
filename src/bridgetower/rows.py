"""Rows of tensors in memory-mapped files, written once and in parts, so that writing can go on later."""

from __future__ import annotations

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
"""Describes what the files of a folder were computed from."""

_MOST_MAPPED = 2**28  # bytes that were read, after which files are mapped anew: until then they count as memory


class RowFiles:
    """Numbered rows in files, one file for each part, which is written whole or not at all.

    Each row has one tensor per field, whose first axis may differ from row to row. It is read from the mapping of its
    file, so that only what is read takes memory, and not for long.
    """

    def __init__(self, folder: Path, name: str, *, num_rows: int, rows_per_part: int) -> None:
        """Plans the files; nothing is opened or written.

        Args:
            folder: Of the files.
            name: What their names begin with.
            num_rows: In all of them.
            rows_per_part: The last file may have fewer.
        """
        self.folder, self.name, self.num_rows, self.rows_per_part = folder, name, num_rows, rows_per_part
        self._forget()

    def __len__(self) -> int:
        return self.num_rows

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_mapped": {}, "_handed_out": 0}  # each process maps for itself

    def missing(self) -> list[int]:
        """Returns the numbers of the parts that are not written yet."""
        num_parts = -(-self.num_rows // self.rows_per_part)
        return [number for number in range(num_parts) if not self._path(number).exists()]

    def rows_of(self, number: int) -> range:
        """Returns the rows of a part."""
        return range(number * self.rows_per_part, min((number + 1) * self.rows_per_part, self.num_rows))

    def write(self, number: int, fields: Mapping[str, Sequence[Tensor]]) -> None:
        """Writes a part.

        Args:
            number: Of the part.
            fields: The tensors of all its rows by field; those of one field have the same dtype, and the same shape
                beyond the first axis.

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
        for row in rows:
            values, ends = self._part(row // self.rows_per_part, field)
            place = row % self.rows_per_part
            found = values[ends[place - 1] if place else 0 : ends[place]]
            self._handed_out += found.nbytes
            yield found

    def _part(self, number: int, field: str) -> tuple[Tensor, list[int]]:
        """Returns the rows of a part, one after the other, and where each of them ends."""
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
