"""Where an index is: its table is opened, and held while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb

from bridgetower.bulk.lance import Uri, split
from bridgetower.bulk.lance_errors import message_of
from bridgetower.data.remote import is_url
from bridgetower.files import locked

_SEEN_WITHIN = timedelta(seconds=1)  # after which a reader notices what another process wrote


def write_lock(uri: Uri) -> AbstractContextManager[None]:
    """Holds an index for this process while it is written, where it is a local folder.

    Raises:
        FileExistsError: Another process holds it.
    """
    return nullcontext() if is_url(uri) else locked(Path(uri))


def opened_table(uri: Uri, storage_options: Mapping[str, str] | None) -> Any:
    """Returns the table of an index; None if there is none.

    Raises:
        ValueError: The name is none for an index, or there is something else.
    """
    place, name = split(uri)
    if not is_url(uri) and not Path(uri).is_dir():
        return None  # connecting would make the folder around it
    try:
        return connect(place, storage_options).open_table(name)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, ValueError) and "not found" in str(error):
            return None
        raise ValueError(f"{uri} cannot be opened as an index: {message_of(error)}") from error


def connect(place: str, storage_options: Mapping[str, str] | None) -> Any:
    """Connects to the folder that an index is in."""
    options = dict(storage_options) if storage_options else None
    return lancedb.connect(place, read_consistency_interval=_SEEN_WITHIN, storage_options=options)
