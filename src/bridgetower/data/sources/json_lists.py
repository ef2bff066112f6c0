"""Lists in large JSON files, read an item at a time."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder
from typing import Any, BinaryIO

LARGEST_ITEM = 2**24  # characters of an item of a list

_MARK = re.compile(r"[^ \t\r\n]")
_BUFFER = 2**22  # bytes that are read at once


class JsonLists:
    """A JSON file, read by the scanner of the standard library, which limits nesting."""

    def __init__(self, file: BinaryIO, name: object) -> None:
        self._text = codecs.getreader("utf-8-sig")(file)
        self._name = name
        self._scan = JSONDecoder().raw_decode
        self._buffer = ""
        self._position = 0  # in the buffer

    def items(self, key: str | None = None) -> Iterator[Any]:
        """Yields the items of a list: the whole file, or the list under a key, or without a key the only list.

        Raises:
            ValueError: The file is not valid JSON, or has no such list, or several.
        """
        num_lists = 0
        try:
            if self._peek() == "[":
                num_lists = 1
                yield from self._items()
            else:
                for _ in self._members("{", "}"):
                    name = self._value()
                    self._take(":")
                    if key in (None, name) and self._peek() == "[":
                        num_lists += 1
                        yield from self._items()
                    else:
                        self._value()
            if self._peek():
                raise ValueError("something follows it")
        except RecursionError as error:
            raise ValueError(
                f"{self._name} is not valid JSON (it is nested too deep); copy it again"
            ) from error
        except ValueError as error:  # of JSON, of UTF-8 or of too many digits
            reason = getattr(error, "msg", error)
            raise ValueError(f"{self._name} is not valid JSON ({reason}); copy it again") from error
        if num_lists != 1:
            lists = f"no {key} list" if key else f"{num_lists} lists of rows"
            raise ValueError(
                f"{self._name} has {lists}; check that it is the right file, or write JSON lines"
            )

    def _items(self) -> Iterator[Any]:
        for _ in self._members("[", "]"):
            yield self._value()

    def _members(self, start: str, end: str) -> Iterator[None]:
        """Goes to each member of a list or an object in turn, and over the bracket at the end."""
        self._take(start)
        mark = self._take(end) if self._peek() == end else ","
        while mark == ",":
            yield
            mark = self._take("," + end)

    def _peek(self) -> str:
        """Goes over white space and returns the next character, or an empty text at the end."""
        while not (match := _MARK.search(self._buffer, self._position)):
            self._position = len(self._buffer)
            if not self._read():
                return ""
        self._position = match.start()
        return match[0]

    def _take(self, marks: str) -> str:
        """Goes over the next character, which has to be one of some."""
        mark = self._peek()
        if not mark or mark not in marks:
            raise ValueError(f"{mark!r} where one of {marks} is expected")
        self._position += 1
        return mark

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._scan(self._buffer, self._position)
            except JSONDecodeError:
                if not self._read():
                    raise
                continue
            # A number may go on in what is read next: 1 as 15, as 1.5 or as 1e+5.
            length = end - self._position
            is_whole = len(self._buffer) - end > len("e+")
            if is_whole or not self._read():
                self._position += length
                return value

    def _read(self) -> bool:
        """Reads on, and returns whether the file has not ended."""
        text = self._text.read(_BUFFER)
        self._buffer = self._buffer[self._position :] + text
        self._position = 0
        if len(self._buffer) > LARGEST_ITEM:
            raise ValueError(f"a value has more than {LARGEST_ITEM} characters")
        return bool(text)
