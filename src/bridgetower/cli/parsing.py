"""Arguments of a command, parsed before it runs; for an unknown one, an error that says what was perhaps meant."""

from __future__ import annotations

import difflib
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Annotated, Any, TextIO, get_type_hints

Parse = Callable[[Sequence[str]], Callable[[], None]]
"""Returns the call that arguments stand for."""

_OPTION = re.compile(r"(?:^|[│ ] |, |given as )(--[a-z][\w.-]*\w)(?: \[?\{([\w,-]+)\})?")
_SUBCOMMAND = re.compile(r"^\W+• (\S+)", re.MULTILINE)
_NAMES = {"train": "RECIPE", "prepare": "KIND"}  # what the subcommands are, for the usage
_PLAIN = {  # what is said in place of words of tyro
    r"^Missing from .*?: ": "missing: ",
    r"^Error parsing (?:[a-z_.]+: )?": "",
    r"invalid literal for int\(\) with base 10: ": "expected a whole number, not ",
    r"could not convert string to float: ": "expected a number, not ",
    r"^invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)": r"\2 is \1; expected one of \3",
    r"\.$": "",
}


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Returns a command with the same options and help that only returns its call."""
    from bridgetower.cli.options import DEFAULT

    kinds = {name: kind for name, kind in get_type_hints(command, include_extras=True).items() if name != "return"}
    command.__annotations__ = {name: Annotated[kind, DEFAULT] for name, kind in kinds.items()}
    command.__doc__ = re.sub(r"\n {12}(?=\S)", " ", command.__doc__ or "")  # joins the lines of an entry

    @functools.wraps(command)
    def bind(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    return bind


def parsed(name: str, arguments: Sequence[str], parse: Parse) -> Callable[[], None]:
    """Returns the call of a command; a ValueError says in one line what is wrong with its arguments."""
    said, before = io.StringIO(), dict(os.environ)
    if not {"-h", "--help"} & {*arguments}:
        os.environ["COLUMNS"] = "9999"  # so that no line of an error is broken
    try:
        with redirect_stderr(said), redirect_stdout(_Shortened(sys.stdout, name)):
            return parse(arguments)
    except SystemExit as ended:
        if ended.code != 2:
            raise
        raise ValueError(_problem(said.getvalue(), name, arguments, parse)) from None
    finally:
        os.environ.pop("COLUMNS", None)
        os.environ.update(before)


class _Shortened:
    """Standard output, with a usage that does not list dozens of names."""

    def __init__(self, out: TextIO, name: str) -> None:
        self.out, self.kind = out, _NAMES.get(name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.out, attribute)

    def write(self, text: str) -> int:
        return self.out.write(re.sub(r"(usage:.*)\{[\w,-]{50,}\}", rf"\1{self.kind}", text))


def known_options(parse: Parse, arguments: Sequence[str]) -> dict[str, list[str]]:
    """Returns the options of a command, or of its subcommand if the arguments name one, with their few values."""
    kinds = subcommands(parse)
    found = _OPTION.findall(_help(parse, *[word for word in arguments if word in kinds][:1]))
    return {option: list(filter(None, values.split(","))) for option, values in reversed(found)}


def subcommands(parse: Parse) -> list[str]:
    return _SUBCOMMAND.findall(_help(parse))


def _problem(said: str, name: str, arguments: Sequence[str], parse: Parse) -> str:
    """Names the first argument that there is not, else returns what tyro said as a line, without its help."""
    command, first = f"bridgetower {name}", "".join(arguments[:1])
    if kinds := subcommands(parse):
        chosen = [word for word in arguments if word in kinds]
        if not chosen and first and not first.startswith("-"):
            return f"{command} has no {first!r}; {meant(first, kinds)}`{command} --help` lists all"
        if not chosen:
            return f"no {_NAMES[name]} is given; `{command} --help` lists all"
        command += f" {chosen[0]}"
    options = known_options(parse, arguments).keys() - {"--help"}
    for word in arguments:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in options:
            return f"{command} has no option {option}; {meant(option, options)}`{command} --help` lists all"
    _, rows, *_ = re.split(r"^.*[─-]{8,}.*$", re.sub(r"\x1b\[[\d;]*m", "", said), flags=re.MULTILINE)
    lines = [line.strip("│ ") for line in rows.splitlines() if 0 < len(line) - len(line.lstrip("│ ")) < 9]
    problem = " ".join((lines[0], ", ".join(lines[1:]))).strip()
    for pattern, plain in _PLAIN.items():
        problem = re.sub(pattern, plain, problem)
    return f"{problem}; see {command} --help"


def _help(parse: Parse, *arguments: str) -> str:
    shown = io.StringIO()
    with suppress(SystemExit), redirect_stdout(shown), redirect_stderr(io.StringIO()):
        parse([*arguments, "--help"])
    return shown.getvalue()


def meant(word: str, known: Iterable[str]) -> str:
    """Returns the question for the word that is nearest; nothing if none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}? " if near else ""
