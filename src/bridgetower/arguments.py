"""Checks the arguments of public functions against their annotations, so that a slip is answered in one line."""

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
    NamedTuple,
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

_LONGEST = 60  # characters of a text that an error quotes
_WORDS: dict[Any, str] = {
    bool: "True or False",
    float: "a number",
    int: "a whole number",
    str: "a text",
    os.PathLike: "a path",
    NoneType: "None",
}


@dataclass(frozen=True)
class Expected:
    """Describes, in an `Annotated` type, what values are expected.

    Attributes:
        words: As an error names them.
        holds: What the type alone cannot say.
    """

    words: str
    holds: Callable[[Any], bool] = lambda value: True


AtLeast0 = Annotated[int, Expected("a whole number of at least 0", lambda number: number >= 0)]
AtLeast1 = Annotated[int, Expected("a whole number of at least 1", lambda number: number >= 1)]
AboveZero = Annotated[float, Expected("a number above 0", lambda number: number > 0)]


def check_at_least_1(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; expected at least 1")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function refuse arguments that do not fit their annotations.

    What an iterable holds is not looked at, as a generator has it only once. Numbers of NumPy are numbers.

    Raises:
        ValueError: An argument is not what the annotation says.
        TypeError: The function has no argument of that name.
    """
    names = list(inspect.signature(function).parameters)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = _arguments(function)
        for name in kwargs:
            if name not in arguments:
                raise TypeError(_unknown(function, name, arguments))
        # Arguments that are missing or too many are left to Python.
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in arguments and not arguments[name].fits(value):
                raise ValueError(f"{name} is {_shown(value)}; expected {arguments[name].words}")
        return function(*args, **kwargs)

    return call


class _Argument(NamedTuple):
    fits: Callable[[Any], bool]
    words: str


@cache
def _arguments(function: Callable[..., Any]) -> dict[str, _Argument]:
    """Returns what fits each argument; keyword arguments of a TypedDict are arguments too."""
    kinds = get_type_hints(function, include_extras=True)
    kinds.pop("return", None)
    for name, kind in list(kinds.items()):
        if get_origin(kind) is Unpack:
            del kinds[name]
            kinds |= get_type_hints(get_args(kind)[0], include_extras=True)
    return {name: _Argument(_condition(kind), _words(kind)) for name, kind in kinds.items()}


def _condition(kind: Any) -> Callable[[Any], bool]:
    """Returns what says whether a value fits an annotation."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: True
    if kind is bool:
        return lambda value: isinstance(value, bool | np.bool_)
    if kind in (int, float):
        number = Integral if kind is int else Real
        return lambda value: isinstance(value, number) and not isinstance(value, bool)
    if origin is Annotated:
        conditions = [
            _condition(arguments[0]),
            *(note.holds for note in arguments[1:] if isinstance(note, Expected)),
        ]
        return lambda value: all(fits(value) for fits in conditions)
    if origin in (Union, UnionType):
        alternatives = list(map(_condition, arguments))
        return lambda value: any(fits(value) for fits in alternatives)
    if origin is Literal:
        return lambda value: any(type(value) is type(one) and value == one for one in arguments)
    if origin is IO:
        return lambda value: hasattr(value, "read")
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return _condition_of_several(origin, arguments)
    return lambda value: isinstance(value, origin or kind)


def _condition_of_several(origin: Any, arguments: tuple[Any, ...]) -> Callable[[Any], bool]:
    """Returns the condition of a generic type such as `Mapping[str, int]`; a text is no list of its letters."""
    of_items = list(map(_condition, arguments))
    if issubclass(origin, Mapping):
        fits_name, fits_value = of_items
        return lambda value: (
            isinstance(value, origin)
            and all(fits_name(name) and fits_value(one) for name, one in value.items())
        )
    can_repeat = issubclass(origin, Collection)
    return lambda value: (
        isinstance(value, origin)
        and not isinstance(value, str | bytes | Mapping)
        and (not can_repeat or all(map(of_items[0], value)))
    )


def _words(kind: Any) -> str:
    """Says what an annotation takes."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        notes = [note.words for note in arguments[1:] if isinstance(note, Expected)]
        return notes[0] if notes else _words(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words, arguments)))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    return _WORDS.get(origin or kind, getattr(kind, "__name__", str(kind)))


def _shown(value: object) -> str:
    """Returns a value as an error quotes it: a short one as it is, of another its kind."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST else value[:_LONGEST] + "…")
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{kind} of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    short = repr(value) if isinstance(value, list | tuple | dict) else ""
    return short if 0 < len(short) <= _LONGEST else f"of type {kind}"


def _unknown(function: Callable[..., Any], name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    advice = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
    return f"{function.__qualname__}() has no argument {name}; {advice}"
