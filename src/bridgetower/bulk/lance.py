"""Lance tables: their names, and one as the place where vectors go."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa

from bridgetower.bulk.config import Quantize
from bridgetower.bulk.outputs import Entry, Parquet
from bridgetower.data.remote import is_url
from bridgetower.files import remove_folder

Uri = str | os.PathLike[str]
"""Where a table is: a local folder, or one in an object store."""

_SUFFIX = ".lance"


def split(uri: Uri) -> tuple[str, str]:
    """Database and table of an index: the folder that it is in, and its name without suffix."""
    parent, _, name = str(uri).rstrip("/").rpartition("/")
    stem = name.removesuffix(_SUFFIX)
    if stem in ("", name) or not all(letter.isalnum() or letter in "_-." for letter in stem) or not stem.isascii():
        raise ValueError(
            f"{str(uri)!r} is no name for an index; expected one of letters, digits, '_', '-' and '.' that ends in "
            f"{_SUFFIX}, such as photos{_SUFFIX}"
        )
    return parent or ("/" if str(uri).startswith("/") else "."), stem


class LanceTable(Parquet):
    """A Lance table with the columns `id`, `text`, `vector` and `block`: a commit for each block of the source."""

    def __init__(self, out: Uri, plan: Mapping[str, Any], *, quantize: Quantize | None) -> None:
        """Opens nothing yet.

        Raises:
            ValueError: The name is none for a table.
        """
        super().__init__(str(out), plan, quantize=quantize)
        self._place, self._name = split(out)
        if is_url(out):
            self.work = Path(f"{self._name}{_SUFFIX}.parts")
            self.plan["out"] = str(out)  # tables of the same name in other stores have the same folder of parts
        self._table: Any = None

    def open(self, *, begun: bool) -> None:
        """Reads the records of an earlier run and opens its table.

        Raises:
            FileExistsError: There is a table, but not of this run.
        """
        super().open(begun=begun)
        self._table = _opened(self._place, self._name)
        if self._table is None:
            return
        if not begun:
            remove_folder(self.work)
            raise FileExistsError(f"{self._place}/{self._name}{_SUFFIX} exists; choose another name or remove it")
        self._forget_unrecorded()

    def write_part(self, name: str, entries: Sequence[Entry]) -> None:
        """Commits the vectors of a block."""
        if self._table is not None and name in self.records:  # with other items
            self._table.delete(f"block = '{name}'")
        if not entries:
            return
        rows = self.table(entries).append_column("block", pa.array([name] * len(entries)))
        if self._table is None:
            self._table = lancedb.connect(self._place).create_table(self._name, rows)
        else:
            self._table.add(rows)

    def join(self, parts: Sequence[Path]) -> None:
        """Takes out blocks that the source has no more, and brings the commits together."""
        if self._table is None:
            place = f"{self._place}/{self._name}{_SUFFIX}"
            raise ValueError(f"{place} would have no vectors: nothing of the source could be used")
        self._forget_unrecorded()
        self._table.optimize()

    def _forget_unrecorded(self) -> None:
        """Deletes what a run wrote that was killed before it noted it."""
        written = self._table.search().select(["block"]).to_arrow()["block"].unique().to_pylist()
        for name in sorted(set(written) - self.records.keys()):
            self._table.delete(f"block = '{name}'")


def _opened(place: str, name: str) -> Any:
    """Returns a table; None if there is none."""
    if not is_url(place) and not Path(place).is_dir():
        return None  # connecting would make the folder around it
    try:
        return lancedb.connect(place).open_table(name)
    except ValueError as error:
        if "not found" in str(error):
            return None
        raise
