"""Whether bridges help, by depth of the towers and by kind of bridge: python research/bridges.py depth-6.

Trains each arm of an experiment with each seed to answer questions about generated scenes, everything else as in the
recipe `scenes-vqa`. Fixed beforehand: 1,200 steps of 64, the scenes (60,000 for training, of seed 21), 500 validation
questions every 100 steps, and the figure: the mean of the validation score over the learning curve, paired by seed.
Beside it stand the last score, the steps to a score of 60 and the seconds of a step. Runs that are finished are kept in
the results file, which a later call, on another machine too, adds to. Prints a table of all runs of the experiment, in
percent, and writes its page and drawing. `depths` does so at each depth and draws the differences over the depth, and
`variants` does so for each choice within BridgeTower and draws the differences from that of the paper.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import matplotlib
from matplotlib.figure import Figure
from scenes import ARMS

from bridgetower.distributed import available_cores
from bridgetower.drawing import FAINT, INK, LINE_STYLES, SERIES, STYLE, png
from bridgetower.files import read_json, write_bytes, write_json
from bridgetower.model.config import BridgeKind, ModelConfig
from bridgetower.reports.comparison import Comparison, FinishedRun, finished_runs
from bridgetower.reports.numbers import MINUS, Difference, verdict
from bridgetower.tasks.run_config import RunConfig
from bridgetower_demo.parallel import train_all
from bridgetower_demo.recipes import RECIPES
from bridgetower_demo.toysets import prepare_toyset
from bridgetower_demo.toysets.scenes import ScenesConfig

REACH, METRIC, STEPS, EVERY = 60, "vqa_score", 1_200, 100
NUM_TRAIN, NUM_VALIDATION, SCENES_SEED = 60_000, 500, 21
TEXT_LAYERS = {2: 2, 4: 3, 6: 4, 8: 6}
FUSION_LAYERS = {2: 2, 4: 2, 6: 3, 8: 4}
VARIANTS = {
    "layers": "bridges from",
    "kinds": "kind of bridge",
    "fusion-layers": "depth",
    "projections": "projections",
}
Change = Callable[[ModelConfig], ModelConfig]


def model(depth: int) -> ModelConfig:
    """The model of the recipe with deeper towers: image layers `depth`, text and fusion layers in proportion."""
    layers = {"vision": depth, "text": TEXT_LAYERS[depth], "fusion": FUSION_LAYERS[depth]}
    return RECIPES["scenes-vqa"].model.override(
        {f"{part}.num_layers": number for part, number in layers.items()}
    )


def fusion(**values: object) -> Change:
    """A change of the fusion encoder."""
    return lambda config: config.override(
        {f"fusion.{name}": value for name, value in values.items()}
    )


# Experiment → depth of the image tower, and the arms; the first is compared with each other one.
EXPERIMENTS: Mapping[str, tuple[int, Mapping[str, Change]]] = {
    **{f"depth-{depth}": (depth, ARMS) for depth in TEXT_LAYERS},
    "kinds": (
        6,
        {kind: fusion(bridge=kind) for kind in get_args(BridgeKind)},
    ),
    "layers": (
        6,
        {
            "the top layers": fusion(vision_layers=(4, 5, 6), text_layers=(2, 3, 4)),
            "spread over the towers": fusion(vision_layers=(2, 4, 6), text_layers=(1, 2, 4)),
            "the lowest layers": fusion(vision_layers=(1, 2, 3), text_layers=(1, 2, 3)),
        },
    ),
    "fusion-layers": (
        6,
        {f"{number} fusion layers": fusion(num_layers=number) for number in (3, 1, 2, 4)},
    ),
    "projections": (
        6,
        {"shared": fusion(), "one for each bridge": fusion(separate_projections=True)},
    ),
}


def config(experiment: str, arm: str, seed: int, given: argparse.Namespace) -> RunConfig:
    """One run; those of one seed differ in the model alone."""
    depth, arms = EXPERIMENTS[experiment]
    recipe = RECIPES["scenes-vqa"]
    return replace(
        recipe,
        model=arms[arm](model(depth)),
        data=replace(recipe.data, folders=(str(given.work / "data"),)),
        max_steps=given.steps,
        batch_size=given.batch_size,
        evaluate_every=given.every,
        checkpoint_every=given.steps,
        seed=seed,
    )


def stored(results: Path) -> dict[str, Any]:
    """Finished runs by `key`: curve and seconds of a step."""
    return read_json(results) if results.exists() else {}


def key(run: RunConfig, given: argparse.Namespace) -> str:
    """What identifies a run in the results: what experiments and options change."""
    part = run.model.fusion
    layers = (run.model.vision_layers, run.model.text_layers)
    depths = (run.model.vision.num_layers, run.model.text.num_layers, part.num_layers)
    choices = (part.bridge, part.input_norm, part.separate_projections)
    length = f"{run.max_steps} steps of {run.batch_size}, evaluated every {run.evaluate_every}"
    return f"{depths} {layers} {choices} {length}, {given.num_train} / {given.num_validation} scenes, seed {run.seed}"


def kept(results: Path, name: str, arm: str, seed: int) -> FinishedRun:
    """A finished run of the results, in percent."""
    entry = stored(results)[name]
    curve = {int(step): 100 * value for step, value in entry["curve"].items()}
    return FinishedRun(arm=arm, seed=seed, curve=curve, seconds_per_step=entry["seconds_per_step"])


def keep(results: Path, folders: Mapping[str, Path], metric: str) -> None:
    """Adds finished runs, by what identifies them, to the results."""
    _, done = finished_runs(list(folders.values()), list(folders), metric)
    entries = {
        run.arm: {"curve": dict(run.curve), "seconds_per_step": run.seconds_per_step}
        for run in done
    }
    write_json(results, stored(results) | entries)


def train_missing(runs: Mapping[tuple[str, int], RunConfig], given: argparse.Namespace) -> None:
    """Trains what the results lack, as many runs at a time as there are cores, and adds each group that is finished."""
    wanted, there = {key(run, given): run for run in runs.values()}, stored(given.results)
    missing = {name: run for name, run in wanted.items() if name not in there}
    if missing:
        counts = {
            "num_train": given.num_train,
            "num_validation": given.num_validation,
            "num_test": 1,
        }
        prepare_toyset(
            "scenes",
            given.work / "data",
            ScenesConfig(kind="vqa", side=60, seed=SCENES_SEED, **counts),
        )
    names = list(missing)
    for start in range(0, len(names), available_cores()):
        group = names[start : start + available_cores()]
        folders = {
            name: given.work / "runs" / name.translate(str.maketrans(" ,()/", "_____"))
            for name in group
        }
        train_all({folders[name]: missing[name] for name in group})
        keep(given.results, folders, METRIC)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "depths", "variants"])
    parser.add_argument(
        "--work", type=Path, default=Path("bridges"), help="folder for scenes, runs and pages"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("research/bridges.json"),
        help="finished runs; added to",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[21, 22, 23, 24, 25, 26], help="of the models"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-size", type=int, default=RECIPES["scenes-vqa"].batch_size)
    parser.add_argument("--every", type=int, default=EVERY, help="steps between evaluations")
    parser.add_argument("--num-train", type=int, default=NUM_TRAIN, help="training scenes")
    parser.add_argument(
        "--num-validation", type=int, default=NUM_VALIDATION, help="validation questions"
    )
    return parser.parse_args()


def markdown(comparison: Comparison) -> str:
    """Returns the table of a comparison in Markdown."""
    titles, rows = comparison.rows()
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def compared(experiment: str, given: argparse.Namespace) -> Comparison:
    """Trains what is missing of an experiment, compares, draws and prints."""
    arms = EXPERIMENTS[experiment][1]
    runs = {
        (arm, seed): config(experiment, arm, seed, given) for seed in given.seeds for arm in arms
    }
    train_missing(runs, given)
    found = tuple(
        kept(given.results, key(run, given), arm, seed) for (arm, seed), run in runs.items()
    )
    comparison = Comparison(metric="VQA score [%]", reach=REACH, runs=found)
    depth = EXPERIMENTS[experiment][0]
    title = f"Questions about scenes, image tower of {depth} layers"
    comparison.write(
        given.work / experiment,
        f"{title}: {VARIANTS[experiment]}" if experiment in VARIANTS else title,
    )
    print(f"{experiment}\n\n{markdown(comparison)}\n")
    return comparison


def bars(difference: Difference) -> tuple[float, list[list[float]]]:
    """The mean of a difference, and the bars of its interval below and above."""
    mean = difference["mean"]
    low, high = difference["interval_95"] or (mean, mean)
    return mean, [[mean - low], [high - mean]]


def draw_depths(depths: Mapping[int, Comparison]) -> bytes:
    """Returns a PNG of the differences of the figure between BridgeTower and the other arms, by depth of the towers."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(7, 4.4), layout="constrained")
        axes = drawing.add_subplot()
        for number, (arm, (ink, _)) in enumerate(
            zip(list(ARMS)[1:], LINE_STYLES[1:], strict=False)
        ):
            places, means = [depth + (number - 0.5) * 0.2 for depth in depths], []
            for place, comparison in zip(places, depths.values(), strict=True):
                mean, errors = bars(comparison.differences(arm)["area"])
                axes.errorbar(place, mean, yerr=errors, color=ink, capsize=4)
                means.append(mean)
            axes.plot(places, means, "o", color=ink, label=f"BridgeTower {MINUS} {arm}")
        axes.axhline(0, color=INK, linewidth=1)
        title = "BridgeTower minus the other models, by the depth of the towers"
        axes.set(
            xlabel="layers of the image tower",
            ylabel="difference of the mean VQA score [points]",
            title=title,
        )
        axes.set_xticks(list(depths))
        axes.legend(loc="upper left")
        return png(drawing)


def draw_variants(variants: Mapping[str, Comparison]) -> bytes:
    """Returns a PNG of the differences between the paper's choice and each variant, with 95 % intervals."""
    with matplotlib.rc_context(STYLE):
        names: list[str] = []
        drawing = Figure(
            figsize=(7.5, 0.9 + 0.28 * sum(len(one.arms) for one in variants.values())),
            layout="constrained",
        )
        axes = drawing.add_subplot()
        for experiment, comparison in variants.items():
            names.append(f"{VARIANTS[experiment]}: {comparison.arms[0]}")
            for arm in comparison.arms[1:]:
                found = comparison.differences(arm)["area"]
                mean, errors = bars(found)
                face = SERIES[0] if verdict(found) in ("higher", "lower") else "white"
                axes.errorbar(
                    mean,
                    len(names),
                    xerr=errors,
                    fmt="o",
                    color=SERIES[0],
                    markerfacecolor=face,
                    capsize=3,
                )
                names.append(arm)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("difference of the mean VQA score [points]")
        for place, side, text in (
            (0, "left", "\u2190 the variant is better"),
            (1, "right", "the paper's choice is better \u2192"),
        ):
            axes.text(
                place,
                1,
                text,
                ha=side,
                va="bottom",
                fontsize=10,
                color=FAINT,
                transform=axes.transAxes,
            )
        drawing.suptitle(
            "The paper's choice, in bold, minus each variant",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
        )
        axes.set_yticks(range(len(names)), names)
        axes.grid(visible=False, axis="y")
        for name, label in zip(names, axes.get_yticklabels(), strict=True):
            label.set_fontweight("bold" if ": " in name else "normal")
        axes.invert_yaxis()
        return png(drawing)


def main() -> None:
    """Runs one experiment, or those of all depths or variants."""
    given = parsed()
    if given.experiment == "depths":
        depths = {depth: compared(f"depth-{depth}", given) for depth in TEXT_LAYERS}
        write_bytes(given.work / "depths.png", draw_depths(depths))
    elif given.experiment == "variants":
        variants = {experiment: compared(experiment, given) for experiment in VARIANTS}
        write_bytes(given.work / "variants.png", draw_variants(variants))
    else:
        compared(given.experiment, given)


if __name__ == "__main__":
    main()
