"""All image vectors of an index in one array beside the table, which an exact search multiplies with the query."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bridgetower.files import NotWrittenError, replacing

MIN_ROWS = 10_000
"""Of a table that gets an array; a smaller one is searched as quickly without."""

MAX_BYTES = 2**34
"""Of an array: a larger one would hardly stay in memory."""

_NAME = "_exact/vectors-{}.npy"


class ExactVectors:
    """The vectors of one version of a table, in the order of its rows, of length one."""

    def __init__(self, folder: Path) -> None:
        """Opens nothing yet; `folder` is that of the table."""
        self._folder = folder
        self._opened: tuple[tuple[int, ...], np.ndarray] | None = None

    def of(self, version: int) -> np.ndarray | None:
        """Returns the array of a version, memory-mapped; None if there is none."""
        path = self._folder / _NAME.format(version)
        try:
            status = path.stat()
            key = version, status.st_ino, status.st_mtime_ns  # a table that is made anew has the same versions
            if self._opened is None or self._opened[0] != key:
                self._opened = key, np.load(path, mmap_mode="r")
        except (OSError, ValueError):  # not there, or damaged
            self._opened = None
        return None if self._opened is None else self._opened[1]

    def write(self, version: int, count: int, width: int, parts: Iterable[np.ndarray]) -> None:
        """Writes the array of a version of so many rows and removes others; none where that is not allowed."""
        for path in self._folder.glob(_NAME.format("*")):
            if path.name != Path(_NAME.format(version)).name:
                path.unlink(missing_ok=True)
        if self.of(version) is not None or not count >= MIN_ROWS or count * width * 4 > MAX_BYTES:
            return
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        try:
            with replacing(self._folder / _NAME.format(version)) as temporary, temporary.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    file.write(np.ascontiguousarray(part / np.linalg.norm(part, axis=1, keepdims=True), "<f4").data)
        except NotWrittenError:
            return


def largest_products(vectors: np.ndarray, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of [n, c] whose product with a query [c] is largest, that first, and the products."""
    products = vectors @ query
    rows = np.argpartition(products, -min(count, len(products)))[-count:]
    rows = rows[np.argsort(-products[rows], kind="stable")]
    return rows, products[rows]
