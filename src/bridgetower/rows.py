"""Rows of tensors in memory-mapped files, written once and in parts, so that writing can go on later."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridgetower.disk_cache import DiskCache
from bridgetower.files import locked, replacing

logger = logging.getLogger(__name__)

FILE_BYTES = 2**26
"""About the size of one file."""

_MOST_MAPPED = 2**28  # bytes that were read, after which files are mapped anew: until then they count as memory


class RowFiles:
    """Numbered rows in files, one file for each part, which is written whole or not at all.

    Each row has one tensor per field, whose first axis may differ from row to row. It is read from the mapping of its
    file, so that only what is read takes memory, and not for long.

    Attributes:
        vectors: What a reader made of a row and keeps in memory, for its own use.
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
        self.vectors: dict[int, Tensor] = {}
        self._forget()

    def __len__(self) -> int:
        return self.num_rows

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"vectors": {}, "_mapped": {}, "_handed_out": 0}  # each process maps for itself

    def missing(self) -> list[int]:
        """Returns the numbers of the parts that are not written yet."""
        num_parts = -(-self.num_rows // self.rows_per_part)
        return [number for number in range(num_parts) if not self._path(number).is_file()]

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
        """Yields one field of some rows, mapped from the file: copy what is kept for longer.

        Raises:
            ValueError: A file is damaged.
        """
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
            path = self._path(number)
            try:
                file: Any = safe_open(path, framework="pt")
                self._mapped[number, field] = file.get_tensor(field), file.get_tensor(f"{field}.ends").tolist()
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); remove it, and it is computed again") from error
        return self._mapped[number, field]

    def _forget(self) -> None:
        self._mapped: dict[tuple[int, str], tuple[Tensor, list[int]]] = {}
        self._handed_out = 0

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.safetensors"


class RowCache(DiskCache):
    """Folders of row files that runs share.

    A run holds the folders that it reads until it ends, and alone the one that it writes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Names the place; nothing is opened or written.

        Args:
            folder: Of the folders. It may be moved or removed while no run uses it.
            limit: Bytes up to which folders that no run holds are kept.
        """
        super().__init__(folder, limit, "features of frozen towers")
        self._held: dict[Path, ExitStack] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in list(self._held):
            self._let_go(path)

    def files(self, content: Mapping[str, Any], num_rows: int, row_bytes: int) -> RowFiles:
        """Plans the files of rows that are computed from some content.

        Args:
            content: All that decides them, as JSON has it.
            num_rows: In all files.
            row_bytes: About the size of a row.
        """
        rows_per_part = max(1, FILE_BYTES // row_bytes)
        return RowFiles(self.place(content), "rows", num_rows=num_rows, rows_per_part=rows_per_part)

    def claim(self, files: RowFiles, content: Mapping[str, Any], row_bytes: int) -> list[int]:
        """Holds the folder of some files, and returns the parts that are to be written before it is claimed again.

        Args:
            files: From `files`, with the same content and size of a row.
            content: What they are computed from.
            row_bytes: About the size of a row.

        Returns:
            Numbers of parts; none if all are there, and nobody removes them until the run ends.

        Raises:
            OSError: The disk has no room for them, even without the folders that no run holds.
        """
        folder = files.folder
        self._hold(folder, shared=True)
        if not files.missing():
            self.note_use(folder)
            return []
        self._hold(folder, shared=False)
        missing = files.missing()
        if not missing:  # another run wrote them meanwhile
            return self.claim(files, content, row_bytes)
        self.begin(folder, content, row_bytes * sum(len(files.rows_of(number)) for number in missing))
        return missing

    def _hold(self, folder: Path, *, shared: bool) -> None:
        self._let_go(folder)
        held = ExitStack()
        try:
            held.enter_context(locked(folder, shared=shared))
        except FileExistsError:
            logger.info("another run computes the features in %s; waiting for it", folder)
            held.enter_context(locked(folder, shared=shared, wait=True))
        self._held[folder] = held

    def _let_go(self, folder: Path) -> None:
        if folder in self._held:
            self._held.pop(folder).close()
