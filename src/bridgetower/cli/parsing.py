"""Arguments of a command, parsed before it runs; for an unknown one, an error that says what was perhaps meant."""

from __future__ import annotations

import difflib
import functools
import io
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from typing import Any

Parse = Callable[[Sequence[str]], Callable[[], None]]
"""Returns the call that arguments stand for."""

_OPTION = re.compile(r"--[a-z][\w.-]*\w")
_SUBCOMMAND = re.compile(r"^\W+• (\S+)", re.MULTILINE)


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Returns a command with the same options and help that only returns its call.

    The lines of each entry under "Args" are joined: the help would break where they break in the source.
    """
    command.__doc__ = re.sub(r"\n {12}(?=\S)", " ", command.__doc__ or "")

    @functools.wraps(command)
    def bind(*arguments: Any, **options: Any) -> Callable[[], None]:
        return partial(command, *arguments, **options)

    return bind


def parsed(name: str, arguments: Sequence[str], parse: Parse) -> Callable[[], None]:
    """Returns the call of a command; a ValueError names an option or subcommand that there is not."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return parse(arguments)
    except SystemExit as ended:
        if ended.code == 2 and (problem := _unknown(f"bridgetower {name}", arguments, parse)):
            said = io.StringIO()
            raise ValueError(problem) from None
        raise
    finally:
        sys.stderr.write(said.getvalue())


def known_options(parse: Parse, arguments: Sequence[str]) -> set[str]:
    """Returns the options of a command, or of its subcommand if the arguments name one."""
    subcommands = _SUBCOMMAND.findall(_help(parse))
    return set(_OPTION.findall(_help(parse, *[word for word in arguments if word in subcommands][:1])))


def _unknown(command: str, arguments: Sequence[str], parse: Parse) -> str | None:
    """Names the first argument that there is not; None if all of those that can be wrong are there."""
    given = [word for word in arguments if not word.startswith("-")]
    if subcommands := _SUBCOMMAND.findall(_help(parse)):
        if not given:
            return None
        if given[0] not in subcommands:
            return f"{command} has no {given[0]!r}; {meant(given[0], subcommands)}`{command} --help` lists all"
    options = known_options(parse, arguments)
    for word in arguments:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in options:
            listed = " ".join([command, *(given[:1] if subcommands else ()), "--help"])
            return f"{command} has no option {option}; {meant(option, options)}`{listed}` lists all"
    return None


def _help(parse: Parse, *arguments: str) -> str:
    shown = io.StringIO()
    with suppress(SystemExit), redirect_stdout(shown), redirect_stderr(io.StringIO()):
        parse([*arguments, "--help"])
    return shown.getvalue()


def meant(word: str, known: Iterable[str]) -> str:
    """Returns the question for the word that is nearest; nothing if none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}? " if near else ""
