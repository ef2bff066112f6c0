"""One self-contained page about what a model got wrong on a set; `templates/errors.html` is its form."""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from bridgetower.data.examples import PreparedImages
from bridgetower.drawing import FAINT, SERIES, STYLE, png
from bridgetower.evaluation.config import Judgement
from bridgetower.evaluation.metrics import BINS, expected_calibration_error, reliability
from bridgetower.files import write_text
from bridgetower.reports.numbers import count, percent
from bridgetower.reports.pages import Row, Table, page_templates, small

MISSES = 48  # that are shown

_CONFUSIONS, _VALUES = 20, 50  # most that are listed: pairs, values of a column
_Z = 1.96  # of the 95 % interval


def write_errors(
    path: Path,
    judgements: Sequence[Judgement],
    images: PreparedImages,
    *,
    title: str,
    misses: int = MISSES,
    slices: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Writes the page; slices are further columns of examples by their ids."""
    if not judgements:
        raise ValueError("no right answer is known of this split, or its task judges none; a report takes some")
    if slices is not None:
        if not any(one.id in slices for one in judgements):
            raise ValueError(f"the slices have none of the {len(judgements)} examples, such as id {judgements[0].id}")
        judgements = [replace(one, groups={**one.groups, **slices.get(one.id, {})}) for one in judgements]
    is_retrieval = judgements[0].found is not None
    wrong = [one for one in judgements if one.score < 1 and one.given != one.expected]
    worst = sorted(wrong, key=lambda one: -one.miss)
    pairs = Counter((one.expected, one.given) for one in worst)
    rows = [Row(expected, (given, count(number))) for (expected, given), number in pairs.most_common(_CONFUSIONS)]
    confusions = Table(caption="The most frequent", columns=("right answer", "the model", "examples"), rows=rows)
    total, right = count(len(judgements)), percent(fmean(one.score for one in judgements))
    page = (
        page_templates()
        .get_template("errors.html")
        .render(
            title=title,
            lead=f"{right} of {total} examples are right; {count(len(worst))} are not, or not quite.",
            is_retrieval=is_retrieval,
            misses=[_shown(one, images) for one in worst[:misses]],
            confusions=confusions if rows and not is_retrieval else None,
            calibration=_calibration(judgements),
            slices=_slices(judgements, with_answers=not is_retrieval),
        )
    )
    write_text(path, page)


def read_slices(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            table = list(csv.DictReader(file))
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read as CSV ({error})") from error
    if not table or "id" not in table[0]:
        raise ValueError(f"{path} has no rows with a column id; expected a CSV with id and the columns to slice by")
    if any(None in row for row in table):
        raise ValueError(f"{path} has a row with more cells than its header; quote texts with commas")
    return {row["id"]: {name: value for name, value in row.items() if name != "id" and value} for row in table}


def _shown(one: Judgement, images: PreparedImages) -> dict[str, Any]:
    """A judgement with small copies of its images, as every browser shows them."""
    numbers = [(image, "right image" if one.found is not None else "") for image in one.images]
    numbers += [] if one.found is None else [(one.found, "found first")]
    copies = [
        small(content, images.processor.config.background) for content in images.contents([n for n, _ in numbers])
    ]
    return {**vars(one), "images": [(copy, title) for copy, (_, title) in zip(copies, numbers, strict=True)]}


def _calibration(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """How often answers are right by their probability; None where there is none."""
    known = [(one.probability, one.score) for one in judgements if one.probability is not None]
    if not known:
        return None
    bins = reliability(*torch.tensor(known, dtype=torch.float64).T)
    ranges = [f"{100 * one.number // BINS} to {100 * (one.number + 1) // BINS} %" for one in bins]
    cells = [(count(one.examples), percent(one.probability), percent(one.right)) for one in bins]
    with rc_context(STYLE):
        drawing = Figure(figsize=(4.8, 3.4), layout="constrained")
        axes = drawing.add_subplot(xlabel="probability [%]", ylabel="right answers [%]", xlim=(0, 100), ylim=(0, 103))
        axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":")
        axes.plot([100 * one.probability for one in bins], [100 * one.right for one in bins], "o-", color=SERIES[0])
    return {
        "error": expected_calibration_error(bins),
        "drawing": png(drawing),
        "table": Table("", ("probability", "examples", "mean probability", "right"), [*map(Row, ranges, cells)]),
    }


def _slices(judgements: Sequence[Judgement], *, with_answers: bool) -> list[Table]:
    """A table for each column that has some values, each with its share of right answers."""
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in judgements:
        groups = {"right answer": one.expected, **one.groups} if with_answers else one.groups
        for name, value in groups.items():
            columns[name][value].append(one.score)
    tables = []
    for name, values in columns.items():
        if not 1 < len(values) <= _VALUES:
            continue
        rows = []
        for value, scores in sorted(values.items(), key=lambda item: (fmean(item[1]), item[0])):
            n, share = len(scores), fmean(scores)
            centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)  # Wilson's interval
            half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
            interval = f"{percent(max(0.0, centre - half))} to {percent(min(1.0, centre + half))}"
            rows.append(Row(value, (count(n), percent(share), interval)))
        name = name.replace("_", " ")
        tables.append(Table(f"By {name}", (name, "examples", "right", "95 % interval"), rows))
    return tables
