"""Conditions of strangers: columns, comparisons and literals, of which SQL is written with quoted literals."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from math import isfinite
from typing import Any

MAX_COMPARISONS, MAX_CHARACTERS = 50, 500
"""Comparisons of a condition, and characters of a text in it."""

_SECONDS, _COUNTS = ("start", "end"), {"size": 2**62, "width": 2**31, "height": 2**31}  # and what counts stay below
_COLUMNS = ("path", *_COUNTS, *_SECONDS, "mtime", "captions")
_SIGNS = {"eq": "=", "ne": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "like": "LIKE"}
_DEPTH = 10  # of conditions within each other


def condition_sql(given: Mapping[str, Any]) -> str:
    """Returns SQL for a condition such as {"width": {"gte": 800}, "path": {"like": "%.jpg"}}, of which all must hold.

    Operators are eq, ne, gt, gte, lt, lte and in; like of `path`, and contains of `captions`; `mtime` is compared with
    times of ISO 8601. {"and": […]}, {"or": […]} and {"not": {…}} combine conditions.

    Raises:
        ValueError: It is something else, or too long.
    """
    sql, count = _joined(given, 0)
    if count > MAX_COMPARISONS:
        raise ValueError(f"it has {count} comparisons, the limit is {MAX_COMPARISONS}")
    return sql


def _joined(given: Any, depth: int) -> tuple[str, int]:
    """Returns the SQL of a condition, and how many comparisons it has."""
    if depth > _DEPTH:
        raise ValueError(f"it has conditions within each other deeper than {_DEPTH}")
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f'{_shown(given)} is no condition; expected one such as {{"width": {{"gte": 800}}}}')
    parts: list[str] = []
    total = 0
    for name, value in given.items():
        if name in ("and", "or"):
            found = [_joined(one, depth + 1) for one in value] if isinstance(value, list) and value else []
            if not found:
                raise ValueError(f"{name!r} has {_shown(value)}; expected a list of conditions")
            parts.append("(" + f" {name.upper()} ".join(sql for sql, _ in found) + ")")
            total += sum(count for _, count in found)
        elif name == "not":
            sql, count = _joined(value, depth + 1)
            parts.append(f"NOT ({sql})")
            total += count
        elif name not in _COLUMNS:
            raise ValueError(f"{_shown(name)} is no column; columns are {', '.join(_COLUMNS)}")
        elif not isinstance(value, Mapping) or not value:
            raise ValueError(f'{name!r} has {_shown(value)}; expected a comparison such as {{"gte": 800}}')
        else:
            parts += [_compared(name, sign, one) for sign, one in value.items()]
            total += len(value)
    return "(" + " AND ".join(parts) + ")", total


def _compared(column: str, sign: str, value: Any) -> str:
    if sign == "contains" and column == "captions":
        return f"array_has(captions, {_literal(column, value)})"
    if column == "captions" or (sign == "like" and column != "path") or sign not in (*_SIGNS, "in"):
        raise ValueError(
            f"{_shown(sign)} is no operator of {column!r}; expected "
            + ("contains" if column == "captions" else f"one of {', '.join((*_SIGNS, 'in'))} (like: of path)")
        )
    if sign == "in":
        if not isinstance(value, list) or not 0 < len(value) <= MAX_COMPARISONS:
            raise ValueError(f"{column!r} is compared with {_shown(value)}; expected a list of up to {MAX_COMPARISONS}")
        return f"`{column}` IN ({', '.join(_literal(column, one) for one in value)})"
    return f"`{column}` {_SIGNS[sign]} {_literal(column, value)}"


def _literal(column: str, value: Any) -> str:
    if column in _SECONDS and type(value) in (int, float) and isfinite(value):
        return repr(float(value))
    if column in _COUNTS and type(value) in (int, float) and abs(value) < _COUNTS[column] and value == int(value):
        return repr(int(value))
    if column in ("path", "captions", "mtime") and isinstance(value, str) and len(value) <= MAX_CHARACTERS:
        if column != "mtime":
            return "'" + value.replace("'", "''") + "'"
        with suppress(ValueError):
            return f"timestamp '{datetime.fromisoformat(value).isoformat(sep=' ')}'"
    kinds = {"mtime": "a time such as 2026-01-31T12:00:00", "path": "a text", "captions": "a text"}
    kind = kinds.get(column, "a number" if column in _SECONDS else "a whole number")
    raise ValueError(f"{column!r} is compared with {_shown(value)}; expected {kind}")


def _shown(value: object) -> str:
    return repr(value)[:80]
