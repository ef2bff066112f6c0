"""Conditions in SQL from clients: comparisons of columns, and nothing that could take long."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

from bridgetower.search.table import ABOUT

MAX_CHARACTERS = 500

_DEPTH = 20  # of parentheses and signs within each other
_KEYWORDS = frozenset(
    {"and", "or", "not", "in", "like", "between", "is", "null", "true", "false", "timestamp", "array_has"}
)
_LITERALS = frozenset({"null", "true", "false"})
_COMPARISONS = frozenset({"=", "<", ">", "<=", ">=", "<>", "!="})
_END = "the end"
_TIME = re.compile(r"'\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)?)?'", re.ASCII)
_TOKEN = re.compile(
    r"\s*(?:(?P<token>'(?:[^']|'')*'|\d+(?:\.\d+)?(?![\w.])|[A-Za-z_]\w*|<=|>=|<>|!=|[=<>(),+*/%-])|(?P<end>\Z)|(?P<bad>.))",
    re.ASCII,
)


def parsed_condition(condition: str) -> str:
    """Reads a condition that is made of columns, literals and comparisons alone; functions could fill the memory.

    Returns:
        The condition, written anew from what was read, so that a database reads it as it was read here.

    Raises:
        ValueError: It is more than that, or nothing.
    """
    if len(condition) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(condition)} characters, the limit is {MAX_CHARACTERS}")
    tokens = list(_tokens(condition))
    _Parser(tokens).parse()
    return " ".join(tokens)


def _tokens(condition: str) -> Iterator[str]:
    """Yields words in lower case, and all else as it is; no comment is known, and none can arise between spaces."""
    place = 0
    while place < len(condition):
        found = _TOKEN.match(condition, place)
        assert found is not None, "one of the three always matches"
        if found["bad"]:
            raise ValueError(f"{found['bad']!r} at character {found.start('bad')} is not allowed")
        if found["token"] is None:
            return
        place, token = found.end(), found["token"]
        is_word = token[0].isalpha() or token[0] == "_"
        if is_word and token.lower() not in (*_KEYWORDS, *ABOUT):
            raise ValueError(f"{token!r} is not allowed; columns are {', '.join(ABOUT)}, functions only array_has")
        yield token.lower() if is_word else token


class _Parser:
    """Checks the order of tokens, by a grammar with a method for each of its rules."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._place, self._depth = tokens, 0, 0

    def parse(self) -> None:
        self._condition()
        if self._next != _END:
            self._fail("and, or, or the end")

    @property
    def _next(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else _END

    def _took(self, *tokens: str) -> bool:
        """Whether the next token is one of these; it is taken then."""
        found = self._next in tokens
        self._place += found
        return found

    def _expect(self, *tokens: str) -> None:
        if not self._took(*tokens):
            self._fail(" or ".join(tokens))

    def _fail(self, expected: str) -> None:
        before = " ".join(self._tokens[: self._place]) or "nothing"
        raise ValueError(f"after {before!r} comes {self._next!r}; expected {expected}")

    def _condition(self) -> None:
        while True:
            while self._took("not"):
                pass
            self._comparison()
            if not self._took("and", "or"):
                return

    def _comparison(self) -> None:
        self._sum()
        if self._took(*_COMPARISONS):
            self._sum()
        elif self._took("is"):
            self._took("not")
            self._expect(*sorted(_LITERALS))
        elif self._next in ("not", "in", "like", "between"):
            self._took("not")
            self._range()

    def _range(self) -> None:
        if self._took("like"):
            self._string()
        elif self._took("between"):
            self._sum()
            self._expect("and")
            self._sum()
        else:
            self._expect("in")
            self._expect("(")
            self._sum()
            while self._took(","):
                self._sum()
            self._expect(")")

    def _sum(self) -> None:
        self._value()
        while self._took("+", "-", "*", "/", "%"):
            self._value()

    def _value(self) -> None:
        self._depth += 1
        if self._depth > _DEPTH:
            raise ValueError(f"it has more than {_DEPTH} parentheses or signs within each other")
        if self._took("-"):
            self._value()
        elif self._took("("):
            self._condition()
            self._expect(")")
        elif self._took("timestamp"):
            self._time()
        elif self._took("array_has"):
            self._expect("(")
            self._expect("captions")
            self._expect(",")
            self._string()
            self._expect(")")
        elif self._next in (*ABOUT, *_LITERALS) or self._next[0] in "'0123456789":
            self._place += 1
        else:
            self._fail("a column, a number, a string or a parenthesis")
        self._depth -= 1

    def _time(self) -> None:
        given = self._next
        self._string()
        try:
            found = _TIME.fullmatch(given) and datetime.fromisoformat(given.strip("'"))
        except ValueError:
            found = None
        if not found:
            raise ValueError(f"{given} is no time of the years 1 to 9999; expected one such as '2024-05-31 12:00:00'")

    def _string(self) -> None:
        if not self._next.startswith("'"):
            self._fail("a string")
        self._place += 1
