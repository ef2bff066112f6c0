"""Tables of the report: recall, matching, hidden words, answers and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridgetower.analysis.findings import interval, picture_gain, picture_reading
from bridgetower.analysis.formats import ARM_NAMES, MINUS, NO_VALUE, count, duration, gflops, mean_std, millions, number
from bridgetower.analysis.markup import Row, paragraph, table
from bridgetower.analysis.results import PARTS, Arm, DemoResults, ModelCost, Spread, spread

STAGES = {"itc": "ITC only", "two_stage": "two-stage"}
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
KS = (1, 5, 10)


def recall_table(results: DemoResults, dataset: str) -> str:
    """Returns recalls and RSUM of both arms, both stages and a random ranking on one data set."""
    summary = results.summary()[dataset]
    by_arm = {arm: {figure: arms[arm] for figure, arms in summary.items()} for arm in results.arms}
    stages = [stage for stage in STAGES if f"{stage}_rsum" in summary]
    rows = [
        Row(header=f"{ARM_NAMES[arm]}, {STAGES[stage]}", cells=_recall_cells(by_arm[arm], stage))
        for arm in results.arms
        for stage in stages
    ]
    differences = results.differences().get(dataset)
    if differences is not None:
        cells = _recall_cells(differences, stages[-1], sign=True)
        rows.append(Row(header=f"BridgeTower {MINUS} METER, {STAGES[stages[-1]]}", cells=cells, style="difference"))
    chance = _recall_cells(by_arm[results.arms[0]], "chance")
    rows.append(Row(header="random ranking", cells=[cell.partition(" ± ")[0] for cell in chance], style="quiet"))
    return table(
        f"Retrieval on {dataset}: recall in percent",
        ["model and stage", *(f"R@{k}" for _ in DIRECTIONS for k in KS), "of 600"],
        rows,
        groups=[("", 1), *((name, len(KS)) for name in DIRECTIONS.values()), ("RSUM", 1)],
    )


def matching_table(results: DemoResults) -> str:
    """Returns how often the matching head is right about a pair, beside guessing."""
    summary = results.summary()
    if not all("itm_accuracy" in figures for figures in summary.values()):
        return paragraph("Matching was not measured: these models have no matching head.")
    rows = [
        Row(
            header=ARM_NAMES[arm],
            cells=[mean_std(figures["itm_accuracy"][arm], scale=100) for figures in summary.values()],
        )
        for arm in results.arms
    ]
    rows.append(Row(header="guessing", cells=["50.0"] * len(summary), style="quiet"))
    return table("Matching accuracy in percent", ["model", *summary], rows)


def hidden_words_table(results: DemoResults) -> str:
    """Returns accuracy on hidden words with the right picture, with a wrong one, and the difference."""
    rows = [
        _hidden_words_row(results, dataset, arm, gain)
        for dataset in results.summary()
        for arm in results.arms
        if (gain := picture_gain(results, dataset, arm)) is not None
    ]
    if not rows:
        return paragraph("Hidden words were not measured: these models have no masked-language head.")
    columns = ["data set and model", "right picture", "wrong picture", "difference", "95 % interval", "reading"]
    return table("Hidden words found, in percent", columns, rows)


def answers_table(results: DemoResults) -> str:
    """Returns how many questions of each topic are answered right, with the picture and without."""
    topics = list(results.answers[0].topics)
    rows = [
        Row(header=f"{ARM_NAMES[arm]}, {title}", cells=_answer_cells(results, topics, arm, figure), style=style)
        for figure, title, style in (("model", "right picture", ""), ("other_picture", "another picture", "quiet"))
        for arm in results.arms
    ]
    rows += [
        Row(header=title, cells=_answer_cells(results, topics, results.arms[0], figure), style="quiet")
        for figure, title in (("text_only", "the question alone"), ("majority", "the commonest answer"))
    ]
    counts = results.answers[0].topics
    columns = ["who answers", *(f"{topic} ({count(counts[topic].number)})" for topic in topics)]
    return table("Questions answered right, in percent", columns, rows)


def cost_tables(results: DemoResults) -> str:
    """Returns size, operations and times of the models."""
    rows = [
        Row(
            header=part,
            cells=[
                cell
                for cost in results.costs
                for cell in (millions(cost.parameters_by_part[part]), gflops(cost.gflops_per_pair_by_part[part]))
            ],
        )
        for part in PARTS
    ]
    totals = [
        cell
        for cost in results.costs
        for cell in (millions(cost.parameters), gflops(sum(cost.gflops_per_pair_by_part.values())))
    ]
    size = table(
        "Parameters, and operations to match one picture with one text",
        ["part", *(["parameters", "GFLOPs per pair"] * len(results.costs))],
        [*rows, Row(header="whole model", cells=totals, style="difference")],
        groups=[("", 1), *((ARM_NAMES[cost.arm], 2) for cost in results.costs)],
    )
    return (size if results.costs else "") + _time_table(results)


def _recall_cells(figures: Mapping[str, Spread], stage: str, *, sign: bool = False) -> list[str]:
    names = [f"{stage}_{direction}_r{k}" for direction in DIRECTIONS for k in KS]
    cells = [mean_std(figures[name], scale=100, sign=sign) for name in names]
    return [*cells, mean_std(figures[f"{stage}_rsum"], sign=sign)]


def _answer_cells(results: DemoResults, topics: Sequence[str], arm: Arm, figure: str) -> list[str]:
    own = [answers.topics for answers in results.answers if answers.arm == arm]
    return [mean_std(spread([getattr(one[topic], figure) for one in own]), scale=100) for topic in topics]


def _hidden_words_row(results: DemoResults, dataset: str, arm: Arm, gain: Spread) -> Row:
    summary, bounds = results.summary()[dataset], interval(gain)
    cells = [
        mean_std(summary["mlm_accuracy"][arm], scale=100),
        mean_std(summary["mlm_wrong_image_accuracy"][arm], scale=100),
        mean_std(gain, scale=100, sign=True),
        NO_VALUE if bounds is None else " to ".join(number(100 * bound, sign=True) for bound in bounds),
        picture_reading(gain),
    ]
    return Row(header=f"{dataset}, {ARM_NAMES[arm]}", cells=cells)


def _time_table(results: DemoResults) -> str:
    costs: dict[Arm, ModelCost] = {cost.arm: cost for cost in results.costs}
    rows = []
    for arm in results.arms:
        runs = results.arm_runs(arm)
        match = number(costs[arm].milliseconds_per_pair, digits=2) if arm in costs else NO_VALUE
        speed = mean_std(spread([run.pairs_per_second for run in runs]), digits=0)
        rows.append(
            Row(header=ARM_NAMES[arm], cells=[match, speed, duration(sum(run.seconds for run in runs) / len(runs))])
        )
    columns = ["model", "ms per pair, matching", "pairs per second, training", "one training"]
    return table("Time on this machine", columns, rows)
