"""The options of a command's help in panels, with those of the command itself first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain

ALL = "--help-all"
"""Option that shows every option of a command whose help shows the ones that matter most."""

WIDEST = 129  # columns up to which tyro writes one panel below the other

_PANELS: Mapping[str, tuple[str, ...]] = {
    "model": (
        "revision",
        "subfolder",
        "image-size",
        "tokenizer",
        "answers",
        "extensions",
        "task-spec",
    ),
    "engine": (
        "device",
        "precision",
        "engine",
        "compile",
        "cache",
        "fast-decode",
        "batch-size",
        "num-workers",
        "truncate",
    ),
    "output": ("out", "report", "slices", "sheet", "progress", "json"),
}
"""Options that several commands share, by panel."""

_MAIN: Mapping[str, tuple[str, ...]] = {
    "train": (
        "help",
        "out",
        "init",
        "vision",
        "text",
        "image-size",
        "data.folders",
        "data.train-splits",
        "data.validation-split",
        "data.num-workers",
        "batch-size",
        "micro-batch-size",
        "max-steps",
        "max-epochs",
        "optimizer.lr",
        "freeze-towers",
        "train-top",
        "precision",
        "device",
        "evaluate-every",
        "select-by",
        "seed",
        "resume",
        "json",
    )
}
"""Options that matter most, of commands with more than a hundred."""

_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_OPTION = re.compile(r"[│|] (?:-\w, )?--([a-z][\w.-]*)")


def in_panels(text: str, command: str, *, show_all: bool) -> str:
    """Returns the help of a command with its options in panels.

    Args:
        text: The help as tyro writes it, in one column.
        command: Name of the command.
        show_all: Show also the options that matter less.
    """
    main = None if show_all else _MAIN.get(command)
    lines: list[str] = []
    num_left_out = 0
    remaining = text.splitlines()
    while remaining:
        # Lines outside of the panels of options stay.
        line = remaining.pop(0)
        title = re.match(r"╭─ ((?:[\w.-]+ )?options) ─", _COLOUR.sub("", line))
        if not title:
            lines.append(line)
            continue

        # The entries of a panel, up to its lower border.
        end = next(row for row, below in enumerate(remaining) if "╰" in below)
        entries = _entries(remaining[:end])
        bottom = remaining[end]
        remaining = remaining[end + 1 :]

        # Those that matter most, and the panel around them.
        if main is not None:
            names = [_option_name(entry[0]) for entry in entries]
            num_left_out += sum(bool(name) and name not in main for name in names)
            entries = [entry for entry, name in zip(entries, names, strict=True) if name in main]
        if title[1] == "options" and command not in _MAIN:
            lines += _split_panel(line, entries, bottom)
        elif entries:
            lines += [line, *chain.from_iterable(entries), bottom]
    if num_left_out:
        lines.append(f"{num_left_out} more options: bridgetower {command} … {ALL}")
    return "\n".join(lines) + "\n"


def _entries(lines: Sequence[str]) -> list[list[str]]:
    """Returns the lines of each option, after those before the first one."""
    entries: list[list[str]] = []
    for line in lines:
        if not entries or _option_name(line):
            entries.append([])
        entries[-1].append(line)
    return entries


def _option_name(line: str) -> str:
    match = _OPTION.match(_COLOUR.sub("", line))
    return match[1] if match else ""


def _split_panel(top: str, entries: Sequence[list[str]], bottom: str) -> list[str]:
    """Returns the panel of options as several, with the command's own first, unless it has few."""
    panel_of = {name: title for title, names in _PANELS.items() for name in names}
    entries_of: dict[str, list[list[str]]] = {"options": [], **{title: [] for title in _PANELS}}
    for entry in entries:
        entries_of[panel_of.get(_option_name(entry[0]), "options")].append(entry)
    if not entries_of["model"]:
        return [top, *chain.from_iterable(entries), bottom]
    lines: list[str] = []
    for title, of_panel in entries_of.items():
        if of_panel:
            dashes = "─" * (1 + len("options") - len(title))
            lines.append(top.replace("─ options ─", f"─ {title} {dashes}", 1))
            lines += chain.from_iterable(of_panel)
            lines.append(bottom)
    return lines
