"""What a source says, before any picture is opened: kept on the disk, so that memory does not grow with the set."""

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from bridgetower.data.kinds import Kind, Question, Statement, problem_of
from bridgetower.data.locations import Picture, unpacked
from bridgetower.data.splits import ordered_splits
from bridgetower.files import escaped, unfit_name

Text = str | Question | Statement

MAX_NAMED_BAD = 10
"""Bad entries that are spelt out in an error."""

_CACHE_KIB = 32 * 1024
_MAX_NAMED = 1000  # left-out things spelt out in `dataset.json`, per reason

_TABLES = """
    CREATE TABLE pictures (number INTEGER PRIMARY KEY, image_id TEXT, split TEXT, place TEXT, packed TEXT, stamps TEXT,
        UNIQUE (image_id, split));
    CREATE TABLE texts (picture INTEGER, text TEXT);
    CREATE TABLE seen (key TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE bad (message TEXT);
    CREATE TABLE left_out (reason TEXT, name TEXT);
    BEGIN;
"""
_INDEXES = """
    CREATE INDEX texts_of ON texts (picture);
    INSERT INTO bad SELECT place || ': no file ' || json_extract(packed, '$[0]') FROM pictures WHERE stamps = '';
    DELETE FROM pictures WHERE stamps = '' OR number NOT IN (SELECT picture FROM texts);
    CREATE INDEX pictures_of ON pictures (split);
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture, or a pair of them, with all its texts.

    Attributes:
        image_id: Unique within the split.
        pictures: One, or two in nlvr2.
        stamps: What changes when a picture does.
        texts: What is said about it.
    """

    image_id: str
    pictures: tuple[Picture, ...]
    stamps: str
    texts: tuple[Text, ...]

    @property
    def digest(self) -> str:
        """Changes when a picture or a text does."""
        names = [picture.name for picture in self.pictures]
        return repr((self.image_id, names, self.stamps, self.texts))


class Listing:
    """The pictures of a source with their texts, brought together by picture, in order of first appearance.

    They lie in a temporary database that the operating system removes with the process; `SQLITE_TMPDIR` names its
    folder.

    Attributes:
        kind: What the rows of the set are to hold.
        vocabulary: Answers that a classifier chooses from, in a set that has its own.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.vocabulary: Sequence[str] = ()
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA cache_size = -{_CACHE_KIB};{_TABLES}")

    def close(self) -> None:
        """Forgets everything."""
        self._database.close()

    def add(
        self, image_id: str, pictures: Sequence[Picture], texts: Sequence[Text], *, split: str = "", place: str = ""
    ) -> None:
        """Adds texts about a picture; further ones about the same are added to them.

        What cannot be used is counted as bad: texts, as `problem_of` says, and pictures that have no name, or one that
        is not UTF-8.

        Args:
            image_id: Unique within the split.
            pictures: One, or two in nlvr2; missing ones are counted as bad.
            texts: None are allowed, as more may follow.
            split: Empty if splits are to be assigned.
            place: Where the source says so, for error messages; empty stands for the id.
        """
        place = place or image_id
        unfit = [
            problem for name in (image_id, *(picture.name for picture in pictures)) if (problem := unfit_name(name))
        ]
        if unfit or not image_id:
            self.bad(f"{place}: {unfit[0] if unfit else 'the picture has no name'}")
            return
        key = (image_id, split)
        found = self._database.execute("SELECT number FROM pictures WHERE image_id = ? AND split = ?", key).fetchone()
        number = found[0] if found else self._add_picture(key, pictures, place)
        for text in texts:
            problem = problem_of(text)
            if problem:
                self.bad(f"{place}: {problem}")
            else:
                content = json.dumps(text if isinstance(text, str) else vars(text))
                self._database.execute("INSERT INTO texts VALUES (?, ?)", (number, content))

    def _add_picture(self, key: tuple[str, str], pictures: Sequence[Picture], place: str) -> int:
        stamps = [picture.stamp for picture in pictures]
        missing = [picture.name for picture, stamp in zip(pictures, stamps, strict=True) if stamp is None]
        packed = [", ".join(map(repr, missing))] if missing else [picture.packed() for picture in pictures]
        values = (*key, escaped(place), json.dumps(packed), "" if missing else json.dumps(stamps))
        added = self._database.execute(
            "INSERT INTO pictures (image_id, split, place, packed, stamps) VALUES (?, ?, ?, ?, ?)", values
        )
        assert added.lastrowid is not None
        return added.lastrowid

    def splits_of(self, image_id: str) -> list[str]:
        """The splits that a picture was added to."""
        rows = self._database.execute("SELECT split FROM pictures WHERE image_id = ?", [escaped(image_id)])
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

    def finish(self) -> None:
        """Ends the adding: missing pictures become bad, those without any text are dropped."""
        self._database.executescript(_INDEXES)

    def assign(self, rank: Callable[[str], bytes], counts: Mapping[str, int]) -> None:
        """Gives the pictures splits: those of lowest rank the first split, and so on.

        Args:
            rank: Of an image_id.
            counts: Number of pictures of each split, in order; together all.
        """
        self._database.create_function("rank_of", 1, rank, deterministic=True)
        order = "rank_of(image_id), image_id"
        self._database.execute(f"CREATE TEMP TABLE ranked AS SELECT number FROM pictures ORDER BY {order}")
        start = 0
        for split, count in counts.items():
            chosen = "SELECT number FROM ranked WHERE rowid > ? AND rowid <= ?"
            self._database.execute(
                f"UPDATE pictures SET split = ? WHERE number IN ({chosen})", [split, start, start + count]
            )
            start += count
        self._database.execute("DROP TABLE ranked")

    def check_bad(self, source: Path, max_bad: int) -> None:
        """Checks that not too much cannot be used.

        Raises:
            ValueError: Else; the first are named.
        """
        count = self._database.execute("SELECT count(*) FROM bad").fetchone()[0]
        check_bad(source, self.bad_messages(MAX_NAMED_BAD), max_bad, count=count)

    def bad_messages(self, limit: int = -1) -> list[str]:
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
        """Number of pictures in each split."""
        counts = dict(self._database.execute("SELECT split, count(*) FROM pictures GROUP BY split").fetchall())
        return {split: counts[split] for split in ordered_splits(counts)}

    def entries(self, split: str, start: int = 0, count: int = -1) -> Iterator[Entry]:
        """Reads the pictures of a split in their order.

        Args:
            split: Its name.
            start: Number of the first picture.
            count: Most pictures; -1 for all.
        """
        chosen = "SELECT * FROM pictures WHERE split = ? ORDER BY number LIMIT ? OFFSET ?"
        rows = self._database.execute(
            f"SELECT p.number, p.image_id, p.packed, p.stamps, t.text FROM ({chosen}) p JOIN texts t"
            " ON t.picture = p.number ORDER BY p.number, t.rowid",
            [split, count, start],
        )
        for _, group in groupby(rows, key=itemgetter(0)):
            members = list(group)
            _, image_id, packed, stamps, _ = members[0]
            yield Entry(
                image_id=image_id,
                pictures=tuple(map(unpacked, json.loads(packed))),
                stamps=stamps,
                texts=tuple(self._text(json.loads(text)) for *_, text in members),
            )

    def _text(self, content: Any) -> Text:
        if self.kind == "captions":
            return str(content)
        if self.kind == "vqa":
            return Question(**{**content, "answers": tuple(content["answers"])})
        return Statement(**content)


def check_bad(source: Path, messages: Sequence[str], max_bad: int, *, count: int | None = None) -> None:
    """Checks that not too much cannot be used.

    Args:
        source: Where it is from.
        messages: All that is bad, or the first of it.
        max_bad: How much may be.
        count: How much there is; None for as many as messages.

    Raises:
        ValueError: There is more.
    """
    count = len(messages) if count is None else count
    if count > max_bad:
        what = "entry or picture" if count == 1 else "entries or pictures"
        more = f" and {count - MAX_NAMED_BAD} more" if count > MAX_NAMED_BAD else ""
        raise ValueError(
            f"{source} has {count} bad {what}, allowed are {max_bad} (max_bad): "
            f"{' | '.join(messages[:MAX_NAMED_BAD])}{more}"
        )


@contextmanager
def new_listing(kind: Kind) -> Iterator[Listing]:
    """Lends an empty listing.

    Raises:
        OSError: If there is no room for it.
    """
    listing = Listing(kind)
    try:
        yield listing
    except sqlite3.OperationalError as error:
        raise OSError(f"no room for the list of pictures ({error}); name a larger folder in SQLITE_TMPDIR") from error
    finally:
        listing.close()
