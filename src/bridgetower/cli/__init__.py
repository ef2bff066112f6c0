"""The `bridgetower` command; the module of a command is imported when that command runs."""

from __future__ import annotations

import ast
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module, resources
from itertools import pairwise, permutations
from typing import Any

import bridgetower
from bridgetower.cli.output import STDOUT, log_to, with_options
from bridgetower.cli.parsing import Parse, deferred, known_options, meant, parsed, subcommands
from bridgetower.files import shortened, visible, writing

GROUPS: Mapping[str, Mapping[str, str]] = {
    "use a model": dict.fromkeys(
        ("embed", "match", "score", "fill-mask", "answer", "entail", "reason", "classify", "explain"), "use"
    ),
    "search and serve": dict.fromkeys(("index", "search", "duplicates", "mcp"), "search") | {"serve": "serve"},
    "train and evaluate": {"train": "runs", "evaluate": "evaluation", "compare": "runs"},
    "prepare data": {"prepare": "data", "inspect": "data"},
    "convert": {"convert": "models", "export": "models"},
}
"""Commands by purpose, each with the module of `bridgetower.cli` that has it."""

SHELLS = ("bash", "zsh", "fish")
"""Each with a script `completion.SHELL` here."""

COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}
_MODEL_FIRST = {*GROUPS["use a model"], *GROUPS["convert"], "evaluate"} - {"explain"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; user errors end with one line and exit code 2, Ctrl-C with one line and 130."""
    log_to(logging.StreamHandler(), "%(levelname)s %(message)s")
    arguments = list(sys.argv[1:] if argv is None else argv)
    with reported(arguments):
        try:
            _run(*arguments)
        finally:
            with writing(STDOUT):  # a reader that left is noticed here, not at the end of the interpreter
                sys.stdout.flush()


@contextmanager
def reported(arguments: Sequence[str] = ()) -> Iterator[None]:
    """Ends the process with one line for an error of the user, which names options as in the arguments."""
    try:
        yield
    except KeyboardInterrupt:
        print("bridgetower: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # such as `| head`: what is left to print has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError, FloatingPointError) as error:  # OSError: missing, not permitted, a full disk
        where = isinstance(error, OSError) and error.errno and error.filename
        message = f"{error.filename}: {error.strerror}" if where else str(error)  # type: ignore[union-attr]
        message = with_options(message, arguments, partial(_known_options, *arguments))
        print(f"bridgetower: {visible(shortened(message))}", file=sys.stderr)
        raise SystemExit(2) from None


def _run(name: str = "", *arguments: str) -> None:
    """Runs a command, or prints the help or the version."""
    given = list(arguments)
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"bridgetower {bridgetower.__version__}")
    elif name == "--completion":
        shell = "".join(arguments[:1])
        if shell not in SHELLS:
            raise ValueError(f"--completion is {shell!r}; expected one of {', '.join(SHELLS)}")
        print(resources.files("bridgetower.cli").joinpath(f"completion.{shell}").read_text(encoding="utf-8"))
    elif name == "--complete":
        os.environ["COLUMNS"] = "9999"  # so that no entry of a help is broken
        print(*_completed(*arguments), sep="\n")
    elif name in COMMANDS:
        if name == "serve" and not {"-h", "--help"} & {*arguments}:
            given = import_module("bridgetower.cli.serve").with_environment(arguments, os.environ)
        if name == "train":  # steps that are asked for take the place of a recipe's epochs, and the other way round
            for asked, other in permutations(("--max-steps", "--max-epochs")):
                if _option(asked, arguments) not in (None, "None") and _option(other, arguments) is None:
                    given = [*arguments, other, "None"]
        place = next((number for number, word in enumerate(given) if word.partition("=")[0] == "--model"), None)
        if name in _MODEL_FIRST and place is not None:
            _, *model = given[place].split("=", 1)
            end = place + 1 if model else place + 2
            given = [*(model or given[place + 1 : end]), *given[:place], *given[end:]]
        parsed(name, given, _parser(name, given))()
    else:
        problem = f"there is no command {name!r}" if name else "no command is given"
        raise ValueError(f"{problem}; {meant(name, COMMANDS)}`bridgetower --help` lists all commands")


def _parser(name: str, arguments: Sequence[str]) -> Parse:
    """Returns what parses the arguments of a command; some of these decide which options there are."""
    import tyro

    from bridgetower.cli.options import OPTIONAL_VALUES, own_task

    module = import_module(f"bridgetower.cli.{COMMANDS[name]}")
    command: Any = getattr(module, name.replace("-", "_"))
    if name == "train":
        command = module.train_with(own_task(_option("--task-spec", arguments)))
    settings: dict[str, Any] = {
        "prog": f"bridgetower {name}",
        "config": (
            tyro.conf.ConsolidateSubcommandArgs,
            tyro.conf.CascadeSubcommandArgs,
            tyro.conf.PositionalMetavarFromFieldName,
        ),
        "registry": OPTIONAL_VALUES,
    }
    if isinstance(command, tyro.extras.SubcommandApp):
        parse = partial(command.cli, **settings)
    else:
        parse = partial(tyro.cli, deferred(command), **settings)
    return lambda given: parse(args=given)


def _known_options(name: str = "", *arguments: str) -> dict[str, list[str]]:
    """All options of a command that was given with its arguments, with their values; none if they are not known."""
    try:
        return known_options(_parser(name, arguments), arguments) if name in COMMANDS else {}
    except (ValueError, OSError):  # such as a custom task that cannot be imported
        return {}


def _completed(*words: str) -> list[str]:
    """What the last word of a command line can become; nothing where it is for the user to know, such as a file."""
    *before, word = words or ("",)
    if not before:
        found = [*COMMANDS, "--help", "--version", "--completion"]
    elif word.startswith("-"):
        found = [*_known_options(*before)]
    elif len(before) == 1 and before[0] in COMMANDS:
        found = subcommands(_parser(before[0], ()))
    else:
        found = [*SHELLS] if before == ["--completion"] else _known_options(*before).get(before[-1], [])
    return sorted(one for one in found if one.startswith(word))


def _option(name: str, arguments: Sequence[str]) -> str | None:
    """The value of an option that decides which others there are; None if it is not given."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return next((value for word, value in pairwise(words) if word.replace("_", "-") == name), None)


def _overview() -> str:
    """Returns the help of the whole command: a line for each command."""
    width = max(map(len, COMMANDS))
    lines = ["usage: bridgetower COMMAND [ARGUMENTS]", "", (bridgetower.__doc__ or "").partition("\n")[0]]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:{width}}  {_summary(name)}" for name in commands]
    explained = "`bridgetower COMMAND --help` explains a command; `--completion SHELL` completes them: docs/install.md."
    return "\n".join([*lines, "", explained, ""])


def _summary(name: str) -> str:
    """The first line of a command's docstring, read without importing what the command needs."""
    module = ast.parse(resources.files("bridgetower.cli").joinpath(f"{COMMANDS[name]}.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    docstring = ast.get_docstring(functions.get(name.replace("-", "_"), module)) or ""
    return docstring.partition("\n")[0].removesuffix(".")
