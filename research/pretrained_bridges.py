"""Whether bridges help with pre-trained towers: python research/pretrained_bridges.py frozen.

Trains the stages of `make demo` with BridgeTower, METER and METER with BridgeTower's LayerNorms, with several
seeds: the contrastive head, then the fusion encoder with the matching head, then answers to questions about flags.
`frozen`, the towers stay as they are; `top`, matching and answers also train their top two layers. Fixed beforehand:
the steps and settings of the demo, and two figures of the validation split: RSUM of matching 10 candidates, of emoji
and flags, and the score of the answers, each as the mean over the learning curve. Finished runs are kept in the results
file, which a later call adds to. Prints a table for each figure and writes their pages and drawings.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from bridges import keep, kept, markdown, stored
from scenes import ARMS

from bridgetower.objectives.config import PretrainingConfig
from bridgetower.reports.comparison import Comparison
from bridgetower.tasks.run_config import RunConfig
from bridgetower_demo.parallel import train_all
from bridgetower_demo.plan import MINUTES, ON_TOWERS
from bridgetower_demo.run import answering_config, demo_config, questions_folder
from bridgetower_demo.starter import starter_towers
from bridgetower_demo.toysets import prepare_toyset

TOP_LAYERS, EVALUATIONS = 2, 6
STAGES = ("contrastive", "retrieval", "questions")
TOWERS = {"frozen": "frozen", "top": f"their top {TOP_LAYERS} layers trained"}
METRICS = {"retrieval": "rsum", "questions": "vqa_score"}
Run = tuple[str, int]
"""Arm and seed."""


def folder(given: argparse.Namespace, stage: str, run: Run) -> Path:
    """Of a run; the contrastive head learns on frozen towers in both experiments."""
    towers = "frozen" if stage == "contrastive" else given.towers
    return Path(given.work) / "runs" / f"{towers}-{stage}-{run[0].replace(' ', '-')}-{run[1]}"


def config(given: argparse.Namespace, stage: str, run: Run) -> RunConfig:
    """A training of the demo with the model of the arm, from the arm's stage before."""
    arm, seed = run
    if stage == "questions":
        found = answering_config(given.work, ON_TOWERS, "bridgetower", seed, given.minutes)
    else:
        of_demo = ON_TOWERS.stages[STAGES.index(stage)]
        found = demo_config(given.work, ON_TOWERS, of_demo, "bridgetower", seed, given.minutes)
    found = replace(found, model=ARMS[arm](found.model))
    if stage == "contrastive":
        return found
    every = max(1, (found.max_steps or 0) // EVALUATIONS)
    before = folder(given, STAGES[STAGES.index(stage) - 1], run)
    found = replace(found, init=str(before / "last"), evaluate_every=every, checkpoint_every=every)
    return with_top_layers(found) if given.towers == "top" else found


def with_top_layers(run: RunConfig) -> RunConfig:
    """The same run with the top layers trained; the contrastive head, which finds the candidates, learns with them."""
    if isinstance(run.task, PretrainingConfig):
        phases = tuple(replace(phase, itc=1) for phase in run.task.phases)
        run = replace(run, task=replace(run.task, phases=phases))
    return replace(run, train_top=TOP_LAYERS)


def train_missing(given: argparse.Namespace, runs: list[Run]) -> None:
    """Prepares data and towers, trains stage after stage what the results lack, and adds it."""
    missing = [
        run
        for run in runs
        if any(key(given, stage, run) not in stored(given.results) for stage in METRICS)
    ]
    if not missing:
        return
    starter_towers(given.work / "towers")
    for toyset, settings in ON_TOWERS.datasets.items():
        prepare_toyset(toyset, given.work / "data" / toyset, settings)
    questions = ON_TOWERS.questions
    prepare_toyset(
        questions.toyset, questions_folder(given.work, ON_TOWERS), questions.settings(given.minutes)
    )
    for stage in STAGES:
        train_all({folder(given, stage, run): config(given, stage, run) for run in missing})
        if stage in METRICS:
            keep(
                given.results,
                {key(given, stage, run): folder(given, stage, run) for run in missing},
                METRICS[stage],
            )


def key(given: argparse.Namespace, stage: str, run: Run) -> str:
    """What identifies a run in the results."""
    return f"{given.towers} towers, {stage}, {run[0]}, {given.minutes:g} minutes, seed {run[1]}"


def main() -> None:
    """Trains what is missing, compares, draws and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("towers", choices=TOWERS)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("pretrained-bridges"),
        help="folder for data, runs and pages",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("research/pretrained-bridges.json"),
        help="finished runs",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[21, 22, 23, 24], help="of the models"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="of a demo with as many steps"
    )
    given = parser.parse_args()
    runs = [(arm, seed) for seed in given.seeds for arm in ARMS]
    train_missing(given, runs)
    for stage in METRICS:
        found = tuple(
            kept(given.results, key(given, stage, (arm, seed)), arm, seed) for arm, seed in runs
        )
        comparison = Comparison(metric=f"{METRICS[stage]} [%]", reach=None, runs=found)
        comparison.write(
            given.work / f"{given.towers}-{stage}",
            f"{stage.capitalize()} on pre-trained towers, {TOWERS[given.towers]}",
        )
        print(f"{stage}\n\n{markdown(comparison)}\n")


if __name__ == "__main__":
    main()
