"""Translates untrusted filters to SQL, with quoted literals."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

MAX_COMPARISONS = 50
"""Comparisons of a condition."""

MAX_CHARACTERS = 500
"""Characters of a text in a condition."""

_LIMITS = {"size": 2**62, "width": 2**31, "height": 2**31}  # which these columns stay below
_COLUMNS = ("path", *_LIMITS, "start", "end", "mtime", "captions")
_OPERATORS = {
    "eq": "=",
    "ne": "<>",
    "gt": ">",
    "gte": ">=",
    "lt": "<",
    "lte": "<=",
    "like": "LIKE",
}
_MAX_DEPTH = 10  # of conditions within each other


def condition_sql(condition: Mapping[str, Any]) -> str:
    """Returns SQL for a condition such as {"width": {"gte": 800}, "path": {"like": "%.jpg"}}, of which all must hold.

    Operators are eq, ne, gt, gte, lt, lte and in; like of `path`, and contains of `captions`; `mtime` is compared with
    times of ISO 8601. {"and": […]}, {"or": […]} and {"not": {…}} combine conditions. All else is a ValueError.
    """
    comparisons: list[str] = []
    sql = _translate(condition, 0, comparisons)
    if len(comparisons) > MAX_COMPARISONS:
        raise ValueError(f"it has {len(comparisons)} comparisons, the limit is {MAX_COMPARISONS}")
    return sql


def _translate(condition: Any, depth: int, comparisons: list[str]) -> str:
    """Returns the SQL of a condition, and adds its comparisons to the list."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"it has conditions within each other deeper than {_MAX_DEPTH}")
    if not isinstance(condition, Mapping) or not condition:
        raise ValueError(
            f'{_excerpt(condition)} is no condition; expected one such as {{"width": {{"gte": 800}}}}'
        )
    terms = []
    for name, value in condition.items():
        if name in ("and", "or"):
            if not isinstance(value, list) or not value:
                raise ValueError(f"{name!r} has {_excerpt(value)}; expected a list of conditions")
            conditions = [_translate(item, depth + 1, comparisons) for item in value]
            joined = f" {name.upper()} ".join(conditions)
            terms.append(f"({joined})")
        elif name == "not":
            terms.append(f"NOT ({_translate(value, depth + 1, comparisons)})")
        elif name not in _COLUMNS:
            raise ValueError(f"{_excerpt(name)} is no column; columns are {', '.join(_COLUMNS)}")
        elif not isinstance(value, Mapping) or not value:
            raise ValueError(
                f'{name!r} has {_excerpt(value)}; expected a comparison such as {{"gte": 800}}'
            )
        else:
            for operator, operand in value.items():
                comparison = _comparison(name, operator, operand)
                comparisons.append(comparison)
                terms.append(comparison)
    return "(" + " AND ".join(terms) + ")"


def _comparison(column: str, operator: str, operand: Any) -> str:
    is_captions = column == "captions"
    operators = ("contains",) if is_captions else (*_OPERATORS, "in")
    if operator not in operators or (operator == "like" and column != "path"):
        expected = "contains" if is_captions else f"one of {', '.join(operators)} (like: of path)"
        raise ValueError(f"{_excerpt(operator)} is no operator of {column!r}; expected {expected}")
    if operator == "contains":
        return f"array_has(captions, {_literal(column, operand)})"
    if operator != "in":
        return f"`{column}` {_OPERATORS[operator]} {_literal(column, operand)}"
    if not isinstance(operand, list) or not 0 < len(operand) <= MAX_COMPARISONS:
        raise ValueError(
            f"{column!r} is compared with {_excerpt(operand)}; expected a list of up to {MAX_COMPARISONS}"
        )
    literals = [_literal(column, value) for value in operand]
    return f"`{column}` IN ({', '.join(literals)})"


def _literal(column: str, value: Any) -> str:
    is_number = type(value) in (int, float)
    is_text = isinstance(value, str) and len(value) <= MAX_CHARACTERS
    expected = "a text"
    if column in ("start", "end"):
        expected = "a number"
        if is_number and abs(value) <= sys.float_info.max:  # which a whole number may exceed
            return repr(float(value))
    elif column in _LIMITS:
        expected = "a whole number"
        if is_number and abs(value) < _LIMITS[column] and value == int(value):
            return repr(int(value))
    elif column == "mtime":
        expected = "a time such as 2026-01-31T12:00:00"
        if is_text:
            with suppress(ValueError):
                time = datetime.fromisoformat(value)
                return f"timestamp '{time.isoformat(sep=' ')}'"
    elif is_text:
        return quoted(value)
    raise ValueError(f"{column!r} is compared with {_excerpt(value)}; expected {expected}")


def quoted(text: str) -> str:
    """Returns a text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _excerpt(value: object) -> str:
    return repr(value)[:80]
