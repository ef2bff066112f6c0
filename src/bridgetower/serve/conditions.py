"""Conditions in SQL that strangers may send: comparisons of columns, and nothing that could be made to take long."""

from __future__ import annotations

import re

from bridgetower.search.table import ABOUT

MAX_CHARACTERS = 500

_WORDS = frozenset(
    {*ABOUT, "and", "or", "not", "in", "like", "between", "is", "null", "true", "false", "timestamp", "array_has"}
)
_TOKEN = re.compile(
    r"\s+|(?P<string>'(?:[^']|'')*')|(?P<number>\d+(?:\.\d+)?)|(?P<word>[A-Za-z_]\w*)|<=|>=|<>|!=|[=<>(),+*/%-]",
    re.ASCII,
)


def check_condition(condition: str) -> None:
    """Checks that a condition is made of columns, literals and comparisons alone; functions could fill the memory.

    Raises:
        ValueError: It is not.
    """
    if len(condition) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(condition)} characters, the limit is {MAX_CHARACTERS}")
    place = 0
    while place < len(condition):
        token = _TOKEN.match(condition, place)
        if token is None:
            raise ValueError(f"{condition[place]!r} at character {place} is not allowed")
        word = token["word"]
        if word is not None and word.lower() not in _WORDS:
            raise ValueError(f"{word!r} is not allowed; columns are {', '.join(ABOUT)}, functions only array_has")
        place = token.end()
