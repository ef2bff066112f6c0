"""What the command line shows: JSON lines, or a table for a reader at a terminal; errors and help in its terms."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bridgetower.files import json_text, one_line, shortened, visible, writing

STDOUT = Path("standard output")
"""What errors call it."""

_STAGES = {
    "itc": "ITC alone",
    "matching": "matching alone",
    "two_stage": "two stages",
    "one_stage": "all pairs",
    "chance": "chance",
}
_ADVICE = re.compile(r"(^|\b(?:lower|raise|give|pass|set|use|leave out) )([a-z]+(?:[_.][a-z]+)+)(?![\w/]|[.=]\w)")


class _OneLineFormatter(logging.Formatter):
    """Shows what is not seen, such as a line feed in a file's name, which could feign an entry of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name in logging
        return one_line(shortened(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - likewise
        return visible(super().formatException(ei))


def log_to(handler: logging.Handler, form: str, *, alone: bool = False) -> None:
    """Sends warnings of all libraries and all entries of this one to a handler, a line each but for tracebacks.

    Nothing is done if there is a handler already, unless this one is to take its place.
    """
    handler.setFormatter(_OneLineFormatter(form))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=alone)
    logging.getLogger("bridgetower").setLevel(logging.INFO)


def is_json(json: bool) -> bool:
    """Whether JSON is printed: if it is asked for, or where standard output is no terminal."""
    return json or not sys.stdout.isatty()


def emit(*values: object) -> None:
    """Writes a line of JSON per value."""
    for value in values:
        with writing(STDOUT):
            sys.stdout.write(json_text(value) + "\n")


def emit_result(value: Mapping[str, object], *, json: bool, following: Sequence[object] = ()) -> None:
    """Writes a line of JSON, or on a terminal a table with a row for each entry and the command that is useful next."""
    if is_json(json):
        emit(value)
    else:
        emit_rows(None, ("", ""), [(name.replace("_", " "), _cell(one)) for name, one in value.items()], texts=(0, 1))
        emit_following(*following)


def emit_results(rows: Iterable[Mapping[str, object]], *, json: bool) -> None:
    """Writes a line of JSON per row, or on a terminal a table without its empty columns; all rows have equal names."""
    if is_json(json):
        for row in rows:
            emit(row)
    elif found := [{name: _cell(value) for name, value in row.items()} for row in rows]:
        names = [name for name in found[0] if any(row[name] for row in found)]
        emit_rows(None, names, [[row[name] for name in names] for row in found], texts=range(len(names)))


def emit_following(*arguments: object) -> None:
    """Names the command that is useful next, after a table on a terminal."""
    if arguments:
        print("Next:", "bridgetower", *(word if word.isupper() else shlex.quote(word) for word in map(str, arguments)))


def _cell(value: object) -> str:
    match value:
        case {"probability": float(probability), **named} if len(named) == 1:  # a class, a word
            return f"{_cell(*named.values())}  {probability:.3f}"
        case Mapping():
            return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
        case list() | tuple():
            between = "\n" if any(isinstance(one, Mapping) for one in value) else ", "
            return between.join(map(_cell, value))
        case None:
            return ""
        case float():
            return f"{value:.4g}"
    return one_line(str(value))


def emit_metrics(title: str, metrics: Mapping[str, float]) -> None:
    """Writes a line per metric; those of a retrieval evaluation in per cent, a column per stage, chance last."""
    if "chance_rsum" not in metrics:
        named = {name.replace("_", " "): value for name, value in metrics.items()}
        rows = [(name, f"{value:.4f}" if isinstance(value, float) else f"{value}") for name, value in named.items()]
        emit_rows(title, ("", ""), rows)
        return
    shown = [stage for stage in _STAGES if f"{stage}_rsum" in metrics]
    percent = {name: 100 * value for name, value in metrics.items()}
    found: dict[str, dict[str, str]] = {}
    for name in (metric.removeprefix("chance_") for metric in metrics if metric.startswith("chance_")):
        found[name.replace("_", " ")] = {stage: f"{percent[f'{stage}_{name}']:.1f}" for stage in shown}
    if "itm_accuracy" in metrics:
        found["itm accuracy"] = {"matching": f"{percent['itm_accuracy']:.1f}", "chance": "50.0"}
    if "itc_weight" in metrics:
        found["weight of ITC"] = {"two_stage": f"{metrics['itc_weight']:g}"}
    if "ece" in metrics:
        found["ECE of matches"] = {"matching": f"{percent['ece']:.1f}"}
    if "gain_difference" in metrics:
        gain, low, high = (percent[f"gain_{name}"] for name in ("difference", "low", "high"))
        found["text to image, less ITC alone"] = {"two_stage": f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"}
    if "calibration_pairs" in metrics:
        before, after = (percent[f"calibration_ece_{name}"] for name in ("before", "after"))
        found["ECE before and after calibration"] = {"matching": f"{before:.1f}, {after:.1f}"}
    cells = [[name, *(row.get(stage, "") for stage in shown)] for name, row in found.items()]
    emit_rows(f"{title}, in percent", ("", *(_STAGES[stage] for stage in shown)), cells)


def emit_rows(
    title: str | None, titles: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Collection[int] = (0,)
) -> None:
    """Writes a table of cells as they are shown; the columns whose numbers are not in `texts` end together."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title and Text(one_line(title)))
    for number, name in enumerate(titles):
        table.add_column(Text(name), justify="left" if number in texts else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def with_options(message: str, typed: Sequence[str] = (), known: Callable[[], Iterable[str]] = tuple) -> str:
    """Names options as they are typed: --truncate and --max-errors N for truncate=True and max_errors=N.

    Where the message names the value of an option that was typed, such as `batch_size`, or `heads.vqa` of
    `--model.heads.vqa`, the option takes its place. Of another option (`known` returns all), a name is replaced at the
    start and in advice ("lower batch_size"); elsewhere it could be of a file.
    """
    for option in sorted(_options(typed), key=len, reverse=True):
        for name in _names(option):
            message = re.sub(rf"(?<![\w./'\"-]){re.escape(name)}(?![\w/]|[.=]\w)", option, message)
    if _ADVICE.search(message):
        named = [(name, option) for option in _options(known()) for name in _names(option)]
        counts = Counter(name for name, _ in named)
        only = {name: option for name, option in named if counts[name] == 1 or name == _names(option)[0]}
        message = _ADVICE.sub(lambda found: found[1] + only.get(found[2], found[2]), message)

    def spelt(argument: re.Match[str]) -> str:
        name = argument[1].replace("_", "-")
        return {"True": f"--{name}", "False": f"--no-{name}", "N": f"--{name} N"}[argument[2]]

    return re.sub(r"\b([a-z_]+)=(True|False|N)\b", spelt, message)


def _options(arguments: Iterable[str]) -> set[str]:
    return {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}


def _names(option: str) -> list[str]:
    """How Python may call an option, the longest first; names of one word are left out, as they are words as well."""
    parts = option.removeprefix("--").replace("-", "_").split(".")
    names = [".".join(parts[start:]) for start in range(len(parts))]
    return [name for name in names if "_" in name or "." in name]
