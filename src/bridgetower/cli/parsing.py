"""Parses the arguments of a command before it runs, with one-line errors that suggest what was meant."""

from __future__ import annotations

import codecs
import difflib
import functools
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Annotated, Any, TextIO, get_type_hints

from bridgetower.cli.panels import ALL, WIDEST, in_panels

HELP = {"-h", "--help", ALL}

Parse = Callable[[Sequence[str]], Callable[[], None]]
"""Returns the call that arguments stand for."""

_OPTION = re.compile(r"(?:^|[│ ] |, |given as )(--[a-z][\w.-]*\w)(?: \[?\{([\w,-]+)\})?")
_SUBCOMMAND = re.compile(r"^\W+• (\S+)", re.MULTILINE)
_RULE = re.compile(r"^.*[─-]{8,}.*$", re.MULTILINE)  # above and below an error of tyro
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_SUBCOMMAND_KINDS = {"train": "RECIPE", "prepare": "KIND"}
_REWORDED = {  # errors of tyro
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

    hints = get_type_hints(command, include_extras=True)
    command.__annotations__ = {
        name: Annotated[hint, DEFAULT] for name, hint in hints.items() if name != "return"
    }
    # joins the lines of an entry
    command.__doc__ = re.sub(r"\n {12}(?=\S)", " ", command.__doc__ or "")

    @functools.wraps(command)
    def bind(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    return bind


def parsed(name: str, arguments: Sequence[str], parse: Parse) -> Callable[[], None]:
    """Returns the call of a command, or raises ValueError with what is wrong with its arguments in one line."""
    printed = io.StringIO()
    environment = dict(os.environ)
    shows_help = bool(HELP & {*arguments})
    # One column of panels, and each line of an error as it is.
    width = min(WIDEST, shutil.get_terminal_size().columns) if shows_help else 9999
    os.environ["COLUMNS"] = str(width)
    help_text = _Help(sys.stdout)
    words = ["--help" if word == ALL else word for word in arguments]
    try:
        with redirect_stderr(printed), redirect_stdout(help_text):
            return parse(words)
    except SystemExit as ended:
        if ended.code != 2:
            text = help_text.getvalue()
            # Names the kind of subcommands, not dozens of them.
            kind = _SUBCOMMAND_KINDS.get(name)
            text = re.sub(r"(usage:.*)\{[\w,-]{50,}\}", rf"\1{kind}", text)
            sys.stdout.write(in_panels(text, name, show_all=ALL in arguments))
            raise
        raise ValueError(_problem(printed.getvalue(), name, arguments, parse)) from None
    finally:
        os.environ.pop("COLUMNS", None)
        os.environ.update(environment)


class _Help(io.StringIO):
    """Keeps a help, which has colours if it is for a terminal."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def isatty(self) -> bool:
        return self.stream.isatty()

    @property
    def encoding(self) -> str | None:  # type: ignore[override]
        """The name by which tyro knows UTF-8."""
        return codecs.lookup(self.stream.encoding or "ascii").name


def known_options(parse: Parse, arguments: Sequence[str]) -> dict[str, list[str]]:
    """Returns the options of a command, or of the subcommand in the arguments, with the values of choices."""
    names = subcommands(parse)
    subcommand = [word for word in arguments if word in names][:1]
    options = _OPTION.findall(_help(parse, *subcommand))
    return {
        option: [value for value in values.split(",") if value]
        for option, values in reversed(options)
    }


def subcommands(parse: Parse) -> list[str]:
    return _SUBCOMMAND.findall(_help(parse))


def _problem(error: str, name: str, arguments: Sequence[str], parse: Parse) -> str:
    """Names the first unknown argument, else returns tyro's error as a line."""
    command = f"bridgetower {name}"
    names = subcommands(parse)
    if names:
        subcommand = next((word for word in arguments if word in names), None)
        first = arguments[0] if arguments else ""
        if subcommand is None and first and not first.startswith("-"):
            return f"{command} has no {first!r}; {meant(first, names)}`{command} --help` lists all"
        if subcommand is None:
            return f"no {_SUBCOMMAND_KINDS[name]} is given; `{command} --help` lists all"
        command += f" {subcommand}"

    options = known_options(parse, arguments).keys() - {"--help"}
    for word in arguments:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in options:
            return f"{command} has no option {option}; {meant(option, options)}`{command} --help` lists all"
    # The lines of tyro's error, without the help that follows.
    _, rows, *_ = _RULE.split(_COLOUR.sub("", error))
    lines = []
    for row in rows.splitlines():
        indent = len(row) - len(row.lstrip("│ "))
        if 0 < indent < 9:  # deeper ones are of the help
            lines.append(row.strip("│ "))
    problem = f"{lines[0]} {', '.join(lines[1:])}".strip()
    for pattern, wording in _REWORDED.items():
        problem = re.sub(pattern, wording, problem)
    return f"{problem}; see {command} --help"


def _help(parse: Parse, *arguments: str) -> str:
    printed = io.StringIO()
    with suppress(SystemExit), redirect_stdout(printed), redirect_stderr(io.StringIO()):
        parse([*arguments, "--help"])
    return printed.getvalue()


def meant(word: str, candidates: Iterable[str]) -> str:
    """Returns a question that suggests the nearest candidate, or nothing if none is near."""
    matches = difflib.get_close_matches(word, candidates, n=1)
    return f"did you mean {matches[0]}? " if matches else ""
