"""Folders of files that can be made again: shared by processes, and removed by age where they take too much room."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bridgetower.files import json_text, locked, remove_leftovers, replacing, require_space, write_bytes

logger = logging.getLogger(__name__)

CONTENT = "content.json"
"""Describes what a folder holds; it is as old as the last use of the folder."""

_DIGEST = "[0-9a-f]" * 16  # the name of a folder
_KEPT_LAST = (CONTENT, ".lock")


class DiskCache:
    """Folders that are each named by a digest of what decides their content.

    A process locks a folder, shared with others to read it, or alone to write it. Killed, it lets go of it. What it
    wrote is used, as files are whole or not there.
    """

    def __init__(self, folder: Path, limit: int, what: str) -> None:
        """Names the place; nothing is opened or written.

        Args:
            folder: Of the folders. It may be moved or removed while no process uses it.
            limit: Bytes up to which folders that no process has locked are kept.
            what: They hold, for messages.
        """
        self.folder, self.limit, self.what = folder, limit, what

    def place(self, content: Mapping[str, Any]) -> Path:
        """Returns the folder of some content, which is all that decides it, as JSON has it."""
        return self.folder / hashlib.sha256(_described(content)).hexdigest()[:16]

    def begin(self, folder: Path, content: Mapping[str, Any], needed: int) -> None:
        """Makes a folder ready to be written by this process, which has locked it alone.

        Args:
            folder: Of the content.
            content: What decides it.
            needed: Bytes that will be written.

        Raises:
            OSError: The disk has no room for them, even without the folders that no process has locked.
        """
        remove_leftovers(folder)
        write_bytes(folder / CONTENT, _described(content))
        self._make_room(needed)

    def note_use(self, folder: Path) -> None:
        """Makes a folder, which this process has locked, the last one to be removed."""
        os.utime(folder / CONTENT)

    @contextmanager
    def file(self, content: Mapping[str, Any], needed: int, make: Callable[[Path], None]) -> Iterator[Path]:
        """Gives the only file of a folder; while it is given, no process removes it. A mapping of it stays valid.

        Args:
            content: What decides the file.
            needed: Bytes that it takes.
            make: Writes it to a path, if it is not there; other processes wait meanwhile.

        Raises:
            OSError: The disk has no room for it.
        """
        folder = self.place(content)
        path = folder / "file"
        while True:
            with locked(folder, shared=True, wait=True):
                if path.is_file():
                    self.note_use(folder)
                    yield path
                    return
            with locked(folder, wait=True):
                if not path.is_file():
                    self.begin(folder, content, needed)
                    with replacing(path) as temporary:
                        make(temporary)

    def _make_room(self, needed: int) -> None:
        """Removes folders that nobody has locked, the longest unused first, until limit and disk allow for more."""
        with locked(self.folder, wait=True):
            found = [path.parent for path in self.folder.glob(f"{_DIGEST}/{CONTENT}")]
            sizes = {folder: _size_of(folder) for folder in found}
            for folder in sorted(found, key=lambda folder: (folder / CONTENT).stat().st_mtime):
                if sum(sizes.values()) + needed <= self.limit and needed <= shutil.disk_usage(self.folder).free:
                    break
                with suppress(FileExistsError), locked(folder):
                    _remove(folder)
                    del sizes[folder]
            require_space(self.folder, needed, self.what)
        if sum(sizes.values()) + needed > self.limit:
            logger.warning("the %s that runs hold take more than the limit of %.1f GiB", self.what, self.limit / 2**30)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in _KEPT_LAST:  # so that a folder that holds something can be found by its content
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder)


def _size_of(folder: Path) -> int:
    """Bytes of the files below a folder, which others may rename or remove meanwhile."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name not in _KEPT_LAST:
                with suppress(FileNotFoundError):
                    size += Path(parent, name).stat().st_size
    return size


def _described(content: Mapping[str, Any]) -> bytes:
    return json_text(content, indent=2).encode()
