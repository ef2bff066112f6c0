"""Rows of Arrow IPC files, with the bytes of pictures left where they are."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridgetower.data.locations import SpanPicture
from bridgetower.files import unfit_name

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 1000  # that are read at once, without their pictures


def arrow_rows(
    path: Path, images: Sequence[str], columns: Sequence[str], lists: Sequence[str] = ()
) -> Iterator[Mapping[str, Any]]:
    """Reads the rows of a file; pictures become `SpanPicture`, or None where there is none.

    Args:
        path: An uncompressed file in Arrow's IPC file format.
        images: Columns of picture bytes.
        columns: Other columns to read.
        lists: Those of them that hold a list in each row.

    Raises:
        ValueError: If it is no such file, a column is missing, or one holds something else.
    """
    import pyarrow as pa

    if problem := unfit_name(str(path)):
        raise ValueError(problem)
    try:
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()
            reader = pa.ipc.open_file(content)
            missing = [name for name in (*images, *columns) if name not in reader.schema.names]
            if missing:
                raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(reader.schema.names)}")
            flat = [name for name in lists if not _holds_lists(reader.schema.field(name).type)]
            if flat:
                types = ", ".join(str(reader.schema.field(name).type) for name in flat)
                raise ValueError(f"{path} has {types} in column {', '.join(flat)}; expected a list in each row")
            for number in range(reader.num_record_batches):
                yield from _batch_rows(path, content, reader.get_batch(number), images, columns)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path} is no Arrow IPC file ({error}); copy it again, or write it in the file format"
        ) from error


def _holds_lists(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return any(check(kind) for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _batch_rows(
    path: Path, content: "pa.Buffer", batch: "pa.RecordBatch", images: Sequence[str], columns: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
    texts = batch.select(list(columns))
    pictures = {name: _Spans(path, content, batch.column(name)) for name in images}
    for start in range(0, batch.num_rows, _ROWS):
        for place, row in enumerate(texts.slice(start, _ROWS).to_pylist(), start=start):
            yield {**row, **{name: spans.picture(place) for name, spans in pictures.items()}}


class _Spans:
    """Where the values of a binary column lie in the file that it was mapped from."""

    def __init__(self, path: Path, content: "pa.Buffer", column: "pa.Array") -> None:
        import pyarrow as pa

        if not pa.types.is_binary(column.type) and not pa.types.is_large_binary(column.type):
            raise ValueError(f"{path} has pictures of type {column.type}; expected bytes")
        width = pa.int64() if pa.types.is_large_binary(column.type) else pa.int32()
        _, offsets, values = column.buffers()
        self._path, self._column = path, column
        self._offsets = pa.Array.from_buffers(width, len(column) + column.offset + 1, [None, offsets])
        self._start = values.address - content.address if values else 0
        if not 0 <= self._start <= content.size:
            raise ValueError(f"{path} is compressed; write it again without compression")

    def picture(self, row: int) -> SpanPicture | None:
        if not self._column[row].is_valid:
            return None
        begin, end = (self._offsets[row + self._column.offset + step].as_py() for step in (0, 1))
        return SpanPicture(file=self._path, member=f"row {row}", offset=self._start + begin, size=end - begin)
