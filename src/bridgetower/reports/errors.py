"""A self-contained page about the examples of a set that a model got wrong."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from bridgetower.data.batches.examples import PreparedImages
from bridgetower.drawing import FAINT, SERIES, STYLE, png
from bridgetower.evaluation.config import Judgement
from bridgetower.evaluation.metrics import BINS, expected_calibration_error, reliability
from bridgetower.files import write_text
from bridgetower.reports.numbers import count, percent
from bridgetower.reports.pages import ReportTable, Row, page_templates, thumbnail

MISSES = 48  # shown by default

_MAX_CONFUSIONS = 20
_MAX_SLICES = 50  # values of a column
_Z = 1.96  # of a 95 % interval


def write_errors(
    path: Path,
    judgements: Sequence[Judgement],
    images: PreparedImages,
    *,
    title: str,
    misses: int = MISSES,
    slices: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Writes the page.

    Args:
        path: Of the HTML file.
        judgements: Examples whose answers are known.
        images: Images of the set.
        title: Of the page.
        misses: Wrong examples that are shown.
        slices: Further columns of examples, by their ids.
    """
    if not judgements:
        raise ValueError(
            "no right answer is known of this split, or its task judges none; a report takes some"
        )
    if slices is not None:
        if not any(judgement.id in slices for judgement in judgements):
            raise ValueError(
                f"the slices have none of the {len(judgements)} examples, such as id {judgements[0].id}"
            )
        judgements = [
            replace(judgement, groups={**judgement.groups, **slices.get(judgement.id, {})})
            for judgement in judgements
        ]
    is_retrieval = judgements[0].predicted_image is not None
    wrong = []
    for judgement in judgements:
        if judgement.score < 1 and judgement.prediction != judgement.target:
            wrong.append(judgement)
    worst_first = sorted(wrong, key=lambda judgement: -judgement.error)
    accuracy = percent(fmean(judgement.score for judgement in judgements))
    num_examples = count(len(judgements))
    num_wrong = count(len(wrong))
    lead = f"{accuracy} of {num_examples} examples are right; {num_wrong} are not, or not quite."
    template = page_templates().get_template("errors.html")
    page = template.render(
        title=title,
        lead=lead,
        is_retrieval=is_retrieval,
        misses=[card(judgement, images) for judgement in worst_first[:misses]],
        confusions=None if is_retrieval else _confusions(worst_first),
        calibration=_calibration(judgements),
        slices=_slices(judgements, with_answers=not is_retrieval),
    )
    write_text(path, page)


def read_slices(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            rows = list(csv.DictReader(file))
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read as CSV ({error})") from error
    if not rows or "id" not in rows[0]:
        raise ValueError(
            f"{path} has no rows with a column id; expected a CSV with id and the columns to slice by"
        )
    if any(None in row for row in rows):
        raise ValueError(
            f"{path} has a row with more cells than its header; quote texts with commas"
        )
    slices = {}
    for row in rows:
        example_id = row.pop("id")
        slices[example_id] = {column: value for column, value in row.items() if value}
    return slices


def card(judgement: Judgement, images: PreparedImages) -> dict[str, Any]:
    """Returns the fields of a judgement with thumbnails of its images and their titles."""
    indices = list(judgement.images)
    titles = [""] * len(indices)
    if judgement.predicted_image is not None:
        indices.append(judgement.predicted_image)
        titles = ["right image"] * len(titles) + ["found first"]
    background = images.processor.config.background
    thumbnails = [thumbnail(content, background) for content in images.contents(indices)]
    return {**vars(judgement), "images": list(zip(thumbnails, titles, strict=True))}


def _confusions(wrong: Sequence[Judgement]) -> ReportTable | None:
    """Returns the pairs of right and wrong answer that occur most often."""
    if not wrong:
        return None
    pairs = Counter((judgement.target, judgement.prediction) for judgement in wrong)
    rows = []
    for (target, prediction), num_examples in pairs.most_common(_MAX_CONFUSIONS):
        rows.append(Row(target, (prediction, count(num_examples))))
    return ReportTable("The most frequent", ("right answer", "the model", "examples"), rows)


def _calibration(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """Returns how often answers are right by their probability, or None if they have none."""
    judged = [judgement for judgement in judgements if judgement.probability is not None]
    if not judged:
        return None
    points = [(judgement.probability, judgement.score) for judgement in judged]
    bins = reliability(*torch.tensor(points, dtype=torch.float64).T)

    rows = []
    for bin_ in bins:
        lower = 100 * bin_.number // BINS
        upper = 100 * (bin_.number + 1) // BINS
        examples = count(bin_.examples)
        cells = (examples, percent(bin_.probability), percent(bin_.right))
        rows.append(Row(f"{lower} to {upper} %", cells))

    with rc_context(STYLE):
        drawing = Figure(figsize=(4.8, 3.4), layout="constrained")
        axes = drawing.add_subplot()
        axes.set(xlabel="probability [%]", ylabel="right answers [%]")
        axes.set(xlim=(0, 100), ylim=(0, 103))
        axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":")
        mean_probabilities = [100 * bin_.probability for bin_ in bins]
        accuracies = [100 * bin_.right for bin_ in bins]
        axes.plot(mean_probabilities, accuracies, "o-", color=SERIES[0])
    return {
        "error": expected_calibration_error(bins),
        "drawing": png(drawing),
        "table": ReportTable("", ("probability", "examples", "mean probability", "right"), rows),
    }


def _slices(judgements: Sequence[Judgement], *, with_answers: bool) -> list[ReportTable]:
    """Returns a table of accuracies for each column with several values."""
    scores_by_column: dict[str, dict[str, list[float]]] = {}
    for judgement in judgements:
        groups = dict(judgement.groups)
        if with_answers:
            groups = {"right answer": judgement.target, **groups}
        for column, value in groups.items():
            scores_by_value = scores_by_column.setdefault(column, {})
            scores_by_value.setdefault(value, []).append(judgement.score)

    tables = []
    for column, scores_by_value in scores_by_column.items():
        if not 1 < len(scores_by_value) <= _MAX_SLICES:
            continue
        worst_first = sorted(
            scores_by_value, key=lambda value: (fmean(scores_by_value[value]), value)
        )
        rows = [Row(value, _accuracy_cells(scores_by_value[value])) for value in worst_first]
        name = column.replace("_", " ")
        tables.append(ReportTable(f"By {name}", (name, "examples", "right", "95 % interval"), rows))
    return tables


def _accuracy_cells(scores: Sequence[float]) -> tuple[str, str, str]:
    """Returns number, mean and Wilson's interval of scores."""
    n = len(scores)
    share = fmean(scores)
    scale = 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / scale
    variance = share * (1 - share) / n
    half_width = _Z * math.sqrt(variance + _Z**2 / (4 * n**2)) / scale
    lower = percent(max(0.0, centre - half_width))
    upper = percent(min(1.0, centre + half_width))
    return count(n), percent(share), f"{lower} to {upper}"
