"""Lance tables: their names, and one as the place where vectors go."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa

from bridgetower.bulk.config import Quantize
from bridgetower.bulk.lance_errors import writing
from bridgetower.bulk.outputs import Entry, Parquet
from bridgetower.data.remote import is_url
from bridgetower.files import parse_json, remove_folder, unfit_name

Uri = str | os.PathLike[str]
"""Where a table is: a local folder, or one in an object store."""

_SUFFIX = ".lance"


def split(uri: Uri) -> tuple[str, str]:
    """Database and table of an index: the folder that it is in, and its name without suffix."""
    if problem := unfit_name(str(uri)):
        raise ValueError(problem)
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
        self._uri, self._there = str(out), set[str]()
        self._table: Any = None

    def open(self, *, begun: bool) -> None:
        """Reads the records of an earlier run and opens its table; a run that was through is done again.

        Raises:
            FileExistsError: There is a table, but not of this run.
        """
        super().open(begun=begun)
        with writing(self._uri):
            self._table = _opened(self._place, self._name)
            if self._table is not None:
                plan = (self._table.schema.metadata or {}).get(b"bridgetower", b"null")
                if not begun and parse_json(plan, f"what {self._uri} is of") != self.plan:
                    remove_folder(self.work)
                    raise FileExistsError(f"{self._uri} exists; choose another name or remove it")
                self._there = set(self._table.search().select(["block"]).to_arrow()["block"].to_pylist())
        # The table may have been removed since blocks of it were noted.
        self.records = {name: one for name, one in self.records.items() if name in self._there or not one.vectors}
        if begun:
            self._forget(self._there - self.records.keys())

    def write_part(self, name: str, entries: Sequence[Entry]) -> None:
        """Commits the vectors of a block."""
        self._forget(self._there & {name})  # with other items
        if not entries:
            return
        rows = self.table(entries).append_column("block", pa.array([name] * len(entries)))
        with self._writing():
            if self._table is None:
                self._table = lancedb.connect(self._place).create_table(self._name, rows)
            else:
                self._table.add(rows)
        self._there.add(name)

    def join(self, parts: Sequence[Path]) -> None:
        """Takes out blocks that the source has no more, and brings the commits together."""
        self._forget(self._there - self.records.keys())
        with self._writing():
            self._table.optimize()

    def _forget(self, names: Collection[str]) -> None:
        """Deletes blocks."""
        for name in sorted(names):
            with self._writing():
                self._table.delete(f"block = '{name}'")
        self._there.difference_update(names)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Names the table where it cannot be written; where it is gone, writing it would leave a damaged one."""
        if self._table is not None and not is_url(self._uri) and not Path(self._uri).is_dir():
            raise FileNotFoundError(f"{self._uri} was removed while it was written; run the same command again")
        with writing(self._uri):
            yield


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
