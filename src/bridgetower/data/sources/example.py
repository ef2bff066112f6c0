"""What sources are read into: examples of images and texts, and where the bytes of an image are."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

from bridgetower.data.sources.fetch import PATIENT, Patience, open_location, read_bytes, version_of

NAMED = 10  # problems spelt out in an error or a report

_LARGEST_GROUP = 2**31  # bytes of a row group of a Parquet file
_AT_ONCE = 16  # rows


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image of a source: a file of its own, a member of a tar archive, a cell of a table or a frame of a video."""

    name: str  # identifies it within its source; a file's path from the folder of the source on
    location: str  # path or URL of the file that it is in
    piece: tuple[int, int] | None = None  # where in that file it starts, and its length in bytes
    cell: tuple[str, int] | None = None  # its column and row in a Parquet or Arrow file
    # start and end in seconds of the part of a video whose middle frame it is
    moment: tuple[float, float] | None = None
    version: str = ""  # what changes when the file does, where the listing tells
    # its bytes, where they were read with the source
    content: bytes | None = field(default=None, repr=False, compare=False)
    is_inline: bool = False  # whether it is base64 in a text, so that only `content` has its bytes

    @property
    def is_file(self) -> bool:
        return not (self.piece or self.cell or self.moment or self.is_inline)

    def read(self, patience: Patience = PATIENT) -> bytes:
        if self.content is not None:
            return self.content
        if self.moment:
            from bridgetower.data.sources.video import frame_of

            return frame_of(self.location, sum(self.moment) / 2, self.name)
        if self.cell:
            column, row = self.cell
            content = cell_bytes(
                open_columns(self.location, version_of(self.location)).value(column, row)
            )
            if content is None:
                raise ValueError(f"{self.location}, row {row + 1} has no image in column {column}")
            return content
        return read_bytes(self.location, self.piece, patience=patience)

    def located(self) -> str:
        """Returns where it is within its file as JSON; empty of a file of its own."""
        within = {"piece": self.piece, "cell": self.cell, "moment": self.moment}
        return (
            ""
            if self.is_file
            else json.dumps({name: location for name, location in within.items() if location})
        )


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row of a source: images, texts, or both."""

    id: str  # from the source, or the name of its image, or that of its file with the number of its row
    images: tuple[Image, ...] = ()  # none, one or several
    texts: tuple[str, ...] = ()  # captions, stripped, none empty
    fields: Mapping[str, Any] = field(default_factory=dict)  # all other cells of its row, by column
    split: str = ""  # that the source gives it; empty if it gives none
    origin: str = ""  # file and line, for errors
    problem: str = ""  # why it cannot be used; empty if it can


class ColumnFile:
    """A Parquet or Arrow file; the group of rows that a cell was read of last is kept."""

    def __init__(self, location: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._kept: tuple[int, str, Any] = (-1, "", None)
        self._parquet: Any = None
        try:
            if location.partition("?")[0].lower().endswith(".parquet"):
                self._parquet = pq.ParquetFile(open_location(location), pre_buffer=False)
                groups = [
                    self._parquet.metadata.row_group(number)
                    for number in range(self._parquet.num_row_groups)
                ]
                if (
                    largest := max((group.total_byte_size for group in groups), default=0)
                ) > _LARGEST_GROUP:
                    raise ValueError(
                        f"{location} has a row group of {largest} bytes; "
                        f"write it with groups of at most {_LARGEST_GROUP}"
                    )
                self.schema, sizes = (
                    self._parquet.schema_arrow,
                    [group.num_rows for group in groups],
                )
            else:
                file = open_location(location)
                is_stream = file.read(6) != b"ARROW1"  # as `datasets` writes it
                file.close()
                source = open_location(location) if "://" in location else pa.memory_map(location)
                opened = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(source)
                batches = (
                    opened if is_stream else map(opened.get_batch, range(opened.num_record_batches))
                )
                self._batches = list(batches)
                for batch in self._batches:
                    batch.validate(full=True)
                self.schema, sizes = opened.schema, [batch.num_rows for batch in self._batches]
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and not str(error).startswith(
                "Invalid"
            ):  # as pyarrow raises it, too
                raise
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{location} is no Parquet or Arrow file ({reason}); copy it again"
            ) from error
        self._ends = [0, *accumulate(sizes)]

    def batches(self, columns: list[str] | None = None) -> Iterator[Any]:
        if self._parquet is not None:
            yield from self._parquet.iter_batches(_AT_ONCE, columns=columns)
        else:
            for batch in self._batches:
                chosen = batch if columns is None else batch.select(columns)
                yield from (
                    chosen.slice(start, _AT_ONCE) for start in range(0, batch.num_rows, _AT_ONCE)
                )

    def value(self, column: str, row: int) -> Any:
        number = bisect_right(self._ends, row) - 1
        if column not in self.schema.names or number == len(self._ends) - 1:
            raise ValueError(
                f"there is no row {row + 1} with a column {column}; make the index again"
            )
        if self._kept[:2] != (number, column):
            group = (
                self._batches[number]
                if self._parquet is None
                else self._parquet.read_row_group(number, [column])
            )
            self._kept = number, column, group[column]
        return self._kept[2][row - self._ends[number]].as_py()


@lru_cache(maxsize=4)
def open_columns(location: str, version: str) -> ColumnFile:
    return ColumnFile(location)


def cell_bytes(value: object) -> bytes | None:
    """Returns the image in a cell, plain or beside a path as `datasets` writes it; None if there is none."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None


def check_bad(
    source: object,
    problems: Sequence[str],
    max_errors: int,
    others: str = "",
    *,
    has_good: bool = True,
) -> None:
    """Raises a ValueError if more than allowed could not be used; `others` says what became of the rest."""
    if len(problems) > max_errors:
        shown = " | ".join(problems[:NAMED])
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        bad = f"{len(problems)} bad item{'s' if len(problems) > 1 else ''}"
        allowed = (
            f", allowed are {max_errors} (max_errors=N allows more)"
            if has_good
            else " and no good one"
        )
        kept = f"; {others}" if others else ""
        raise ValueError(f"{source}: {bad}{allowed}{kept}: {shown}{more}")
