"""The options of a command's help in panels, with those of the command itself first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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

Panel = tuple[str, list[list[str]], str]
"""The line above a panel, its entries, and the line below it. Lines before the first entry are one too."""


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
        line = remaining.pop(0)
        title = re.match(r"╭─ ((?:[\w.-]+ )?options) ─", _COLOUR.sub("", line))
        if not title:
            lines.append(line)
            continue
        end = next(row for row, below in enumerate(remaining) if "╰" in below)
        panel = line, _entries(remaining[:end]), remaining[end]
        remaining = remaining[end + 1 :]
        if main is not None:
            panel, count = _main_entries(panel, main)
            num_left_out += count
        if title[1] == "options" and command not in _MAIN:
            lines += _split(panel)
        elif panel[1]:
            lines += _joined(panel)
    if num_left_out:
        lines.append(f"{num_left_out} more options: bridgetower {command} … {ALL}")
    return "\n".join(lines) + "\n"


def _entries(lines: Sequence[str]) -> list[list[str]]:
    """Returns the lines of each option."""
    entries: list[list[str]] = []
    for line in lines:
        if not entries or _name(line):
            entries.append([])
        entries[-1].append(line)
    return entries


def _name(line: str) -> str:
    match = _OPTION.match(_COLOUR.sub("", line))
    return match[1] if match else ""


def _main_entries(panel: Panel, main: Sequence[str]) -> tuple[Panel, int]:
    """Returns a panel with the options that matter most, and the number of the others."""
    top, entries, bottom = panel
    kept = [entry for entry in entries if _name(entry[0]) in main]
    return (top, kept, bottom), len(entries) - len(kept)


def _split(panel: Panel) -> list[str]:
    """Returns the lines of the panel of options as several, with the command's own first."""
    top, entries, bottom = panel
    panel_of = {name: title for title, names in _PANELS.items() for name in names}
    entries_of: dict[str, list[list[str]]] = {"options": [], **{title: [] for title in _PANELS}}
    for entry in entries:
        entries_of[panel_of.get(_name(entry[0]), "options")].append(entry)
    if not entries_of["model"]:  # few options, which need no order
        return _joined(panel)
    lines: list[str] = []
    for title, of_panel in entries_of.items():
        if of_panel:
            lines += _joined((_retitled(top, title), of_panel, bottom))
    return lines


def _retitled(top: str, title: str) -> str:
    """Returns the line above a panel with another title, as wide as before."""
    filled = f"╭─ {title} "
    before = "╭─ options "
    width = len(before) - len(filled)
    dashes = "─" * abs(width)
    if width >= 0:
        return top.replace(f"{before}─", f"{filled}─{dashes}", 1)
    return top.replace(f"{before}{dashes}", filled, 1)


def _joined(panel: Panel) -> list[str]:
    top, entries, bottom = panel
    return [top, *(line for entry in entries for line in entry), bottom]
