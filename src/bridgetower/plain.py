"""Dataclasses from plain nested values, as JSON holds them, with the type of every value checked; and choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from inspect import isabstract
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

_LARGEST = 2**63 - 1
AT_LEAST_0, AT_LEAST_1 = (0, _LARGEST), (1, _LARGEST)
NO_OPTION = "no option"
"""Marks the type of a field that is saved but that the command line does not offer."""


def from_plain(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds a dataclass from plain nested values: a list becomes a tuple, a whole number will do for a float."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; expected names and values")
    if isabstract(cls):
        raise ValueError(f"{where} is {values!r}; expected a built {cls.__name__}")
    types = get_type_hints(cls)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ValueError(f"{where} has unknown fields {unknown}; known: {sorted(types)}")
    lacking = sorted(
        field.name
        for field in fields(cast(Any, cls))
        if field.name not in values
        and field.default is MISSING
        and field.default_factory is MISSING
    )
    if lacking:
        raise ValueError(f"{where} lacks {lacking}")
    return cls(
        **{name: _checked(types[name], value, f"{where}.{name}") for name, value in values.items()}
    )


def known_fields(cls: type[T], values: Any, where: str) -> T:
    """Like `from_plain`, but passes over fields that the dataclass does not have."""
    if isinstance(values, Mapping):
        values = {name: value for name, value in values.items() if name in get_type_hints(cls)}
    return from_plain(cls, values, where)


def check_choice(name: str, value: object, choices: Any, *, or_none: bool = False) -> None:
    known = (*get_args(choices), None) if or_none else get_args(choices)
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, known))}")


def check_numbers(config: Any, where: str = "", **bounds: tuple[float, float]) -> None:
    """Checks the numbers of a dataclass whose annotations are texts: none is NaN, infinite, or beyond 64 bits."""
    for field in fields(config):
        kind = str(field.type).removesuffix(" | None")
        value = getattr(config, field.name)
        if kind not in ("int", "float") or (value is None and kind != field.type):
            continue
        low, high = bounds.get(field.name, (-_LARGEST, _LARGEST))
        fits = type(value) is int or (
            kind == "float" and type(value) is float
        )  # by identity: True is an int
        if not fits or not low <= value <= high:
            kind_of = "whole number" if kind == "int" else "number"
            bounded = f"a {kind_of} from {low:,} to {high:,}"
            expected = f"at least {low:,}" if fits and value < low and high == _LARGEST else bounded
            raise ValueError(f"{where}{field.name} is {value!r}; expected {expected}")


def _checked(annotation: Any, value: Any, where: str) -> Any:
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if value is None and NoneType in kinds:
        return None
    for kind in kinds:
        origin, arguments = get_origin(kind), get_args(kind)
        if is_dataclass(kind):
            return (
                value
                if isinstance(value, cast(type, kind))
                else from_plain(cast(type, kind), value, where)
            )
        if (
            origin is tuple
            and isinstance(value, list | tuple)
            and (... in arguments or len(arguments) == len(value))
        ):
            items = zip(
                arguments[:1] * len(value) if ... in arguments else arguments, value, strict=True
            )
            return tuple(
                _checked(item, element, f"{where}[{number}]")
                for number, (item, element) in enumerate(items)
            )
        if origin is Sequence and isinstance(value, list):
            return [
                _checked(arguments[0], element, f"{where}[{number}]")
                for number, element in enumerate(value)
            ]
        if origin in (dict, Mapping) and isinstance(value, dict):
            return {
                name: _checked(arguments[1], element, f"{where}.{name}")
                for name, element in value.items()
            }
        if kind is float and type(value) is float and not isfinite(value):
            break
        # By identity: True is an int to isinstance.
        if kind in (Any, object) or type(value) is kind or (kind is float and type(value) is int):
            return value
        if origin is Literal and value in arguments:
            return value
    raise ValueError(f"{where} is {value!r}; expected {' or '.join(map(_name, kinds))}")


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind):
        return str(kind)
    return "None" if kind is NoneType else str(kind.__name__)
