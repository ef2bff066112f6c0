"""Where an index is and what it points to: local folders and object stores."""

from __future__ import annotations

import os
from pathlib import Path

Uri = str | os.PathLike[str]

_SUFFIX = ".lance"
_BESIDE = "./"  # begins paths that are relative to the folder that the index is in


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


def is_local(uri: Uri) -> bool:
    """Whether an index is a folder and not in an object store."""
    return "://" not in str(uri)


def portable(uri: Uri, path: Uri) -> str:
    """A path within the folder that a local index is in is kept relative, so that both can be moved together."""
    absolute = Path(path).resolve()
    beside = Path(uri).resolve().parent if is_local(uri) else None
    if beside is None or not absolute.is_relative_to(beside):
        return str(absolute)
    return _BESIDE + os.path.relpath(absolute, beside)


def is_path(path: str) -> bool:
    """Whether what `portable` returned is a path, and not the hub id that was kept instead of one."""
    return path.startswith(_BESIDE) or Path(path).is_absolute()


def resolved(uri: Uri, path: str) -> str:
    """Undoes `portable`; absolute paths and hub ids stay."""
    return str(Path(uri).parent / path) if path.startswith(_BESIDE) else path
