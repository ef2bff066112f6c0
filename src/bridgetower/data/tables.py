"""Rows of Parquet files from elsewhere, with pictures left where they are."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bridgetower.data.locations import CellPicture, cell_bytes, group_column, opened_table
from bridgetower.files import unfit_name

MAX_GROUP_BYTES = 2**26
"""Largest row group that is read to get one of its pictures."""

_DIGEST_LETTERS = 32

logger = logging.getLogger(__name__)


def parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Reads the rows of a Parquet file; pictures become `CellPicture`, pictures that are only a path that path.

    A file whose row groups are large is copied to the cache of `datasets` first, and the copy stays there: no single
    picture of it could be read without the memory for a group.

    Raises:
        ValueError: If it is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if problem := unfit_name(str(path)):
        raise ValueError(problem)
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({error}); write it again") from error
    groups = range(file.metadata.num_row_groups)
    if any(file.metadata.row_group(group).total_byte_size > MAX_GROUP_BYTES for group in groups):
        yield from _copied_rows(path)
        return
    for group in groups:
        columns = {name: group_column(path, name, group) for name in file.schema_arrow.names}
        for number in range(file.metadata.row_group(group).num_rows):
            cells = {name: values[number].as_py() for name, values in columns.items()}
            yield {name: _cell(path, name, group, number, value) for name, value in cells.items()}


def _copied_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import datasets

    cache = datasets.config.HF_DATASETS_CACHE
    logger.info("%s is copied to %s unless it already was; HF_DATASETS_CACHE names another place", path, cache)
    for number, row in enumerate(opened_table(path)):
        yield {name: _cell(path, name, None, number, value) for name, value in row.items()}


def _cell(path: Path, column: str, group: int | None, row: int, value: object) -> object:
    """Replaces picture bytes by where they are, and a picture that is only a path by the path."""
    content, file = cell_bytes(value), _cell_path(value)
    if content is None:
        return value if file is None else file
    digest = hashlib.sha256(content).hexdigest()[:_DIGEST_LETTERS]
    name = Path(file).name if file else digest
    return CellPicture(table=path, column=column, group=group, row=row, name=digest, file_name=name)


def _cell_path(value: object) -> str | None:
    path = value.get("path") if isinstance(value, dict) else None
    return path if isinstance(path, str) else None
