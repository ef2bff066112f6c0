"""Lists in large JSON files, read an item at a time."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder
from typing import Any, BinaryIO

LARGEST_ITEM = 2**24  # characters of an item of a list in a JSON file

_MARK = re.compile(r"[^ \t\r\n]")
_BUFFER = 2**22  # bytes that are read at once


class JsonLists:
    """A JSON file, read an item of a list at a time by the scanner of the standard library, which limits nesting."""

    _scan = JSONDecoder().raw_decode

    def __init__(self, file: BinaryIO, name: object) -> None:
        self._text, self._name, self._buffer, self._at = (
            codecs.getreader("utf-8-sig")(file),
            name,
            "",
            0,
        )

    def items(self, key: str | None = None) -> Iterator[Any]:
        """Yields the items of the list that the file is or has under a key; without a key it may have only one."""
        num_lists = 0
        try:
            if self._next() == "[":
                num_lists += 1
                yield from self._list()
            else:
                self._taken("{")
                for _ in self._members("}"):
                    name, _ = self._value(), self._taken(":")
                    if key in (None, name) and self._next() == "[":
                        num_lists += 1
                        yield from self._list()
                    else:
                        self._value()
            if self._next():
                raise ValueError("something follows it")
        except (ValueError, RecursionError) as error:  # of JSON, of UTF-8 or of too many digits
            reason = (
                "it is nested too deep"
                if isinstance(error, RecursionError)
                else getattr(error, "msg", error)
            )
            raise ValueError(f"{self._name} is not valid JSON ({reason}); copy it again") from error
        if num_lists != 1:
            what = f"no {key} list" if key else f"{num_lists} lists of rows"
            raise ValueError(
                f"{self._name} has {what}; check that it is the right file, or write JSON lines"
            )

    def _list(self) -> Iterator[Any]:
        self._taken("[")
        for _ in self._members("]"):
            yield self._value()

    def _members(self, end: str) -> Iterator[None]:
        """Goes from one to the next up to the mark at the end."""
        mark = self._taken(end) if self._next() == end else ""
        while mark != end:
            yield
            mark = self._taken("," + end)

    def _next(self) -> str:
        """Goes over white space and returns what follows; empty at the end."""
        while not (found := _MARK.search(self._buffer, self._at)):
            self._at = len(self._buffer)
            if not self._more():
                return ""
        self._at = found.start()
        return found[0]

    def _taken(self, marks: str) -> str:
        mark = self._next()
        if not mark or mark not in marks:
            raise ValueError(f"{mark!r} where one of {marks} is expected")
        self._at += 1
        return mark

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._scan(self._buffer, self._at)
            except JSONDecodeError:
                if not self._more():
                    raise
                continue
            length = end - self._at
            # A number may go on in the next part: 1 as 15, as 1.5 or as 1e+5.
            is_whole = len(self._buffer) - end > len("e+")
            if is_whole or not self._more():
                self._at += length
                return value

    def _more(self) -> bool:
        part = self._text.read(_BUFFER)
        self._buffer, self._at = self._buffer[self._at :] + part, 0
        if len(self._buffer) > LARGEST_ITEM:
            raise ValueError(f"a value has more than {LARGEST_ITEM} characters")
        return bool(part)
