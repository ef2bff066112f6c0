"""Files of data sets that are read as their authors publish them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bridgetower.files import sha256_of


def existing_files(folder: Path, names: Sequence[str], what: str) -> list[Path]:
    """Returns files of a folder.

    Args:
        folder: Where they are expected.
        names: Of the files.
        what: What the user has to give, for the error.

    Raises:
        FileNotFoundError: One is missing.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"no {', '.join(missing)} in {folder}; give the folder of {what}")
    return [folder / name for name in names]


def digests_of(paths: Iterable[Path]) -> dict[str, str]:
    """Returns the SHA-256 of files, by path."""
    return {str(path): sha256_of(path) for path in paths}
