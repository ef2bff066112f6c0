"""Values by key that are kept on the disk."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from bridgetower.files import escaped

_CACHE_KIB = 16 * 1024


class Lookup:
    """JSON values by key in a temporary database, so that memory does not grow with their number.

    `SQLITE_TMPDIR` names its folder.
    """

    def __enter__(self) -> Lookup:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(
            f"PRAGMA journal_mode = OFF; PRAGMA cache_size = -{_CACHE_KIB};"
            "CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT, taken INTEGER DEFAULT 0); BEGIN;"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def __setitem__(self, key: str, value: Any) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO entries (key, value) VALUES (?, ?)", [escaped(key), json.dumps(value)]
        )

    def get(self, key: str) -> Any:
        """The value of a key; None if there is none."""
        found = self._database.execute("SELECT value FROM entries WHERE key = ?", [escaped(key)]).fetchone()
        return json.loads(found[0]) if found else None

    def take(self, key: str) -> Any:
        """The value of a key, which then counts as taken; None if there is none."""
        self._database.execute("UPDATE entries SET taken = 1 WHERE key = ?", [escaped(key)])
        return self.get(key)

    def untaken(self) -> Iterator[str]:
        """The keys that were never taken, in the order in which they were set."""
        return (key for (key,) in self._database.execute("SELECT key FROM entries WHERE NOT taken ORDER BY rowid"))
