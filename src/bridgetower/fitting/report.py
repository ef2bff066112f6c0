"""The page about a fit: the result beside its baselines, examples, confusions, and what was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridgetower.evaluation.config import Judgement, Outcome
from bridgetower.files import write_text
from bridgetower.fitting.measure import FitResult
from bridgetower.fitting.plan import FitPlan
from bridgetower.reports.errors import card
from bridgetower.reports.numbers import count
from bridgetower.reports.pages import ReportTable, Row, page_templates

_EXAMPLES = 8  # right ones, and as many wrong ones
_MAX_CLASSES = 15  # of the table of confusions, the most frequent ones


def write_report(
    path: Path,
    plan: FitPlan,
    result: FitResult,
    outcomes: Sequence[Outcome],
    judgements: Sequence[Sequence[Judgement]],
) -> None:
    """Writes the page.

    Args:
        path: Of the HTML file.
        plan: What was done.
        result: What was reached.
        outcomes: Of each tested split.
        judgements: Of each tested split.
    """
    right: list[Any] = []
    wrong: list[Any] = []
    flat = [judgement for split in judgements for judgement in split]
    for outcome, of_split in zip(outcomes, judgements, strict=True):
        assert outcome.images is not None
        share = -(-_EXAMPLES // len(outcomes))
        for cards, is_right in ((right, True), (wrong, False)):
            entries = [entry for entry in of_split if (entry.score >= 0.5) == is_right][:share]
            cards += [card(judgement, outcome.images) for judgement in entries]
    better = "lower is better" if result.is_error else "higher is better"
    table = ReportTable(
        caption=f"{result.metric} ({better}) of {count(result.num_examples)} tested examples with "
        f"{count(result.num_images)} images, with 95 % intervals over draws of images",
        columns=("", result.metric),
        rows=[Row(name, (value,)) for name, value in result.lines()],
    )
    template = page_templates().get_template("fit.html")
    page = template.render(
        title=f"{Path(plan.source).name}: {plan.task.kind}",
        lead=result.verdict,
        is_retrieval=plan.task.kind == "pairs",
        result=table,
        examples=[*right[:_EXAMPLES], *wrong[:_EXAMPLES]],
        confusions=_confusion_table(flat)
        if plan.task.kind not in ("pairs", "regression")
        else None,
        plan=plan,
    )
    write_text(path, page)


def _confusion_table(judgements: Sequence[Judgement]) -> ReportTable | None:
    """Returns how often each right answer got each answer of the model."""
    targets = Counter(judgement.target for judgement in judgements)
    names = [name for name, _ in targets.most_common(_MAX_CLASSES)]
    if len(names) < 2:
        return None
    pairs = Counter((judgement.target, judgement.prediction) for judgement in judgements)
    rows = []
    for target in names:
        cells = [count(pairs[target, prediction]) for prediction in names]
        num_others = targets[target] - sum(pairs[target, prediction] for prediction in names)
        rows.append(Row(target, (*cells, count(num_others))))
    return ReportTable(
        caption="Right answers in rows, answers of the model in columns",
        columns=("", *names, "others"),
        rows=rows,
    )
