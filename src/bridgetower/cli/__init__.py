"""The command line. The module of a command is imported when that command runs."""

from __future__ import annotations

import ast
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module, resources
from itertools import pairwise, permutations
from typing import Any

import bridgetower
from bridgetower.cli.output import STDOUT, log_to, with_options
from bridgetower.cli.parsing import HELP, Parse, deferred, known_options, meant, parsed, subcommands
from bridgetower.files import short_name, shortened, visible, writing

GROUPS: Mapping[str, Mapping[str, str]] = {
    "use a model": {
        "embed": "use",
        "match": "use",
        "score": "use",
        "fill-mask": "use",
        "answer": "use",
        "entail": "use",
        "reason": "use",
        "classify": "use",
        "predict": "use",
        "explain": "use",
    },
    "search and serve": {
        "index": "search",
        "search": "search",
        "duplicates": "search",
        "mcp": "search",
        "serve": "serve",
    },
    "train and evaluate": {
        "fit": "fit",
        "train": "runs",
        "evaluate": "evaluation",
        "compare": "runs",
    },
    "prepare data": {"prepare": "data", "inspect": "data"},
    "convert": {"convert": "models", "export": "models"},
}
"""Commands by purpose, each with the module of `bridgetower.cli` that has it."""

SHELLS = ("bash", "zsh", "fish")
"""Each with a script `completion.SHELL` here."""

COMMANDS = {name: module for commands in GROUPS.values() for name, module in commands.items()}
_MODEL_FIRST = {*GROUPS["use a model"], *GROUPS["convert"], "evaluate"} - {"explain"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. Errors of the user end with one line and exit code 2, Ctrl-C with one line and 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    rename = partial(with_options, typed=arguments, all_options=partial(_known_options, *arguments))
    log_to(logging.StreamHandler(), "%(levelname)s %(message)s", rename=rename)
    with reported(arguments):
        try:
            _run(*arguments)
        finally:
            # a reader that left is noticed here, not at the end of the interpreter
            with writing(STDOUT):
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
    # OSError: missing, not permitted, a full disk
    except (ValueError, OSError, FloatingPointError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.errno and error.filename:
            message = f"{short_name(error.filename)}: {error.strerror}"
        message = with_options(message, arguments, partial(_known_options, *arguments))
        print(f"bridgetower: {visible(shortened(message))}", file=sys.stderr)
        raise SystemExit(2) from None


def _run(name: str = "", *arguments: str) -> None:
    """Runs a command, or prints the help or the version."""
    if name in HELP:
        print(_overview())
    elif name == "--version":
        print(f"bridgetower {bridgetower.__version__}")
    elif name == "--completion":
        shell = arguments[0] if arguments else ""
        if shell not in SHELLS:
            raise ValueError(f"--completion is {shell!r}; expected one of {', '.join(SHELLS)}")
        print(_package_text(f"completion.{shell}"))
    elif name == "--complete":
        os.environ["COLUMNS"] = "9999"  # keeps each entry of a help on one line
        print(*_completions(*arguments), sep="\n")
    elif name in COMMANDS:
        completed = _complete_arguments(name, list(arguments))
        call = parsed(name, completed, _parser(name, completed))
        call()
    else:
        problem = f"there is no command {name!r}" if name else "no command is given"
        raise ValueError(
            f"{problem}; {meant(name, COMMANDS)}`bridgetower --help` lists all commands"
        )


def _complete_arguments(name: str, arguments: list[str]) -> list[str]:
    """Returns the arguments of a command with those that follow from others or from the environment."""
    if name == "serve" and not HELP & {*arguments}:
        return import_module("bridgetower.cli.serve").with_environment(arguments, os.environ)
    # Steps that are given unset a recipe's epochs, and epochs its steps.
    if name == "train":
        for option, other in permutations(("--max-steps", "--max-epochs")):
            is_set = _option(option, arguments) not in (None, "None")
            if is_set and _option(other, arguments) is None:
                return [*arguments, other, "None"]

    # The value of --model takes the place of the positional argument MODEL.
    if name in _MODEL_FIRST:
        for position, argument in enumerate(arguments):
            option, has_value, model = argument.partition("=")
            if option == "--model":
                end = position + 1 if has_value else position + 2
                models = [model] if has_value else arguments[position + 1 : end]
                return [*models, *arguments[:position], *arguments[end:]]
    return arguments


def _parser(name: str, arguments: Sequence[str]) -> Parse:
    """Returns the parser of a command. Some of the arguments decide which options there are."""
    import tyro

    from bridgetower.cli.options import OPTIONAL_VALUES, custom_task

    module = import_module(f"bridgetower.cli.{COMMANDS[name]}")
    command: Any = getattr(module, _function_name(name))
    if name == "train":
        command = module.train_with(custom_task(_option("--task-spec", arguments)))
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
    return lambda words: parse(args=words)


def _package_text(name: str) -> str:
    return resources.files("bridgetower.cli").joinpath(name).read_text(encoding="utf-8")


def _function_name(command: str) -> str:
    return command.replace("-", "_") + "_command"


@cache
def _known_options(name: str = "", *arguments: str) -> dict[str, list[str]]:
    """Returns the options of a command with their values, or nothing where they are not known."""
    if name not in COMMANDS:
        return {}
    try:
        return known_options(_parser(name, arguments), arguments)
    except (ValueError, OSError):  # such as a custom task that cannot be imported
        return {}


def _completions(*words: str) -> list[str]:
    """Returns completions of the last word of a command line, none for free values such as paths."""
    *before, word = words or ("",)
    if not before:
        candidates = [*COMMANDS, "--help", "--version", "--completion"]
    elif word.startswith("-"):
        candidates = list(_known_options(*before))
    elif len(before) == 1 and before[0] in COMMANDS:
        candidates = subcommands(_parser(before[0], ()))
    elif before == ["--completion"]:
        candidates = list(SHELLS)
    else:
        candidates = _known_options(*before).get(before[-1], [])
    return sorted(candidate for candidate in candidates if candidate.startswith(word))


def _option(name: str, arguments: Sequence[str]) -> str | None:
    """Returns the value of an option before the arguments are parsed, or None."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for word, value in pairwise(words):
        if word.replace("_", "-") == name:
            return value
    return None


def _overview() -> str:
    """Returns the help of the whole command, with a line for each command."""
    width = max(map(len, COMMANDS))
    summary = (bridgetower.__doc__ or "").partition("\n")[0]
    lines = ["usage: bridgetower COMMAND [ARGUMENTS]", "", summary]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        for name, module_name in commands.items():
            # Modules are read, not imported. A command of subcommands has the docstring of its module.
            module = ast.parse(_package_text(f"{module_name}.py"))
            functions = {
                node.name: node for node in module.body if isinstance(node, ast.FunctionDef)
            }
            docstring = ast.get_docstring(functions.get(_function_name(name), module)) or ""
            title = docstring.partition("\n")[0].removesuffix(".")
            lines.append(f"  {name:{width}}  {title}")
    lines += [
        "",
        "`bridgetower COMMAND --help` explains a command; `--completion SHELL` completes them: docs/install.md.",
        "",
    ]
    return "\n".join(lines)
