"""One self-contained HTML page about a finished demo; `templates/report.html` is its form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bridgetower.files import flattened
from bridgetower.reports.numbers import MINUS, count, mean_std, number, spread, with_interval
from bridgetower.reports.pages import ReportTable, Row, page_templates
from bridgetower_demo.examples import AnswerExample, SearchExample
from bridgetower_demo.findings import (
    ARM_NAMES,
    comparison,
    duration,
    gflops,
    listing,
    millions,
    ordinal,
)
from bridgetower_demo.results import ARMS, PARTS, Arm, DemoResults

_STAGES = {"itc": "contrastive", "matching": "matching", "two_stage": "two-stage"}
_DIRECTIONS = {"image_to_text": "texts for an image", "text_to_image": "images for a text"}
_KS = (1, 5, 10)
_DIFFERENCE = f"{ARM_NAMES['bridgetower']} {MINUS} {ARM_NAMES['meter']}"


def render_report(
    results: DemoResults,
    searches: Mapping[str, Sequence[SearchExample]],
    answers: Sequence[AnswerExample] = (),
) -> str:
    """Returns the page.

    Args:
        results: Everything measured.
        searches: Test → example searches.
        answers: Questions with the model's answers.

    Raises:
        ValueError: An image of the examples cannot be read.
    """
    templates = page_templates(__package__)
    templates.filters |= {"ordinal": ordinal, "duration": duration, "in_words": _in_words}
    tested = list(results.runs[0].test)
    return templates.get_template("report.html").render(
        title=f"BridgeTower on {listing([dataset.name for dataset in results.datasets])}",
        results=results,
        headline=results.headline(),
        seeds=len(results.seeds("bridgetower")),
        train={
            name: sum(dataset.splits["train"][name] for dataset in results.datasets)
            for name in ("images", "captions")
        },
        tests=listing(
            [f"{count(images)} of {_in_words(test)}" for test, images in results.tests.items()]
        ),
        searches=searches,
        answers=answers,
        measured=_tables(results, ARMS[:1]),
        compared=_tables(results, ARMS) if results.arms == ARMS else None,
        differences={
            test: comparison(found["rsum"]) for test, found in results.differences().items()
        },
        matched="itm_accuracy" in results.runs[0].test[tested[0]],
        data=list(_data(results)),
        versions=list(results.versions.items()),
        settings=[(name, str(value)) for name, value in flattened(results.settings)],
    )


def _in_words(test: str) -> str:
    return test.replace("-", " ")


def _tables(results: DemoResults, arms: Sequence[Arm]) -> dict[str, Any]:
    """What was measured of one arm, or of both with their differences."""
    return {
        "recall": [_recall_table(results, test, arms) for test in results.runs[0].test],
        "matching": _matching_table(results, arms),
        "answers": _answers_table(results, arms) if results.answers else None,
        "cost": [_size_table(results, arms)],
    }


def _recall_table(results: DemoResults, test: str, arms: Sequence[Arm]) -> ReportTable:
    """Recalls of all stages and of a random ranking on one test, and their sum."""
    summary = results.summary()[test]
    by_arm = {arm: {metric: spreads[arm] for metric, spreads in summary.items()} for arm in arms}
    stages = [stage for stage in _STAGES if f"{stage}_rsum" in summary]
    rows = [
        Row(f"{ARM_NAMES[arm]}, {_STAGES[stage]}", _recall_cells(by_arm[arm], stage))
        for arm in arms
        for stage in stages
    ]
    if len(arms) > 1:
        differences = results.differences()[test]
        rows += [
            Row(
                f"{_DIFFERENCE}, {_STAGES[stage]}",
                _recall_cells(differences, stage, with_interval),
                "difference",
            )
            for stage in stages
        ]
    chance = [cell.partition(" ± ")[0] for cell in _recall_cells(by_arm[arms[0]], "chance")]
    return ReportTable(
        caption=f"Recall on {_in_words(test)}, in percent",
        columns=["model and ranking", *(f"at {k}" for _ in _DIRECTIONS for k in _KS), "of 600"],
        rows=[*rows, Row("random ranking", chance, "quiet")],
        groups=[("", 1), *((name, len(_KS)) for name in _DIRECTIONS.values()), ("sum", 1)],
    )


def _recall_cells(
    metrics: Mapping[str, Any], stage: str, shown: Callable[..., str] = mean_std
) -> list[str]:
    """Recalls of a stage and their sum, as `shown` writes a spread or a difference."""
    names = [f"{stage}_{direction}_r{k}" for direction in _DIRECTIONS for k in _KS]
    return [shown(metrics[name], scale=100) for name in (*names, f"{stage}_rsum")]


def _matching_table(results: DemoResults, arms: Sequence[Arm]) -> ReportTable:
    """Share of pairs of which the matching head is right, beside guessing."""
    summary = results.summary()
    if not all("itm_accuracy" in metrics for metrics in summary.values()):
        return ReportTable(missing="Matching was not measured: these models have no matching head.")
    rows = [
        Row(
            ARM_NAMES[arm],
            [mean_std(metrics["itm_accuracy"][arm], scale=100) for metrics in summary.values()],
        )
        for arm in arms
    ]
    return ReportTable(
        caption="Matching accuracy in percent",
        columns=["model", *map(_in_words, summary)],
        rows=[*rows, Row("guessing", ["50.0"] * len(summary), "quiet")],
    )


def _answers_table(results: DemoResults, arms: Sequence[Arm]) -> ReportTable:
    """Share of questions of each topic that are answered right, with the image and without."""
    counts = results.answers[0].topics

    def cells(arm: str, name: str) -> list[str]:
        own = [answers.topics for answers in results.answers if answers.arm == arm]
        return [
            mean_std(spread([getattr(topics[topic], name) for topics in own]), scale=100)
            for topic in counts
        ]

    rows = [
        Row(f"{ARM_NAMES[arm]}, {title}", cells(arm, name), style)
        for name, title, style in (
            ("model", "right image", ""),
            ("other_image", "another image", "quiet"),
        )
        for arm in arms
    ]
    if len(arms) > 1:
        differences = [
            with_interval(one, scale=100) for one in results.answer_differences().values()
        ]
        rows.insert(len(arms), Row(_DIFFERENCE, differences, "difference"))
    floors = (("text_only", "the question alone"), ("majority", "the commonest answer"))
    return ReportTable(
        caption="Questions answered right, in percent",
        columns=["who answers", *(f"{topic} ({count(counts[topic].number)})" for topic in counts)],
        rows=[*rows, *(Row(title, cells(arms[0], name), "quiet") for name, title in floors)],
    )


def _size_table(results: DemoResults, arms: Sequence[Arm]) -> ReportTable:
    costs = [cost for cost in results.costs if cost.arm in arms]

    def cells(sizes: Sequence[tuple[int, float]]) -> list[str]:
        return [
            cell for parameters, flops in sizes for cell in (millions(parameters), gflops(flops))
        ]

    rows = [
        Row(
            part,
            cells([(c.parameters_by_part[part], c.gflops_per_pair_by_part[part]) for c in costs]),
        )
        for part in PARTS
    ]
    totals = cells(
        [(cost.parameters, sum(cost.gflops_per_pair_by_part.values())) for cost in costs]
    )
    return ReportTable(
        caption="Parameters; time and operations of matching one image with one text",
        columns=["part", *(["parameters", "10⁹ operations"] * len(costs))],
        rows=[*rows, Row("whole model", totals, "difference")],
        groups=[
            ("", 1),
            *(
                (f"{ARM_NAMES[cost.arm]}: {number(cost.milliseconds_per_pair, digits=2)} ms", 2)
                for cost in costs
            ),
        ],
    )


def _data(results: DemoResults) -> Iterator[tuple[str, str]]:
    for dataset in results.datasets:
        counts = (
            f"{name} {count(split['images'])} images with {count(split['captions'])} captions"
            for name, split in dataset.splits.items()
        )
        yield dataset.name, "; ".join(counts)
        yield f"{dataset.name}, split", dataset.split_rule
        yield (
            f"{dataset.name}, sources",
            ", ".join(f"{name} {version}" for name, version in dataset.sources.items()),
        )
        yield from (
            (f"{dataset.name}, {part}", licence) for part, licence in dataset.licences.items()
        )
