"""One self-contained HTML page about a finished comparison; `templates/report.html` is its form."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bridgetower.files import flattened
from bridgetower.reports.comparison import Comparison, draw_curves
from bridgetower.reports.numbers import MINUS, NO_VALUE, count, mean_std, number, range_of, spread, with_interval
from bridgetower.reports.pages import Row, Table, page_templates
from bridgetower_demo.examples import AnswerExample, SearchExample
from bridgetower_demo.findings import (
    ARM_NAMES,
    comparison,
    duration,
    gflops,
    image_finding,
    image_gain,
    image_reading,
    listing,
    matching_finding,
    method,
    millions,
    ordinal,
    retrieval_finding,
)
from bridgetower_demo.mask_examples import MaskExample
from bridgetower_demo.recipes import RECIPES
from bridgetower_demo.results import ARMS, PARTS, Arm, DemoAnswers, DemoResults, DemoRun

_INKS: dict[Arm, str] = {"bridgetower": "#1f5fa8", "meter": "#b4541a"}
_LINES: dict[Arm, str] = {"bridgetower": "-", "meter": "--"}

_STAGES = {"itc": "ITC alone", "matching": "matching alone", "two_stage": "two-stage"}
_DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
_KS = (1, 5, 10)
_DIFFERENCE = f"{ARM_NAMES['bridgetower']} {MINUS} {ARM_NAMES['meter']}"


def render_report(
    results: DemoResults,
    searches: Mapping[str, Sequence[SearchExample]],
    masks: Sequence[MaskExample],
    answers: Sequence[AnswerExample] = (),
    *,
    examples_from: str,
    beforehand: Comparison | None = None,
) -> str:
    """Returns the page.

    Args:
        results: Everything measured.
        searches: Data set → its example searches.
        masks: Captions with a masked word.
        answers: Questions about scenes with the model's answers.
        examples_from: The model that made the examples, such as "BridgeTower, seed 0".
        beforehand: Runs of the recipe `scenes-vqa-deep` that were measured elsewhere, for a section of their own.

    Raises:
        ValueError: An image of the examples cannot be read.
    """
    templates = page_templates(__package__)
    templates.filters |= {"ordinal": ordinal, "duration": duration}
    tested = list(results.runs[0].test)
    return templates.get_template("report.html").render(
        title=f"{' against '.join(ARM_NAMES[arm] for arm in results.arms)} on {listing(tested)}",
        lead=method(results),
        arms={arm: ARM_NAMES[arm] for arm in results.arms},
        several_seeds=any(len(results.seeds(arm)) > 1 for arm in results.arms),
        verdicts=[_verdict(results, dataset) for dataset in tested],
        drawings=_drawings(results),
        deep_towers=None if beforehand is None else _deep_towers(beforehand),
        tables={
            "recall": [_recall_table(results, dataset) for dataset in tested],
            "matching": _matching_table(results),
            "masked_words": _masked_words_table(results),
            "answers": _answers_table(results) if results.answers else None,
            "cost": [*([_size_table(results)] if results.costs else []), _time_table(results)],
        },
        results=results,
        searches=searches,
        masks=masks,
        answers=answers,
        examples_from=examples_from,
        data=list(_data(results)),
        versions=list(results.versions.items()),
        settings=[(name, str(value)) for name, value in flattened(results.settings)],
    )


def _verdict(results: DemoResults, dataset: str) -> dict[str, Any]:
    """The headline of one data set: RSUM as bars, and how it is to be read."""
    metrics = results.summary()[dataset]
    bars = [{"name": ARM_NAMES[arm], "value": 100 * metrics["rsum"][arm]["mean"], "style": arm} for arm in results.arms]
    chance = 100 * metrics["chance_rsum"][results.arms[0]]["mean"]
    findings = (find(results, dataset) for find in (retrieval_finding, matching_finding, image_finding))
    return {
        "dataset": dataset,
        "bars": [*bars, {"name": "random", "value": chance, "style": "chance"}],
        "sentences": [sentence for sentence in findings if sentence],
    }


def _deep_towers(runs: Comparison) -> dict[str, Any]:
    """Runs with deep towers that were measured beforehand: setting, reading, drawing and table."""
    titles, rows = runs.rows(digits=1, scale=100)
    arms = len(runs.arms)
    return {
        "model": RECIPES["scenes-vqa-deep"].model,
        "steps": max(runs.runs[0].curve),
        "seeds": len(runs.arm_runs(runs.arms[0])),
        "finding": comparison(runs.differences(ARM_NAMES["meter"])["area"]),
        "drawing": draw_curves(runs, "Learning curves, measured beforehand"),
        "table": Table(
            caption="Score on validation questions, measured beforehand",
            columns=titles[:-1],  # without the seconds per step, of runs that shared their cores
            rows=[Row(row[0], row[1:-1], "" if place < arms else "difference") for place, row in enumerate(rows)],
        ),
    }


def _drawings(results: DemoResults) -> list[dict[str, str]]:
    """Learning curves with their captions; none of what no run has."""
    points = [point.metrics for run in results.runs for point in run.curve]
    chance = next((metrics["chance_rsum"] for metrics in points if "chance_rsum" in metrics), None)
    drawings = {
        "RSUM of the validation images (600 is perfect)": learning_curve(
            results.runs, "rsum", label="RSUM", chance=chance
        ),
        "Matching accuracy on the validation images": learning_curve(
            results.runs, "itm_accuracy", label="matching accuracy (%)", chance=0.5
        ),
        f"Right answers to validation questions about {results.about}": learning_curve(
            results.answers, "vqa_score", label="right answers (%)"
        ),
    }
    return [{"caption": caption, "image": drawing} for caption, drawing in drawings.items() if drawing is not None]


def learning_curve(
    runs: Sequence[DemoRun | DemoAnswers],
    metric: str,
    *,
    label: str,
    chance: float | None = None,
) -> str | None:
    """Draws a validation metric of every arm in percent: a line for the mean, a band from lowest to highest seed.

    The same results give the same bytes.

    Args:
        runs: With their curves; of each arm the steps count that all its runs have.
        metric: Its name in them.
        label: Of the vertical axis.
        chance: Value of a random guess, drawn as a dotted line.

    Returns:
        An SVG image as a data URI, or None if no run has the metric.
    """
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in ARMS}
    curves = {arm: _curve(own, metric) for arm, own in by_arm.items() if own}
    if not any(curves.values()):
        return None
    with matplotlib.rc_context({"svg.hashsalt": metric}):
        drawing = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = drawing.add_subplot(xlabel="optimiser steps", ylabel=label)
        for arm, curve in curves.items():
            low, mean, high = (
                [100 * pick(values) for values in curve.values()] for pick in (min, statistics.fmean, max)
            )
            axes.plot(list(curve), mean, _LINES[arm], color=_INKS[arm], marker="o" if len(curve) == 1 else "")
            axes.fill_between(list(curve), low, high, color=_INKS[arm], alpha=0.18, linewidth=0)
        if chance is not None:
            axes.axhline(100 * chance, color="black", linestyle=":")
        axes.grid(visible=True, alpha=0.4)
        stream = io.BytesIO()
        drawing.savefig(stream, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _curve(runs: Sequence[DemoRun | DemoAnswers], metric: str) -> dict[int, list[float]]:
    """Values of a metric, one per run, at the steps at which every run has it."""
    values = [{point.step: point.metrics[metric] for point in run.curve if metric in point.metrics} for run in runs]
    return {step: [run[step] for run in values] for step in sorted(set.intersection(*map(set, values)))}


def _recall_table(results: DemoResults, dataset: str) -> Table:
    """Recalls and RSUM of both arms, both stages and a random ranking on one data set."""
    summary = results.summary()[dataset]
    by_arm = {arm: {metric: arms[arm] for metric, arms in summary.items()} for arm in results.arms}
    stages = [stage for stage in _STAGES if f"{stage}_rsum" in summary]
    rows = [
        Row(f"{ARM_NAMES[arm]}, {_STAGES[stage]}", _recall_cells(by_arm[arm], stage))
        for arm in results.arms
        for stage in stages
    ]
    differences = results.differences().get(dataset)
    if differences is not None:
        rows += [
            Row(f"{_DIFFERENCE}, {_STAGES[stage]}", _recall_cells(differences, stage, with_interval), "difference")
            for stage in stages
        ]
    chance = [cell.partition(" ± ")[0] for cell in _recall_cells(by_arm[results.arms[0]], "chance")]
    return Table(
        caption=f"Retrieval on {dataset}: recall in percent",
        columns=["model and stage", *(f"R@{k}" for _ in _DIRECTIONS for k in _KS), "of 600"],
        rows=[*rows, Row("random ranking", chance, "quiet")],
        groups=[("", 1), *((name, len(_KS)) for name in _DIRECTIONS.values()), ("RSUM", 1)],
    )


def _recall_cells(metrics: Mapping[str, Any], stage: str, shown: Callable[..., str] = mean_std) -> list[str]:
    """Recalls and RSUM of a stage, as `shown` writes a spread or a difference."""
    names = [f"{stage}_{direction}_r{k}" for direction in _DIRECTIONS for k in _KS]
    return [shown(metrics[name], scale=100) for name in (*names, f"{stage}_rsum")]


def _matching_table(results: DemoResults) -> Table:
    """Share of pairs of which the matching head is right, beside guessing."""
    summary = results.summary()
    if not all("itm_accuracy" in metrics for metrics in summary.values()):
        return Table(missing="Matching was not measured: these models have no matching head.")
    rows = [
        Row(ARM_NAMES[arm], [mean_std(metrics["itm_accuracy"][arm], scale=100) for metrics in summary.values()])
        for arm in results.arms
    ]
    return Table(
        caption="Matching accuracy in percent",
        columns=["model", *summary],
        rows=[*rows, Row("guessing", ["50.0"] * len(summary), "quiet")],
    )


def _masked_words_table(results: DemoResults) -> Table:
    """Accuracy on masked words with the right image, with a wrong one, and the difference."""
    rows = []
    for dataset, metrics in results.summary().items():
        for arm in results.arms:
            gain = image_gain(results, dataset, arm)
            if gain is None:
                continue
            bounds = gain["interval_95"]
            cells = [
                mean_std(metrics["mlm_accuracy"][arm], scale=100),
                mean_std(metrics["mlm_wrong_image_accuracy"][arm], scale=100),
                mean_std(gain, scale=100, sign=True),
                NO_VALUE if bounds is None else range_of(bounds, scale=100),
                image_reading(gain),
            ]
            rows.append(Row(f"{dataset}, {ARM_NAMES[arm]}", cells))
    if not rows:
        return Table(missing="Masked words were not measured: these models have no masked-language head.")
    columns = ["data set and model", "right image", "wrong image", "difference", "95 % interval", "reading"]
    return Table(caption="Masked words found, in percent", columns=columns, rows=rows)


def _answers_table(results: DemoResults) -> Table:
    """Share of questions of each topic that are answered right, with the image and without."""
    counts = results.answers[0].topics

    def cells(arm: str, name: str) -> list[str]:
        own = [answers.topics for answers in results.answers if answers.arm == arm]
        return [mean_std(spread([getattr(topics[topic], name) for topics in own]), scale=100) for topic in counts]

    rows = [
        Row(f"{ARM_NAMES[arm]}, {title}", cells(arm, name), style)
        for name, title, style in (("model", "right image", ""), ("other_image", "another image", "quiet"))
        for arm in results.arms
    ]
    differences = [with_interval(one, scale=100) for one in results.answer_differences().values()]
    if differences:
        rows.insert(len(results.arms), Row(_DIFFERENCE, differences, "difference"))
    floors = (("text_only", "the question alone"), ("majority", "the commonest answer"))
    return Table(
        caption="Questions answered right, in percent",
        columns=["who answers", *(f"{topic} ({count(counts[topic].number)})" for topic in counts)],
        rows=[*rows, *(Row(title, cells(results.arms[0], name), "quiet") for name, title in floors)],
    )


def _size_table(results: DemoResults) -> Table:
    def cells(sizes: Sequence[tuple[int, float]]) -> list[str]:
        return [cell for parameters, flops in sizes for cell in (millions(parameters), gflops(flops))]

    rows = [
        Row(part, cells([(c.parameters_by_part[part], c.gflops_per_pair_by_part[part]) for c in results.costs]))
        for part in PARTS
    ]
    totals = cells([(cost.parameters, sum(cost.gflops_per_pair_by_part.values())) for cost in results.costs])
    return Table(
        caption="Parameters, and operations to match one image with one text",
        columns=["part", *(["parameters", "GFLOPs per pair"] * len(results.costs))],
        rows=[*rows, Row("whole model", totals, "difference")],
        groups=[("", 1), *((ARM_NAMES[cost.arm], 2) for cost in results.costs)],
    )


def _time_table(results: DemoResults) -> Table:
    costs = {cost.arm: cost for cost in results.costs}
    rows = []
    for arm in results.arms:
        runs = results.arm_runs(arm)
        match = number(costs[arm].milliseconds_per_pair, digits=2) if arm in costs else NO_VALUE
        speed = mean_std(spread([run.pairs_per_second for run in runs]), digits=0)
        rows.append(Row(ARM_NAMES[arm], [match, speed, duration(sum(run.seconds for run in runs) / len(runs))]))
    columns = ["model", "ms per pair, matching", "pairs per second, training", "one training"]
    whole = f"whole demo {duration(results.seconds_total)}"
    if results.seconds_to_first_report is not None:
        whole += f", first searches after {duration(results.seconds_to_first_report)}"
    return Table(caption=f"Time on {results.processor} ({whole})", columns=columns, rows=rows)


def _data(results: DemoResults) -> Iterator[tuple[str, str]]:
    for dataset in results.datasets:
        counts = (
            f"{name} {count(split['images'])} images with {count(split['captions'])} captions"
            for name, split in dataset.splits.items()
        )
        yield dataset.name, "; ".join(counts)
        yield f"{dataset.name}, split", dataset.split_rule
        yield f"{dataset.name}, sources", ", ".join(f"{name} {version}" for name, version in dataset.sources.items())
        yield from ((f"{dataset.name}, {part}", licence) for part, licence in dataset.licences.items())
