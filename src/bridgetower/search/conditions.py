"""Conditions of strangers: columns, comparisons and literals, of which SQL is written with quoted literals."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from math import isfinite
from typing import Any

MAX_COMPARISONS, MAX_CHARACTERS = 50, 500
"""Comparisons of a condition, and characters of a text in it."""

_COUNTS = {"size": 2**62, "width": 2**31, "height": 2**31}  # and what they stay below
_COLUMNS = ("path", *_COUNTS, "start", "end", "mtime", "captions")
_SIGNS = {"eq": "=", "ne": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "like": "LIKE"}
_DEPTH = 10  # of conditions within each other


def condition_sql(given: Mapping[str, Any]) -> str:
    """Returns SQL for a condition such as {"width": {"gte": 800}, "path": {"like": "%.jpg"}}, of which all must hold.

    Operators are eq, ne, gt, gte, lt, lte and in; like of `path`, and contains of `captions`; `mtime` is compared with
    times of ISO 8601. {"and": […]}, {"or": […]} and {"not": {…}} combine conditions. All else is a ValueError.
    """
    comparisons: list[str] = []
    sql = _joined(given, 0, comparisons)
    if len(comparisons) > MAX_COMPARISONS:
        raise ValueError(f"it has {len(comparisons)} comparisons, the limit is {MAX_COMPARISONS}")
    return sql


def _joined(given: Any, depth: int, comparisons: list[str]) -> str:
    """Returns the SQL of a condition, and notes its comparisons."""
    if depth > _DEPTH:
        raise ValueError(f"it has conditions within each other deeper than {_DEPTH}")
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            f'{_shown(given)} is no condition; expected one such as {{"width": {{"gte": 800}}}}'
        )
    parts: list[str] = []
    for name, value in given.items():
        if name in ("and", "or"):
            if not isinstance(value, list) or not value:
                raise ValueError(f"{name!r} has {_shown(value)}; expected a list of conditions")
            found = [_joined(one, depth + 1, comparisons) for one in value]
            parts.append("(" + f" {name.upper()} ".join(found) + ")")
        elif name == "not":
            parts.append(f"NOT ({_joined(value, depth + 1, comparisons)})")
        elif name not in _COLUMNS:
            raise ValueError(f"{_shown(name)} is no column; columns are {', '.join(_COLUMNS)}")
        elif not isinstance(value, Mapping) or not value:
            raise ValueError(
                f'{name!r} has {_shown(value)}; expected a comparison such as {{"gte": 800}}'
            )
        else:
            found = [_compared(name, sign, one) for sign, one in value.items()]
            comparisons += found
            parts += found
    return "(" + " AND ".join(parts) + ")"


def _compared(column: str, sign: str, value: Any) -> str:
    signs = ("contains",) if column == "captions" else (*_SIGNS, "in")
    if sign not in signs or (sign == "like" and column != "path"):
        expected = (
            "contains" if column == "captions" else f"one of {', '.join(signs)} (like: of path)"
        )
        raise ValueError(f"{_shown(sign)} is no operator of {column!r}; expected {expected}")
    if sign == "contains":
        return f"array_has(captions, {_literal(column, value)})"
    if sign != "in":
        return f"`{column}` {_SIGNS[sign]} {_literal(column, value)}"
    if not isinstance(value, list) or not 0 < len(value) <= MAX_COMPARISONS:
        raise ValueError(
            f"{column!r} is compared with {_shown(value)}; expected a list of up to {MAX_COMPARISONS}"
        )
    return f"`{column}` IN ({', '.join(_literal(column, one) for one in value)})"


def _literal(column: str, value: Any) -> str:
    is_number, kind = type(value) in (int, float), "a text"
    if column in ("start", "end"):
        kind = "a number"
        if is_number and isfinite(value):
            return repr(float(value))
    elif column in _COUNTS:
        kind = "a whole number"
        if is_number and abs(value) < _COUNTS[column] and value == int(value):
            return repr(int(value))
    elif column == "mtime":
        kind = "a time such as 2026-01-31T12:00:00"
        if isinstance(value, str) and len(value) <= MAX_CHARACTERS:
            with suppress(ValueError):
                return f"timestamp '{datetime.fromisoformat(value).isoformat(sep=' ')}'"
    elif isinstance(value, str) and len(value) <= MAX_CHARACTERS:
        return "'" + value.replace("'", "''") + "'"
    raise ValueError(f"{column!r} is compared with {_shown(value)}; expected {kind}")


def _shown(value: object) -> str:
    return repr(value)[:80]
