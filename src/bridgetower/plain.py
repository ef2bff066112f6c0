"""Builds dataclasses from the plain nested values of JSON, and checks the type of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from inspect import isabstract
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

_LARGEST = 2**63 - 1
AT_LEAST_0 = (0, _LARGEST)
AT_LEAST_1 = (1, _LARGEST)
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
    converted = {
        name: _convert(types[name], value, f"{where}.{name}") for name, value in values.items()
    }
    return cls(**converted)


def known_fields(cls: type[T], values: Any, where: str) -> T:
    """Like `from_plain`, but passes over fields that the dataclass does not have."""
    if isinstance(values, Mapping):
        values = {name: value for name, value in values.items() if name in get_type_hints(cls)}
    return from_plain(cls, values, where)


def check_choice(name: str, value: object, choices: Any, *, or_none: bool = False) -> None:
    expected = (*get_args(choices), None) if or_none else get_args(choices)
    if value not in expected:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, expected))}")


def check_numbers(config: Any, where: str = "", **bounds: tuple[float, float]) -> None:
    """Checks the numbers of a dataclass whose annotations are texts: none is NaN, infinite, or beyond 64 bits."""
    for field in fields(config):
        kind = str(field.type).removesuffix(" | None")
        value = getattr(config, field.name)
        if kind not in ("int", "float") or (value is None and kind != field.type):
            continue
        low, high = bounds.get(field.name, (-_LARGEST, _LARGEST))
        # By identity, as True is an int to isinstance.
        is_number = type(value) is int or (kind == "float" and type(value) is float)
        if not is_number or not low <= value <= high:
            expected = f"a {'whole number' if kind == 'int' else 'number'} from {low:,} to {high:,}"
            if is_number and value < low and high == _LARGEST:
                expected = f"at least {low:,}"
            raise ValueError(f"{where}{field.name} is {value!r}; expected {expected}")


def _convert(annotation: Any, value: Any, where: str) -> Any:
    """Converts a value to the first type of a union that fits it."""
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if is_union else (annotation,)
    if value is None and NoneType in kinds:
        return None
    for kind in kinds:
        if is_dataclass(kind) and not isinstance(value, cast(type, kind)):
            return from_plain(cast(type, kind), value, where)
        if _is_container(kind, value):
            return _convert_items(kind, value, where)
        if _fits(kind, value):
            return value
    raise ValueError(f"{where} is {value!r}; expected {' or '.join(map(_name, kinds))}")


def _is_container(kind: Any, value: Any) -> bool:
    origin = get_origin(kind)
    if origin is tuple and isinstance(value, list | tuple):
        items = get_args(kind)
        return ... in items or len(items) == len(value)
    if origin is Sequence:
        return isinstance(value, list)
    return origin in (dict, Mapping) and isinstance(value, dict)


def _convert_items(kind: Any, value: Any, where: str) -> Any:
    arguments = get_args(kind)
    if isinstance(value, dict):
        return {
            name: _convert(arguments[1], element, f"{where}.{name}")
            for name, element in value.items()
        }
    is_fixed = get_origin(kind) is tuple and ... not in arguments
    annotations = arguments if is_fixed else arguments[:1] * len(value)
    items = [
        _convert(annotation, element, f"{where}[{number}]")
        for number, (annotation, element) in enumerate(zip(annotations, value, strict=True))
    ]
    return tuple(items) if get_origin(kind) is tuple else items


def _fits(kind: Any, value: Any) -> bool:
    """Tells whether a value needs no conversion. Types are compared by identity, as True is an int."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) is int or (type(value) is float and isfinite(value))
    if is_dataclass(kind):
        return isinstance(value, cast(type, kind))
    return kind in (Any, object) or type(value) is kind


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind):
        return str(kind)
    return "None" if kind is NoneType else str(kind.__name__)
