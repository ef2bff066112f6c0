"""What the command line shows: JSON lines, or a table for a reader at a terminal; errors and help in its terms."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bridgetower.files import to_json, write_text

if TYPE_CHECKING:
    from bridgetower.analysis.results import Spread

_Verb = TypeVar("_Verb", bound=Callable[..., None])

_STAGES = {"itc": "contrastive", "two_stage": "after matching", "one_stage": "all pairs", "chance": "chance"}
_HEADLINE = ("rsum", "itc_rsum", "chance_rsum", "itm_accuracy")


def emit(value: object) -> None:
    """Writes one line of JSON."""
    sys.stdout.write(_line(value))


def emit_lines(rows: Iterable[object], out: Path | None = None) -> None:
    """Writes a line of JSON per row, to the file `out` if given."""
    if out is None:
        sys.stdout.writelines(map(_line, rows))
    else:
        write_text(out, "".join(map(_line, rows)))


def emit_table(title: str, figures: Mapping[str, float]) -> None:
    """Writes the figures of a retrieval evaluation in per cent: a line per figure, a column per stage, chance last."""
    from rich.console import Console
    from rich.table import Table

    shown = [stage for stage in _STAGES if f"{stage}_rsum" in figures]
    table = Table("", *(_STAGES[stage] for stage in shown), title=title)
    for name in (figure.removeprefix("chance_") for figure in figures if figure.startswith("chance_")):
        scale = 1 if name == "rsum" else 100  # RSUM is a sum of percentages
        table.add_row(name.replace("_", " "), *(f"{scale * figures[f'{stage}_{name}']:.1f}" for stage in shown))
    if "itm_accuracy" in figures:
        accuracy = {"two_stage": figures["itm_accuracy"], "chance": 0.5}
        table.add_row("itm accuracy", *(f"{100 * accuracy[stage]:.1f}" if stage in accuracy else "" for stage in shown))
    Console().print(table)


def emit_figures(title: str, figures: Mapping[str, float]) -> None:
    """Writes a line per figure; those that are shares are in per cent."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", title=title)
    for name, value in figures.items():
        is_share = isinstance(value, float) and not name.startswith("vqa_score")  # which is in per cent already
        table.add_row(name.replace("_", " "), f"{100 * value:.2f} %" if is_share else f"{value}")
    Console().print(table)


def headline(summary: Mapping[str, Mapping[str, Mapping[str, Spread]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns of the demo's summary what it comes to: data set → figure → arm → mean over seeds."""
    return {
        name: {
            figure: {arm: spread["mean"] for arm, spread in arms.items()}
            for figure, arms in figures.items()
            if figure in _HEADLINE
        }
        for name, figures in summary.items()
    }


def with_options(message: str) -> str:
    """Names options as they are typed: --truncate, where Python callers read truncate=True."""
    return re.sub(r"\b([a-z_]+)=True\b", lambda found: "--" + found[1].replace("_", "-"), message)


def with_whole_entries(verb: _Verb) -> _Verb:
    """Joins the lines of each entry under "Args", which the help would break where they break in the source."""
    verb.__doc__ = re.sub(r"\n {12}(?=\S)", " ", verb.__doc__ or "")
    return verb


def _line(value: object) -> str:
    return to_json(value) + "\n"
