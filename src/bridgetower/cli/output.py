"""Output of commands: JSON lines, or tables on a terminal, and messages that name options as they are typed."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections import defaultdict
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
_ADVICE = re.compile(
    r"(^|\b(?:lower|raise|give|pass|set|use|leave out) )([a-z]+(?:[_.][a-z]+)+)(?![\w/]|[.=]\w)"
)


class _OneLineFormatter(logging.Formatter):
    """Escapes control characters: a line feed in a file's name could feign an entry of the log."""

    def __init__(self, log_format: str, rename: Callable[[str], str]) -> None:
        super().__init__(log_format)
        self.rename = rename

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name in logging
        if record.levelno >= logging.WARNING:
            record.message = self.rename(record.message)
        return one_line(shortened(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - likewise
        return visible(super().formatException(ei))


def log_to(
    handler: logging.Handler,
    log_format: str,
    *,
    alone: bool = False,
    rename: Callable[[str], str] = str,
) -> None:
    """Sends warnings of all libraries and all entries of this one to a handler, a line each but for tracebacks.

    Args:
        handler: It is not used if there is a handler already.
        log_format: Of an entry.
        alone: Remove other handlers first.
        rename: Changes the text of warnings and errors.
    """
    handler.setFormatter(_OneLineFormatter(log_format, rename))
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


def emit_result(
    value: Mapping[str, object], *, json: bool, next_command: Sequence[object] = ()
) -> None:
    """Writes a line of JSON, or on a terminal a table with a row for each entry and the command that is useful next."""
    if is_json(json):
        emit(value)
        return
    rows = [(name.replace("_", " "), _displayed_text(entry)) for name, entry in value.items()]
    emit_rows(None, ("", ""), rows, texts=(0, 1))
    emit_next_command(*next_command)


def emit_results(rows: Iterable[Mapping[str, object]], *, json: bool) -> None:
    """Writes a line of JSON per row, or on a terminal a table without its empty columns."""
    if is_json(json):
        for row in rows:
            emit(row)
        return
    cells = [{name: _displayed_text(value) for name, value in row.items()} for row in rows]
    if not cells:
        return
    names = [name for name in cells[0] if any(row[name] for row in cells)]
    emit_rows(
        None, names, [[row[name] for name in names] for row in cells], texts=range(len(names))
    )


def emit_next_command(*arguments: object) -> None:
    """Names the command that is useful next, after a table on a terminal."""
    if arguments:
        print("Next:", "bridgetower", shlex.join(map(str, arguments)))


def _displayed_text(value: object) -> str:
    match value:
        case {"probability": float(probability), **named} if len(named) == 1:  # a class, a word
            return f"{_displayed_text(*named.values())}  {probability:.3f}"
        case Mapping() if any(isinstance(entry, Mapping) for entry in value.values()):
            return "\n".join(f"{name}: {_displayed_text(entry)}" for name, entry in value.items())
        case Mapping():
            return ", ".join(f"{name} {_displayed_text(entry)}" for name, entry in value.items())
        case list() | tuple():
            has_mappings = any(isinstance(entry, Mapping) for entry in value)
            separator = "\n" if has_mappings else ", "
            return separator.join(map(_displayed_text, value))
        case None:
            return ""
        case float():
            return f"{value:.4g}"
    return one_line(str(value))


def emit_metrics(title: str, metrics: Mapping[str, float]) -> None:
    """Writes a line per metric. Retrieval is in percent, with a column per stage and chance last."""
    if "chance_rsum" in metrics:
        _emit_retrieval(title, metrics)
        return
    rows = []
    for name, value in metrics.items():
        rows.append(
            (name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else f"{value}")
        )
    emit_rows(title, ("", ""), rows)


def _emit_retrieval(title: str, metrics: Mapping[str, float]) -> None:
    stages = [stage for stage in _STAGES if f"{stage}_rsum" in metrics]
    percent = {name: 100 * value for name, value in metrics.items()}
    rows: dict[str, dict[str, str]] = {}  # cells by stage

    # Recalls of every stage.
    for metric in metrics:
        if metric.startswith("chance_"):
            recall = metric.removeprefix("chance_")
            cells = {stage: f"{percent[f'{stage}_{recall}']:.1f}" for stage in stages}
            rows[recall.replace("_", " ")] = cells

    # What only some evaluations have.
    if "itm_accuracy" in metrics:
        rows["itm accuracy"] = {"matching": f"{percent['itm_accuracy']:.1f}", "chance": "50.0"}
    if "itc_weight" in metrics:
        rows["weight of ITC"] = {"two_stage": f"{metrics['itc_weight']:g}"}
    if "ece" in metrics:
        rows["ECE of matches"] = {"matching": f"{percent['ece']:.1f}"}
    if "gain_difference" in metrics:
        interval = f"{percent['gain_low']:+.1f} to {percent['gain_high']:+.1f}"
        rows["text to image, less ITC alone"] = {
            "two_stage": f"{percent['gain_difference']:+.1f} ({interval})"
        }
    if "calibration_pairs" in metrics:
        errors = f"{percent['calibration_ece_before']:.1f}, {percent['calibration_ece_after']:.1f}"
        rows["ECE before and after calibration"] = {"matching": errors}

    table = [[name, *(cells.get(stage, "") for stage in stages)] for name, cells in rows.items()]
    titles = [_STAGES[stage] for stage in stages]
    emit_rows(f"{title}, in percent", ("", *titles), table)


def emit_rows(
    title: str | None,
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    texts: Collection[int] = (0,),
) -> None:
    """Writes a table of cells. Columns are aligned to the right, those in `texts` to the left."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title and Text(one_line(title)))
    for number, name in enumerate(titles):
        table.add_column(Text(name), justify="left" if number in texts else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def with_options(
    message: str, typed: Sequence[str] = (), all_options: Callable[[], Iterable[str]] = tuple
) -> str:
    """Names options as they are typed: --truncate and --max-errors N for truncate=True and max_errors=N.

    Where the message names the value of an option that was typed, such as `batch_size`, or `heads.vqa` of
    `--model.heads.vqa`, the option takes its place. Of all other options, a name is replaced at
    the start and in advice ("lower batch_size"); elsewhere it could be of a file.
    """
    for option in sorted(_options(typed), key=len, reverse=True):
        for name in _field_names(option):
            message = re.sub(rf"(?<![\w./'\"-]){re.escape(name)}(?![\w/]|[.=]\w)", option, message)
    if _ADVICE.search(message):
        # Options by the names of fields that stand for one option alone.
        options_of = defaultdict[str, list[str]](list)
        option_of_path: dict[str, str] = {}
        for option in _options(all_options()):
            names = _field_names(option)
            option_of_path |= dict.fromkeys(names[:1], option)
            for name in names:
                options_of[name].append(option)
        option_of = {
            name: options[0] for name, options in options_of.items() if len(options) == 1
        } | option_of_path
        message = _ADVICE.sub(lambda match: match[1] + option_of.get(match[2], match[2]), message)

    def option_with_value(setting: re.Match[str]) -> str:
        option = "--" + setting[1].replace("_", "-")
        flags = {"True": option, "False": option.replace("--", "--no-", 1)}
        return flags.get(setting[2], f"{option} {setting[2]}")

    return re.sub(r"\b([a-z_]+)=(True|False|N|NAME|FOLDER)\b", option_with_value, message)


def _options(arguments: Iterable[str]) -> set[str]:
    return {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}


def _field_names(option: str) -> list[str]:
    """Returns the names of an option in Python, longest first, without names of one word, which occur in prose."""
    words = option.removeprefix("--").replace("-", "_").split(".")
    names = [".".join(words[start:]) for start in range(len(words))]
    return [name for name in names if "_" in name or "." in name]
