"""Learning curves of finished runs, and their differences paired by seed, as numbers, a drawing and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from operator import add
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from bridgetower.drawing import FAINT, LINE_STYLES, STYLE, png
from bridgetower.files import flattened, read_json, write_bytes, write_json, write_text
from bridgetower.reports import numbers
from bridgetower.reports.pages import Row, Table, page_templates
from bridgetower.tasks.run_config import CONFIG, read_metrics

MEASURES = {"area": "mean over the curve", "final": "last evaluation", "steps_to_reach": "steps to reach"}


class FinishedRun(NamedTuple):
    """One training."""

    arm: str  # what it has in common with runs of other seeds
    seed: int
    curve: Mapping[int, float]  # metric on the validation split by step
    seconds_per_step: float  # without evaluations

    @property
    def steps(self) -> list[int]:
        return sorted(self.curve)

    def measures(self, reach: float | None) -> dict[str, float]:
        """Returns the mean of the curve, its last value, and the first step, or the last, at which it is `reach`."""
        found = {"area": fmean(self.curve.values()), "final": self.curve[self.steps[-1]]}
        if reach is not None:
            found["steps_to_reach"] = next((step for step in self.steps if self.curve[step] >= reach), self.steps[-1])
        return found


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
                raise ValueError(f"several runs of {arm} have the same seed: {seeds}; give each arm each seed once")
        steps = {tuple(run.steps): f"{run.arm}, seed {run.seed}" for run in self.runs}
        if len(steps) > 1:
            (one, first), (other, second) = list(steps.items())[:2]
            raise ValueError(
                f"{first} has {len(one)} evaluations up to step {one[-1]}, {second} has {len(other)} up to step "
                f"{other[-1]}; expected evaluations at the same steps"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Comparison:
        """Returns the comparison of which `to_dict` returned these values."""
        runs = []
        for arm, own in values["arms"].items():
            seconds = own["measures"]["seconds_per_step"]["values"]
            for seed, curve, each in zip(own["seeds"], own["curves"], seconds, strict=True):
                steps = {int(step): value for step, value in curve.items()}
                runs.append(FinishedRun(arm=arm, seed=seed, curve=steps, seconds_per_step=each))
        return cls(metric=values["metric"], reach=values["reach"], runs=tuple(runs))

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    def arm_runs(self, arm: str) -> list[FinishedRun]:
        """Returns the runs of an arm in order of their seeds."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def spreads(self, arm: str) -> dict[str, numbers.Spread]:
        """Returns the measures of an arm over its seeds, and the seconds of a step."""
        runs = self.arm_runs(arm)
        measured = [run.measures(self.reach) for run in runs]
        found = {name: numbers.spread([one[name] for one in measured]) for name in measured[0]}
        return found | {"seconds_per_step": numbers.spread([run.seconds_per_step for run in runs])}

    def differences(self, arm: str) -> dict[str, numbers.Difference]:
        """Returns the measures of the first arm minus those of another, over the seeds of both; empty if none."""
        measured = [{run.seed: run.measures(self.reach) for run in self.arm_runs(one)} for one in (self.arms[0], arm)]
        seeds = sorted(measured[0].keys() & measured[1].keys())
        names = measured[0][seeds[0]] if seeds else ()
        pairs = {name: [[one[seed][name] for seed in seeds] for one in measured] for name in names}
        return {name: numbers.paired_difference(*each) for name, each in pairs.items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON: by arm seeds, curves, measures, and differences with their interval."""
        return {
            "metric": self.metric,
            "reach": self.reach,
            "arms": {
                arm: {
                    "seeds": [run.seed for run in self.arm_runs(arm)],
                    "curves": [{str(step): run.curve[step] for step in run.steps} for run in self.arm_runs(arm)],
                    "measures": self.spreads(arm),
                }
                for arm in self.arms
            },
            "differences": {f"{self.arms[0]} - {arm}": self.differences(arm) for arm in self.arms[1:]},
        }

    def rows(self, digits: int = 3, scale: float = 1.0) -> tuple[list[str], list[list[str]]]:
        """Returns the titles and cells of a table: arms first, then the paired differences from the first arm."""
        titles = {name: title for name, title in MEASURES.items() if name != "steps_to_reach" or self.reach is not None}
        if self.reach is not None:
            titles["steps_to_reach"] += f" {round(scale * self.reach, 3):g}"
        forms: dict[str, Any] = {name: {"scale": scale, "digits": digits} for name in titles}
        forms |= {"steps_to_reach": {"digits": 0}} if self.reach is not None else {}
        rows = []
        for arm in self.arms:
            spreads = self.spreads(arm)
            cells = [numbers.mean_std(spreads[name], **form) for name, form in forms.items()]
            seconds = numbers.mean_std(spreads["seconds_per_step"], digits=3)
            rows.append([arm, str(len(self.arm_runs(arm))), *cells, seconds])
        for arm in self.arms[1:]:
            found, cells, seeds = self.differences(arm), [numbers.NO_VALUE] * len(forms), 0
            if found:
                marks = [" *" if numbers.verdict(found[name]) in ("higher", "lower") else "" for name in forms]
                shown = [numbers.with_interval(found[name], **form) for name, form in forms.items()]
                cells, seeds = list(map(add, shown, marks)), len(found["area"]["values"])
            rows.append([f"{self.arms[0]} {numbers.MINUS} {arm}", str(seeds), *cells, ""])
        return ["", "seeds", *titles.values(), "seconds per step"], rows

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        titles, rows = self.rows()
        return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))

    def write(self, folder: Path, title: str) -> None:
        """Writes comparison.json, curves.png and comparison.html into a folder."""
        drawing = draw_curves(self, title)
        write_json(folder / "comparison.json", self.to_dict())
        write_bytes(folder / "curves.png", drawing)
        columns, cells = self.rows()
        rows = [Row(name, rest, "difference" * (n >= len(self.arms))) for n, (name, *rest) in enumerate(cells)]
        values = {"comparison": self, "title": title, "drawing": drawing, "measured": Table(columns=columns, rows=rows)}
        page = page_templates().get_template("comparison.html").render(values)
        write_text(folder / "comparison.html", page)


def draw_curves(comparison: Comparison, title: str, floors: Mapping[str, float] | None = None) -> bytes:
    """Returns a PNG of the learning curves: the mean over seeds, a band from the lowest to the highest."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(7, 4.4), layout="constrained")
        axes = drawing.add_subplot()
        for arm, (ink, line) in zip(comparison.arms, cycle(LINE_STYLES), strict=False):
            curves = [run.curve for run in comparison.arm_runs(arm)]
            steps = sorted(curves[0])
            values = [[curve[step] for curve in curves] for step in steps]
            axes.plot(steps, list(map(fmean, values)), line, color=ink, linewidth=2, markersize=5, label=arm)
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=ink, alpha=0.15, linewidth=0)
        for name, value in (floors or {}).items():
            axes.axhline(value, color=FAINT, linestyle=":", label=name)
        metric = comparison.metric.replace("_", " ")
        axes.set(xlabel="optimiser steps", ylabel=f"{metric} on the validation split", title=title)
        drawing.legend(loc="outside right center") if len(comparison.arms) > 4 else axes.legend(loc="lower right")
        return png(drawing)


def finished_runs(
    folders: Sequence[Path], arms: Sequence[str | None], metric: str | None
) -> tuple[str, list[FinishedRun]]:
    """Reads runs."""
    for folder in folders:
        if not (folder / CONFIG).exists():
            expected = "expected the --out of bridgetower train"
            raise FileNotFoundError(f"{folder} holds no run ({CONFIG} is missing); {expected}")
    configs: list[Mapping[str, Any]] = [read_json(folder / CONFIG) for folder in folders]
    metric = metric or str(configs[0].get("select_by"))
    names = iter(arm_names([config for config, arm in zip(configs, arms, strict=True) if arm is None]))
    runs = []
    for folder, config, arm in zip(folders, configs, arms, strict=True):
        lines = read_metrics(folder, "validation")
        if not lines or metric not in lines[-1]:
            known = sorted(set(lines[-1]) - {"kind", "step", "time"}) if lines else "no evaluations"
            raise ValueError(f"{folder} has no {metric}; its evaluations have {known}")
        curve = {int(line["step"]): float(line[metric]) for line in lines if metric in line}
        trained = read_metrics(folder, "train")
        pairs = sum(line["seconds"] * line["pairs_per_second"] for line in trained)  # the time of steps that a stop
        steps = pairs / config["batch_size"]  # cuts off from the next line is not known, and they are not counted
        seconds = sum(line["seconds"] for line in trained) / max(1, round(steps))
        seed = int(config.get("seed", 0))
        runs.append(FinishedRun(arm=arm or next(names), seed=seed, curve=curve, seconds_per_step=seconds))
    return metric, runs


def arm_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names each run by the values of its config, but for the seed, in which the runs differ."""
    flat = [dict(flattened(config)) for config in configs]
    names = dict.fromkeys(name for config in flat for name in config if name not in ("seed", "recipe"))
    differing = [name for name in names if len({repr(config.get(name)) for config in flat}) > 1]
    return [
        ", ".join(f"{name}={config.get(name)}" for name in differing) or str(config.get("recipe")) for config in flat
    ]
