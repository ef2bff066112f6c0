"""LanceDB's errors in words for a user: one line, without places in its sources."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Of LanceDB's messages: places in its sources, kinds of errors, how Rust writes types, and columns of vectors.
_INTERNALS = (
    (r",? ?\S*/\S+\.rs:\d+(?::\d+)?", ""),
    (
        r"\b(?:Invalid input, |lance error: |LanceError\(\w+\): |(?:Arrow|Schema|Parser) error: )",
        "",
    ),
    (r"\. Valid fields are .*", ""),
    (r"\b(List|Timestamp|Struct|Duration)\((?:[^()]|\([^()]*\))*\)", r"\1"),
    (r"\b(?:Large)?Utf8\b", "String"),
)


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turns errors of reading into OSError: of a damaged file, or of another table where the index was."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise OSError(f"{uri} cannot be read: {message_of(error)}; make the index again") from error


@contextmanager
def condition(where: str, columns: Iterable[str]) -> Iterator[None]:
    """Turns LanceDB's errors of a condition on some columns into ValueError."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"where is {where!r}: {message_of(error)}; columns are {', '.join(columns)}") from error


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """Turns LanceDB's errors of writing, of a full disk for example, into OSError.

    Whatever happens, the table stays as it was before the change.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        advice = "; make room on the disk" if f"(os error {errno.ENOSPC})" in str(error) else ""
        raise OSError(f"{uri} cannot be written: {message_of(error)}{advice}") from error


def message_of(error: Exception) -> str:
    """LanceDB's message in one line, without places in its sources and without the columns of vectors."""
    message = str(error).partition("\n")[0]
    if status := re.search(r"\bStatus \{ status: (\d{3})", message):
        said = re.search(r"<Message>([^<]*)</Message>", message)
        return f"the store answers {status[1]}" + (f": {said[1]}" if said else "")
    for pattern, replacement in _INTERNALS:
        message = re.sub(pattern, replacement, message)
    return message
