"""Checks the arguments of public functions against their annotations, with errors of one line."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import (
    IO,
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

_MAX_QUOTED = 60  # characters
_WORDS: dict[Any, str] = {str: "a text", os.PathLike: "a path", NoneType: "None"}


@dataclass(frozen=True)
class Expected:
    """Describes, in an `Annotated` type, what values are expected.

    Attributes:
        words: Their name in errors.
        holds: Whether a value is one of them.
    """

    words: str
    holds: Callable[[Any], bool] = lambda value: True


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_PLAIN: dict[Any, Expected] = {
    Any: Expected("Any"),
    bool: Expected("True or False", lambda value: isinstance(value, bool | np.bool_)),
    float: Expected("a number", lambda value: _is_number(value, Real)),
    int: Expected("a whole number", lambda value: _is_number(value, Integral)),
}

AtLeast0 = Annotated[int, Expected("a whole number of at least 0", lambda number: number >= 0)]
AtLeast1 = Annotated[int, Expected("a whole number of at least 1", lambda number: number >= 1)]
AboveZero = Annotated[float, Expected("a number above 0", lambda number: number > 0)]


def check_at_least_1(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; expected at least 1")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function refuse arguments that do not fit their annotations.

    Items of an iterator are not checked, as they can be read only once. Numbers of NumPy are numbers.

    Raises:
        ValueError: An argument is not what the annotation says.
        TypeError: The function has no argument of that name.
    """
    parameters = list(inspect.signature(function).parameters)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        expected = _expected_arguments(function)
        for name in kwargs:
            if name not in expected:
                names = sorted(expected)
                near = difflib.get_close_matches(name, names, n=1)
                advice = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
                raise TypeError(f"{function.__qualname__}() has no argument {name}; {advice}")
        # Python refuses arguments that are missing or too many.
        for name, value in (*zip(parameters, args, strict=False), *kwargs.items()):
            if name in expected and not expected[name].holds(value):
                raise ValueError(
                    f"{name} is {_quoted_value(value)}; expected {expected[name].words}"
                )
        return function(*args, **kwargs)

    return call


@cache
def _expected_arguments(function: Callable[..., Any]) -> dict[str, Expected]:
    """Returns what values each argument takes, with the keyword arguments of a TypedDict."""
    kinds = get_type_hints(function, include_extras=True)
    kinds.pop("return", None)
    for name, kind in list(kinds.items()):
        if get_origin(kind) is Unpack:
            del kinds[name]
            kinds |= get_type_hints(get_args(kind)[0], include_extras=True)
    return {name: _expected(kind) for name, kind in kinds.items()}


def _expected(kind: Any) -> Expected:
    """Returns what values an annotation takes."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin is Annotated:
        conditions = [_expected(arguments[0])]
        conditions += [note for note in arguments[1:] if isinstance(note, Expected)]
        words = conditions[:2][-1].words
        return Expected(words, lambda value: all(item.holds(value) for item in conditions))
    if origin in (Union, UnionType):
        alternatives = list(map(_expected, arguments))
        words = " or ".join(dict.fromkeys(item.words for item in alternatives))
        return Expected(words, lambda value: any(item.holds(value) for item in alternatives))
    if origin is Literal:
        choices = [(type(choice), choice) for choice in arguments]
        words = f"one of {', '.join(map(str, arguments))}"
        # True equals 1, but is another choice.
        return Expected(words, lambda value: (type(value), value) in choices)
    words = _WORDS.get(origin or kind, getattr(kind, "__name__", str(kind)))
    if origin is IO:
        return Expected(words, lambda value: hasattr(value, "read"))
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return Expected(words, _container_condition(origin, arguments))
    return Expected(words, lambda value: isinstance(value, origin or kind))


def _container_condition(origin: Any, arguments: tuple[Any, ...]) -> Callable[[Any], bool]:
    """Returns the condition of a generic type such as `Mapping[str, int]`."""
    conditions = [_expected(argument).holds for argument in arguments]
    if issubclass(origin, Mapping):
        is_name, is_value = conditions
        return lambda value: (
            isinstance(value, origin)
            and all(map(is_name, value))
            and all(map(is_value, value.values()))
        )
    # A text is no list of its letters.
    can_repeat = issubclass(origin, Collection)
    return lambda value: (
        isinstance(value, origin)
        and not isinstance(value, str | bytes | Mapping)
        and (not can_repeat or all(map(conditions[0], value)))
    )


def _quoted_value(value: object) -> str:
    """Returns a short value as it is, and the type of a long one, for errors."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_QUOTED else value[:_MAX_QUOTED] + "…")
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{kind} of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    short = repr(value) if isinstance(value, list | tuple | dict) else ""
    return short if 0 < len(short) <= _MAX_QUOTED else f"of type {kind}"
