"""Learning curves of finished runs and their paired differences, as numbers, a plot and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from bridgetower.drawing import FAINT, LINE_STYLES, STYLE, png
from bridgetower.files import flattened, read_json, write_bytes, write_json, write_text
from bridgetower.reports import numbers
from bridgetower.reports.pages import ReportTable, Row, page_templates
from bridgetower.tasks.run_config import CONFIG, read_metrics

MEASURES = {
    "area": "mean over the curve",
    "final": "last evaluation",
    "steps_to_reach": "steps to reach",
}


class FinishedRun(NamedTuple):
    """A training run."""

    arm: str  # a configuration; runs of an arm differ in their seeds
    seed: int
    curve: Mapping[int, float]  # validation metric by step
    seconds_per_step: float  # without evaluations

    @property
    def steps(self) -> list[int]:
        return sorted(self.curve)

    def measures(self, reach: float | None) -> dict[str, float]:
        """Returns the mean of the curve, its last value, and the first step at which it is `reach`, else the last."""
        last_step = self.steps[-1]
        measures = {"area": fmean(self.curve.values()), "final": self.curve[last_step]}
        if reach is not None:
            steps_reached = (step for step in self.steps if self.curve[step] >= reach)
            measures["steps_to_reach"] = next(steps_reached, last_step)
        return measures


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs of several arms, all evaluated at the same steps."""

    metric: str  # of the validation split
    reach: float | None  # value of `steps_to_reach`; None: not measured
    runs: tuple[FinishedRun, ...]  # at least one per arm, each seed once

    def __post_init__(self) -> None:
        for arm in self.arms:
            seeds = [run.seed for run in self.arm_runs(arm)]
            if len(set(seeds)) < len(seeds):
                raise ValueError(
                    f"several runs of {arm} have the same seed: {seeds}; give each arm each seed once"
                )
        first = self.runs[0]
        for run in self.runs:
            if run.steps != first.steps:
                raise ValueError(
                    f"{_evaluations(first)}, {_evaluations(run)}; expected evaluations at the same steps"
                )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Comparison:
        """Returns the comparison of which `to_dict` returned these values."""
        runs = []
        for arm, content in values["arms"].items():
            seconds = content["measures"]["seconds_per_step"]["values"]
            for seed, curve, seconds_per_step in zip(
                content["seeds"], content["curves"], seconds, strict=True
            ):
                steps = {int(step): value for step, value in curve.items()}
                runs.append(FinishedRun(arm, seed, steps, seconds_per_step))
        return cls(metric=values["metric"], reach=values["reach"], runs=tuple(runs))

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    def arm_runs(self, arm: str) -> list[FinishedRun]:
        """Returns the runs of an arm in order of their seeds."""
        runs = [run for run in self.runs if run.arm == arm]
        return sorted(runs, key=lambda run: run.seed)

    def spreads(self, arm: str) -> dict[str, numbers.Spread]:
        """Returns the measures of an arm over its seeds, and the seconds of a step."""
        runs = self.arm_runs(arm)
        measures = [run.measures(self.reach) for run in runs]
        spreads = {
            name: numbers.spread([values[name] for values in measures]) for name in measures[0]
        }
        spreads["seconds_per_step"] = numbers.spread([run.seconds_per_step for run in runs])
        return spreads

    def differences(self, arm: str) -> dict[str, numbers.Difference]:
        """Returns the measures of the first arm minus the measures of another by common seeds, if there are any."""
        ours = {run.seed: run for run in self.arm_runs(self.arms[0])}
        theirs = {run.seed: run for run in self.arm_runs(arm)}
        seeds = sorted(ours.keys() & theirs.keys())
        our_measures = [ours[seed].measures(self.reach) for seed in seeds]
        their_measures = [theirs[seed].measures(self.reach) for seed in seeds]
        differences = {}
        for name in our_measures[0] if seeds else ():
            our_values = [measures[name] for measures in our_measures]
            their_values = [measures[name] for measures in their_measures]
            differences[name] = numbers.paired_difference(our_values, their_values)
        return differences

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON: seeds, curves and measures by arm, and differences with their interval."""
        arms = {}
        for arm in self.arms:
            runs = self.arm_runs(arm)
            arms[arm] = {
                "seeds": [run.seed for run in runs],
                "curves": [{str(step): run.curve[step] for step in run.steps} for run in runs],
                "measures": self.spreads(arm),
            }
        first, *further = self.arms
        differences = {f"{first} - {arm}": self.differences(arm) for arm in further}
        return {
            "metric": self.metric,
            "reach": self.reach,
            "arms": arms,
            "differences": differences,
        }

    def rows(self, digits: int = 3, scale: float = 1.0) -> tuple[list[str], list[list[str]]]:
        """Returns the titles and cells of a table: arms first, then the paired differences from the first arm.

        A star marks a difference whose interval leaves zero out.
        """
        titles = dict(MEASURES)
        scaled = {"scale": scale, "digits": digits}
        formats: dict[str, Any] = {"area": scaled, "final": scaled}
        if self.reach is None:
            del titles["steps_to_reach"]
        else:
            reach = round(scale * self.reach, 3)
            titles["steps_to_reach"] += f" {reach:g}"
            formats["steps_to_reach"] = {"digits": 0}

        rows = []
        for arm in self.arms:
            spreads = self.spreads(arm)
            cells = []
            for name, options in formats.items():
                cells.append(numbers.mean_std(spreads[name], **options))
            seconds = numbers.mean_std(spreads["seconds_per_step"], digits=3)
            num_seeds = len(self.arm_runs(arm))
            rows.append([arm, str(num_seeds), *cells, seconds])

        for arm in self.arms[1:]:
            differences = self.differences(arm)
            num_seeds = 0
            cells = [numbers.NO_VALUE] * len(formats)
            if differences:
                num_seeds = len(differences["area"]["values"])
                cells = []
                for name, options in formats.items():
                    cell = numbers.with_interval(differences[name], **options)
                    leaves_zero_out = numbers.verdict(differences[name]) in ("higher", "lower")
                    cells.append(f"{cell} *" if leaves_zero_out else cell)
            header = f"{self.arms[0]} {numbers.MINUS} {arm}"
            rows.append([header, str(num_seeds), *cells, ""])
        return ["", "seeds", *titles.values(), "seconds per step"], rows

    def write(self, folder: Path, title: str) -> None:
        """Writes comparison.json, curves.png and comparison.html into a folder."""
        drawing = draw_curves(self, title)
        write_json(folder / "comparison.json", self.to_dict())
        write_bytes(folder / "curves.png", drawing)

        columns, rows = self.rows()
        table_rows = []
        for row_index, (header, *cells) in enumerate(rows):
            style = "difference" if row_index >= len(self.arms) else ""
            table_rows.append(Row(header, cells, style))
        table = ReportTable(columns=columns, rows=table_rows)
        template = page_templates().get_template("comparison.html")
        page = template.render(comparison=self, title=title, drawing=drawing, measured=table)
        write_text(folder / "comparison.html", page)


def _evaluations(run: FinishedRun) -> str:
    steps = run.steps
    return f"{run.arm}, seed {run.seed} has {len(steps)} evaluations up to step {steps[-1]}"


def draw_curves(
    comparison: Comparison, title: str, floors: Mapping[str, float] | None = None
) -> bytes:
    """Returns a PNG of the learning curves: the mean over seeds, a band from the lowest to the highest."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(7, 4.4), layout="constrained")
        axes = drawing.add_subplot()

        # A line and a band for each arm.
        for arm, (colour, line_style) in zip(comparison.arms, cycle(LINE_STYLES), strict=False):
            curves = [run.curve for run in comparison.arm_runs(arm)]
            steps = sorted(curves[0])
            values = [[curve[step] for curve in curves] for step in steps]
            means = [fmean(values_at_step) for values_at_step in values]
            lowest = [min(values_at_step) for values_at_step in values]
            highest = [max(values_at_step) for values_at_step in values]
            axes.plot(steps, means, line_style, color=colour, linewidth=2, markersize=5, label=arm)
            axes.fill_between(steps, lowest, highest, color=colour, alpha=0.15, linewidth=0)

        for name, value in (floors or {}).items():
            axes.axhline(value, color=FAINT, linestyle=":", label=name)
        metric = comparison.metric.replace("_", " ")
        axes.set(xlabel="optimiser steps", ylabel=f"{metric} on the validation split", title=title)
        if len(comparison.arms) > 4:
            drawing.legend(loc="outside right center")
        else:
            axes.legend(loc="lower right")
        return png(drawing)


def finished_runs(
    folders: Sequence[Path], arms: Sequence[str | None], metric: str | None
) -> tuple[str, list[FinishedRun]]:
    """Reads the runs in folders. Returns the metric that they are compared by, and the runs.

    Args:
        folders: Output folders of trainings.
        arms: Name of the arm of each folder; None names it by the values of the config in which the runs differ.
        metric: Validation metric; None: the one that the first run selects its best checkpoint by.
    """
    for folder in folders:
        if not (folder / CONFIG).exists():
            expected = "expected the --out of bridgetower train"
            raise FileNotFoundError(f"{folder} holds no run ({CONFIG} is missing); {expected}")
    configs = [read_json(folder / CONFIG) for folder in folders]
    metric = metric or str(configs[0].get("select_by"))
    unnamed = [config for config, arm in zip(configs, arms, strict=True) if arm is None]
    names = iter(arm_names(unnamed))

    runs = []
    for folder, config, arm in zip(folders, configs, arms, strict=True):
        evaluations = read_metrics(folder, "validation")
        if not evaluations or metric not in evaluations[-1]:
            names_of_metrics: object = "no evaluations"
            if evaluations:
                names_of_metrics = sorted(set(evaluations[-1]) - {"kind", "step", "time"})
            raise ValueError(f"{folder} has no {metric}; its evaluations have {names_of_metrics}")
        curve = {}
        for line in evaluations:
            if metric in line:
                curve[int(line["step"])] = float(line[metric])
        seed = int(config.get("seed", 0))

        # The time of the logged steps. The steps after the last line of the log are not known.
        lines = read_metrics(folder, "train")
        seconds = 0.0
        num_pairs = 0.0
        for line in lines:
            seconds += line["seconds"]
            num_pairs += line["seconds"] * line["pairs_per_second"]
        num_steps = max(1, round(num_pairs / config["batch_size"]))
        runs.append(FinishedRun(arm or next(names), seed, curve, seconds / num_steps))
    return metric, runs


def arm_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names each run by the values of its config, but for the seed, in which the runs differ."""
    flat_configs = [dict(flattened(config)) for config in configs]
    fields = dict.fromkeys(field for config in flat_configs for field in config)
    differing = []
    for field in fields:
        values = {repr(config.get(field)) for config in flat_configs}
        if field not in ("seed", "recipe") and len(values) > 1:
            differing.append(field)
    names = []
    for config in flat_configs:
        name = ", ".join(f"{field}={config.get(field)}" for field in differing)
        names.append(name or str(config.get("recipe")))
    return names
