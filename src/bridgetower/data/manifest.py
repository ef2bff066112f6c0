"""The manifest of a source, made before any image is opened: kept on the disk, so that memory does not grow with it."""

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

from bridgetower.data.folder import ordered_splits
from bridgetower.data.images import ImageRef
from bridgetower.data.schema import Schema, packed
from bridgetower.files import escaped, unfit_name

MAX_NAMED_ERRORS = 10
"""Bad entries that are spelt out in an error."""

_CACHE_KIB = 32 * 1024
_LOOKUP_KIB = 16 * 1024
_MAX_NAMED = 1000  # left-out things spelt out in `dataset.json`, per reason

_TABLES = """
    CREATE TABLE images (number INTEGER PRIMARY KEY, image_id TEXT, split TEXT, place TEXT, packed TEXT,
        signatures TEXT, UNIQUE (image_id, split));
    CREATE TABLE texts (image INTEGER, text TEXT);
    CREATE TABLE seen (key TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE bad (message TEXT);
    CREATE TABLE left_out (reason TEXT, name TEXT);
    BEGIN;
"""
_INDEXES = """
    CREATE INDEX texts_of ON texts (image);
    INSERT INTO bad SELECT place || ': no file ' || json_extract(packed, '$[0]') FROM images WHERE signatures = '';
    DELETE FROM images WHERE signatures = '' OR number NOT IN (SELECT image FROM texts);
    CREATE INDEX images_of ON images (split);
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An image, or a pair of them, with all its texts.

    Attributes:
        image_id: Unique within the split.
        images: One, or two in nlvr2.
        signatures: What changes when an image does.
        texts: Its entries, of the schema's type.
    """

    image_id: str
    images: tuple[ImageRef, ...]
    signatures: str
    texts: tuple[Any, ...]

    @property
    def digest(self) -> str:
        """Changes when an image or a text does."""
        names = [image.name for image in self.images]
        return repr((self.image_id, names, self.signatures, self.texts))


class Manifest:
    """The images of a source with their texts, brought together by image, in order of first appearance.

    They lie in a temporary database that the operating system removes with the process; `SQLITE_TMPDIR` names its
    folder.

    Attributes:
        schema: What the rows of the set are to hold.
        files: Content of further JSON files of the set, by name, such as the vocabulary of questions.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.files: dict[str, Any] = {}
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA cache_size = -{_CACHE_KIB};{_TABLES}")

    def close(self) -> None:
        """Removes the database."""
        self._database.close()

    def add(
        self, image_id: str, images: Sequence[ImageRef], texts: Sequence[Any], *, split: str = "", place: str = ""
    ) -> None:
        """Adds texts about an image; further ones about the same are added to them.

        What cannot be used is counted as bad: texts that do not fit the schema, and images without a name in UTF-8.

        Args:
            image_id: Unique within the split.
            images: One, or two in nlvr2; missing ones are counted as bad.
            texts: None are allowed, as more may follow.
            split: Empty if splits are to be assigned.
            place: Where it is in the source, for error messages; empty stands for the id.
        """
        place = place or image_id
        unfit = [problem for name in (image_id, *(image.name for image in images)) if (problem := unfit_name(name))]
        if unfit or not image_id:
            self.bad(f"{place}: {unfit[0] if unfit else 'the image has no name'}")
            return
        key = (image_id, split)
        found = self._database.execute("SELECT number FROM images WHERE image_id = ? AND split = ?", key).fetchone()
        number = found[0] if found else self._add_image(key, images, place)
        for text in texts:
            problem = self.schema.problem_of(text)
            if problem:
                self.bad(f"{place}: {problem}")
            else:
                self._database.execute("INSERT INTO texts VALUES (?, ?)", (number, packed(text)))

    def _add_image(self, key: tuple[str, str], images: Sequence[ImageRef], place: str) -> int:
        signatures = [image.file_signature for image in images]
        missing = [image.name for image, signature in zip(images, signatures, strict=True) if signature is None]
        packed = [", ".join(map(repr, missing))] if missing else [image.packed() for image in images]
        values = (*key, escaped(place), json.dumps(packed), "" if missing else json.dumps(signatures))
        added = self._database.execute(
            "INSERT INTO images (image_id, split, place, packed, signatures) VALUES (?, ?, ?, ?, ?)", values
        )
        assert added.lastrowid is not None
        return added.lastrowid

    def splits_of(self, image_id: str) -> list[str]:
        """The splits that an image was added to."""
        rows = self._database.execute("SELECT split FROM images WHERE image_id = ?", [escaped(image_id)])
        return [split for (split,) in rows]

    def is_new(self, key: str) -> bool:
        """Whether this is asked of a key for the first time."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", [escaped(key)]).rowcount == 1

    def bad(self, message: str) -> None:
        """Counts something that cannot be used."""
        self._database.execute("INSERT INTO bad VALUES (?)", [escaped(message)])

    def leave_out(self, reason: str, name: str) -> None:
        """Notes what is not taken although it could be used."""
        self._database.execute("INSERT INTO left_out VALUES (?, ?)", [reason, escaped(name)])

    def filled_captions(self, name: str, captions: Iterable[str]) -> list[str]:
        """Returns captions without spaces at their ends; empty ones are noted as left out.

        Args:
            name: Of their image.
            captions: As the files have them.
        """
        stripped = [caption.strip() for caption in captions]
        if not all(stripped):
            self.leave_out("empty caption", name)
        return [caption for caption in stripped if caption]

    def finish(self) -> None:
        """Ends the adding: missing images become bad, those without any text are dropped."""
        self._database.executescript(_INDEXES)

    def assign(self, rank: Callable[[str], bytes], counts: Mapping[str, int]) -> None:
        """Gives the images splits: those of lowest rank the first split, and so on.

        Args:
            rank: Of an image_id.
            counts: Number of images of each split, in order; together all.
        """
        self._database.create_function("rank_of", 1, rank, deterministic=True)
        order = "rank_of(image_id), image_id"
        self._database.execute(f"CREATE TEMP TABLE ranked AS SELECT number FROM images ORDER BY {order}")
        start = 0
        for split, count in counts.items():
            chosen = "SELECT number FROM ranked WHERE rowid > ? AND rowid <= ?"
            self._database.execute(
                f"UPDATE images SET split = ? WHERE number IN ({chosen})", [split, start, start + count]
            )
            start += count
        self._database.execute("DROP TABLE ranked")

    def check_errors(self, source: Path, max_errors: int) -> None:
        """Checks that not too much cannot be used.

        Raises:
            ValueError: Else; the first are named.
        """
        count = self._database.execute("SELECT count(*) FROM bad").fetchone()[0]
        check_errors(source, self.errors(MAX_NAMED_ERRORS), max_errors, count=count)

    def errors(self, limit: int = -1) -> list[str]:
        """What cannot be used: all of it, or the first."""
        return [message for (message,) in self._database.execute("SELECT message FROM bad LIMIT ?", [limit])]

    def left_out(self) -> dict[str, list[str]]:
        """Names of what is not taken, by reason; of many the first."""
        reasons = "SELECT reason FROM left_out GROUP BY reason ORDER BY min(rowid)"
        chosen = "SELECT name FROM left_out WHERE reason = ? LIMIT ?"
        return {
            reason: [name for (name,) in self._database.execute(chosen, [reason, _MAX_NAMED])]
            for (reason,) in self._database.execute(reasons).fetchall()
        }

    def num_left_out(self) -> dict[str, int]:
        """Number of things that are not taken, of reasons of which `left_out` does not name all."""
        counted = "SELECT reason, count(*) AS number FROM left_out GROUP BY reason HAVING number > ?"
        return dict(self._database.execute(counted, [_MAX_NAMED]).fetchall())

    def counts(self) -> dict[str, int]:
        """Number of images in each split."""
        counts = dict(self._database.execute("SELECT split, count(*) FROM images GROUP BY split").fetchall())
        return {split: counts[split] for split in ordered_splits(counts)}

    def entries(self, split: str, start: int = 0, count: int = -1) -> Iterator[Entry]:
        """Reads the images of a split in their order.

        Args:
            split: Its name.
            start: Number of the first image.
            count: Most images; -1 for all.
        """
        chosen = "SELECT * FROM images WHERE split = ? ORDER BY number LIMIT ? OFFSET ?"
        rows = self._database.execute(
            f"SELECT p.number, p.image_id, p.packed, p.signatures, t.text FROM ({chosen}) p JOIN texts t"
            " ON t.image = p.number ORDER BY p.number, t.rowid",
            [split, count, start],
        )
        for _, group in groupby(rows, key=itemgetter(0)):
            members = list(group)
            _, image_id, packed, signatures, _ = members[0]
            yield Entry(
                image_id=image_id,
                images=tuple(map(ImageRef.unpacked, json.loads(packed))),
                signatures=signatures,
                texts=tuple(self.schema.unpacked(text) for *_, text in members),
            )


def check_errors(source: Path | str, messages: Sequence[str], max_errors: int, *, count: int | None = None) -> None:
    """Checks that not too much cannot be used.

    Args:
        source: Where it is from.
        messages: All that is bad, or the first of it.
        max_errors: How much may be.
        count: How much there is; None for as many as messages.

    Raises:
        ValueError: There is more.
    """
    count = len(messages) if count is None else count
    if count > max_errors:
        what = "entry or image" if count == 1 else "entries or images"
        more = f" and {count - MAX_NAMED_ERRORS} more" if count > MAX_NAMED_ERRORS else ""
        raise ValueError(
            f"{source} has {count} bad {what}, allowed are {max_errors} (max_errors): "
            f"{' | '.join(messages[:MAX_NAMED_ERRORS])}{more}"
        )


@contextmanager
def new_manifest(schema: Schema) -> Iterator[Manifest]:
    """Yields an empty manifest, which is removed afterwards.

    Raises:
        OSError: If there is no room for it.
    """
    manifest = Manifest(schema)
    try:
        yield manifest
    except sqlite3.OperationalError as error:
        raise OSError(f"no room for the list of images ({error}); name a larger folder in SQLITE_TMPDIR") from error
    finally:
        manifest.close()


class Lookup:
    """JSON values by key in a temporary database, so that memory does not grow with their number.

    `SQLITE_TMPDIR` names its folder.
    """

    def __enter__(self) -> "Lookup":
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(
            f"PRAGMA journal_mode = OFF; PRAGMA cache_size = -{_LOOKUP_KIB};"
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
