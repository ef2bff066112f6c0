"""Lance tables whose rows are written in commits, read by number, and compared with checksums."""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bridgetower.data.sources.fetch import is_url
from bridgetower.files import NO_ROOM, escaped, remove_folder

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

Uri = str | os.PathLike[str]  # of a local folder, or of one in an object store
CRC = "crc"  # column with the CRC-32 of the checked column, as Lance has no checksums

_STORE_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_", "HF_")  # settings of object stores
_SUFFIX = ".lance"
_CUT_OFF = "its last file was cut off; make room on the disk, and run the same command again"
_CHECKED = b"bridgetower.checked"  # metadata of a schema that names the checked column
# In an error of LanceDB, the answer of a store.
_STATUS = re.compile(r"\bStatus \{ status: (\d{3})")
# Replacements in LanceDB's messages: lines of its sources, kinds of errors, types as Rust writes them.
_INTERNALS = (
    (r",? ?\S*/\S+\.rs:\d+(?::\d+)?", ""),
    (
        r"\b(?:Invalid input, |lance error: |LanceError\(\w+\): |(?:Arrow|Schema|Parser) error: )",
        "",
    ),
    (r"\. Valid fields are .*", ""),
    (r"\b(?:Large)?Utf8\b", "String"),
    (r"\b(List|Timestamp|Struct|Duration)\((?:[^()]|\([^()]*\))*\)", r"\1"),
)


class Table:
    """A Lance table at one version, by default the newest."""

    def __init__(self, uri: Uri, *, version: int | None = None) -> None:
        self.uri = str(uri)
        folder, name = split_uri(self.uri)
        # Connecting would create the folder around the table.
        if not is_url(self.uri) and not Path(self.uri).is_dir():
            raise FileNotFoundError(f"no table {self.uri}")
        with _one_line_errors(self.uri, "read"):
            try:
                self.lance: Any = _connect(folder).open_table(name)
            except ValueError as error:
                if "not found" not in str(error):
                    raise
                raise FileNotFoundError(f"no table {self.uri}") from error
            if version is not None:
                self.lance.checkout(version)
        self._crcs: np.ndarray | None = None

    @classmethod
    def create(cls, uri: Uri, schema: pa.Schema, *, checked: str, replace: bool = False) -> Table:
        """Creates an empty table, with a column for the CRC-32 of the checked column."""
        import pyarrow as pa

        folder, name = split_uri(str(uri))
        schema = schema.append(pa.field(CRC, pa.uint32()))
        schema = schema.with_metadata({**(schema.metadata or {}), _CHECKED: checked.encode()})
        mode: Literal["overwrite", "create"] = "overwrite" if replace else "create"
        with _one_line_errors(str(uri), "written"):
            _connect(folder).create_table(name, schema=schema, mode=mode)
        return cls(uri)

    @staticmethod
    def exists(uri: Uri) -> bool:
        try:
            Table(uri)
        except FileNotFoundError:
            return False
        return True

    def __len__(self) -> int:
        with _one_line_errors(self.uri, "read"):
            return int(self.lance.count_rows())

    def __getstate__(self) -> dict[str, Any]:
        environment = {
            name: value for name, value in os.environ.items() if name.startswith(_STORE_VARIABLES)
        }
        return {"uri": self.uri, "version": self.version, "environment": environment}

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.environ.update(state["environment"])  # a fork server has an older one
        self.__init__(state["uri"], version=state["version"])  # type: ignore[misc]

    @property
    def version(self) -> int:
        with _one_line_errors(self.uri, "read"):
            return int(self.lance.version)

    @property
    def schema(self) -> pa.Schema:
        return self.lance.schema

    @cached_property
    def checked(self) -> str:
        """Name of the column with CRCs, empty in a table of another program."""
        return (self.schema.metadata or {}).get(_CHECKED, b"").decode()

    def append(self, rows: pa.Table) -> None:
        """Adds rows and their CRCs in one commit."""
        import pyarrow as pa

        rows = rows.append_column(CRC, pa.array(crcs_of(rows[self.checked]), pa.uint32()))
        with _one_line_errors(self.uri, "written"):
            self.lance.add(rows.select(self.schema.names).cast(self.schema))
        self._crcs = None
        self.check_end()

    def check_end(self) -> None:
        """Raises an OSError if the last row cannot be read.

        Lance commits files that a full disk has cut off.
        """
        if is_url(self.uri) or not len(self):
            return
        try:
            self.take([len(self) - 1], [CRC])
        except OSError as error:
            raise OSError(f"{self.uri} cannot be written: {_CUT_OFF}") from error

    def compact(self, min_age: timedelta = timedelta(milliseconds=1)) -> None:  # 0 would warn
        """Joins small files, and removes older versions once the joined files can be read."""
        try:
            with _one_line_errors(self.uri, "written"):
                self.lance.optimize(cleanup_older_than=timedelta(days=36500))
        finally:
            if not Table(self.uri)._has_whole_files():
                raise OSError(f"{self.uri} cannot be written: {_CUT_OFF}")
        with _one_line_errors(self.uri, "written"):
            self.lance.optimize(cleanup_older_than=min_age)

    def recover(self) -> None:
        """Restores the newest version whose files are all whole, so that cut-off rows can be written again."""
        if is_url(self.uri) or not self.checked or self._has_whole_files():
            return
        with _one_line_errors(self.uri, "read"):
            versions = [int(entry["version"]) for entry in self.lance.list_versions()]
            for version in sorted(versions, reverse=True):
                self.lance.checkout(version)
                if self._has_whole_files():
                    self.lance.restore()
                    self._crcs = None
                    logger.warning("%s: its last rows were cut off; they are made again", self.uri)
                    return
            self.lance.checkout_latest()

    def _has_whole_files(self) -> bool:
        try:
            for _ in self.scan([CRC]):
                pass
        except OSError:
            return False
        return True

    def take(self, numbers: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Returns columns of rows in the order of their numbers, which may repeat.

        Raises:
            OSError: There is no such row, or the checked column of a row is damaged.
        """
        rows, order = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
        with _one_line_errors(self.uri, "read"):
            table = self.lance.take_offsets(rows.tolist()).select(list(columns)).to_arrow()
        if len(table) != len(rows):
            raise OSError(f"{self.uri} has no row {rows[-1]}; it has {len(self)}")
        if self.checked in columns:
            is_damaged = crcs_of(table[self.checked]) != self.crcs()[rows]
            self._refuse_damaged(rows[is_damaged])
        return table.take(order)

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yields columns of all rows in batches, like `take`."""
        for batch, damaged in self._batches(columns):
            self._refuse_damaged(damaged)
            yield batch

    def _refuse_damaged(self, rows: np.ndarray) -> None:
        if len(rows):
            raise OSError(f"row {rows[0]} of {self.uri} is damaged; make or copy the table again")

    def damaged(self) -> list[int]:
        """Returns the numbers of the rows whose checked column is not as it was written."""
        return [row for _, damaged in self._batches([self.checked]) for row in damaged.tolist()]

    def _batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        """Yields columns of all rows, with the numbers of the rows whose checked column is damaged."""
        checked = self.checked
        names = [*columns, CRC] if checked in columns else list(columns)
        start = 0
        with _one_line_errors(self.uri, "read"):
            for batch in self.lance.search().select(names).to_batches():
                damaged = np.empty(0, np.int64)
                if checked in columns:
                    is_damaged = crcs_of(batch[checked]) != batch[CRC].to_numpy()
                    damaged = np.flatnonzero(is_damaged) + start
                yield batch.select(list(columns)), damaged
                start += len(batch)

    def column(self, name: str) -> np.ndarray:
        """Returns a column of all rows."""
        values = [batch[name].to_numpy(zero_copy_only=False) for batch in self.scan([name])]
        return np.concatenate(values) if values else np.empty(0, np.int64)

    def writing(self) -> AbstractContextManager[None]:
        """Names the table in errors of writing through `lance`."""
        return _one_line_errors(self.uri, "written")

    def drop(self) -> None:
        if is_url(self.uri):
            folder, name = split_uri(self.uri)
            _connect(folder).drop_table(name)
        else:
            remove_folder(Path(self.uri))

    def crcs(self) -> np.ndarray:
        if self._crcs is None:
            self._crcs = self.column(CRC)
        return self._crcs


def _connect(folder: str) -> Any:
    os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings are about its own doing
    import lancedb  # late, because it starts a thread that forked workers would lack

    # s3fs accepts this variable without a further option.
    is_http = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    options = {"allow_http": "true"} if is_http else None
    try:
        return lancedb.connect(folder, storage_options=options)
    except ValueError as error:
        # A store that answers has the right address.
        if _STATUS.search(str(error)):
            raise
        raise ValueError(
            f"{folder} cannot hold a table ({message_of(error)}); give a local folder, or s3://, gs:// or az://"
        ) from error


def crcs_of(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Returns the CRC-32 of each value of a column: bytes or texts, 0 for null, or vectors, none of them null."""
    import pyarrow as pa

    crcs: list[int] = []
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if pa.types.is_fixed_size_list(chunk.type):
            values = chunk.flatten().to_numpy().reshape(len(chunk), -1)
            crcs += [zlib.crc32(np.ascontiguousarray(row).data) for row in values]
        else:
            crcs += [
                zlib.crc32(value.as_buffer()) if value.is_valid else 0
                for value in chunk.cast(pa.large_binary())
            ]
    return np.array(crcs, np.uint32)


def split_uri(uri: str) -> tuple[str, str]:
    """Returns the folder that a table is in, and its name without the suffix."""
    if escaped(uri) != uri:
        raise ValueError(f"{uri!r} is not UTF-8; choose another folder")
    parent, _, name = uri.rstrip("/").rpartition("/")
    stem = name.removesuffix(_SUFFIX)
    if stem == name or not stem.strip(".") or not re.fullmatch(r"[\w.-]+", stem, re.ASCII):
        raise ValueError(
            f"{uri!r} is no name for a table; expected letters, digits, '_', '-' and '.', and the ending "
            f"{_SUFFIX}, such as photos{_SUFFIX}"
        )
    return parent or ("/" if uri.startswith("/") else "."), stem


@contextmanager
def _one_line_errors(uri: str, action: Literal["read", "written"]) -> Iterator[None]:
    """Turns LanceDB's errors into OSErrors of one line that name the table."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        kinds = (RuntimeError, OSError, ValueError) if action == "read" else (RuntimeError, OSError)
        # Damaged files make LanceDB panic.
        if not isinstance(error, kinds) and type(error).__name__ != "RustPanic":
            raise
        raise OSError(f"{uri} cannot be {action}: {message_of(error)}") from error


def message_of(error: Exception) -> str:
    """Returns LanceDB's message in one line, without lines of its sources, and advice for a full disk."""
    message = str(error).partition("\n")[0]
    if status := _STATUS.search(message):
        detail = re.search(r"<Message>([^<]*)</Message>", message)
        return f"the store answers {status[1]}" + (f": {detail[1]}" if detail else "")
    for pattern, replacement in _INTERNALS:
        message = re.sub(pattern, replacement, message)
    is_full = any(f"(os error {number})" in str(error) for number in NO_ROOM)
    return message[:500] + ("; make room on the disk" if is_full else "")
