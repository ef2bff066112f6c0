"""The main job end to end: prepare real pictures, pre-train two models, evaluate, compare, report."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from bridgetower.analysis.examples import mask_examples, search_examples
from bridgetower.analysis.profile import model_cost
from bridgetower.analysis.report import write_report
from bridgetower.analysis.results import CurvePoint, DemoResults, DemoRun
from bridgetower.data.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.data.prepare import prepare
from bridgetower.data.records import read_info
from bridgetower.evaluation.masked_words import evaluate_masked_words
from bridgetower.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from bridgetower.predictor import Predictor, load
from bridgetower.training.config import RunConfig
from bridgetower.training.logs import read_metrics
from bridgetower.training.recipes import RECIPES
from bridgetower.training.run import CONFIG, train

Arm = Literal["bridgetower", "meter"]

RECIPE_OF: dict[Arm, str] = {"bridgetower": "pretrain-nano", "meter": "pretrain-nano-meter"}
DATASETS = ("emoji", "flags")
MINUTES = 10.0  # what the recipes' own number of steps takes for both arms and one seed, on 2 cores
TEXT_LENGTH = 16  # tokens of the pair whose cost is measured

logger = logging.getLogger(__name__)


def run_demo(out: Path, *, minutes: float = MINUTES, seeds: int = 1, progress: bool = True) -> DemoResults:
    """Trains and compares BridgeTower and METER on held-out emoji and flags; continues where it was cut off.

    The folder gets `data/`, `runs/ARM-SEED/`, `results.json` and `report.html`.

    Args:
        out: Folder for everything.
        minutes: Scales the number of training steps: about this long for one seed on 2 cores.
        seeds: Trainings of each model; more give a spread.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: The packages of the `demo` extra are missing.
        ValueError: `minutes` or `seeds` is not positive, or `out` holds a demo with other settings.
    """
    if minutes <= 0 or seeds < 1:
        raise ValueError(f"minutes {minutes}, seeds {seeds}; expected more than 0 minutes and at least 1 seed")
    started = time.perf_counter()
    for name in DATASETS:
        prepare(name, out / "data" / name, progress=progress)
    runs = [_train_and_test(out, arm, seed, minutes, progress) for seed in range(seeds) for arm in RECIPE_OF]
    predictors = {arm: load(run_folder(out, arm, 0), device="cpu") for arm in RECIPE_OF}
    results = DemoResults(
        settings={"minutes": minutes, "seeds": seeds, "steps": runs[0].steps, "device": "cpu"},
        datasets={name: _counts(out / "data" / name) for name in DATASETS},
        runs=tuple(runs),
        costs=tuple(model_cost(arm, predictor.model, text_length=TEXT_LENGTH) for arm, predictor in predictors.items()),
        versions=_versions(),
        seconds_total=time.perf_counter() - started,
    )
    results.write(out / "results.json")
    _report(out, results, predictors["bridgetower"])
    return results


def demo_config(out: Path, arm: Arm, seed: int, minutes: float) -> RunConfig:
    """Returns the run of one arm: its recipe on both data sets, steps scaled to `minutes`."""
    recipe = RECIPES[RECIPE_OF[arm]]
    steps = max(2, round((recipe.max_steps or 0) * minutes / MINUTES))
    folders = tuple(str(out / "data" / name) for name in DATASETS)
    return replace(
        recipe,
        data=replace(recipe.data, folders=folders),
        seed=seed,
        max_steps=steps,
        evaluate_every=max(1, steps // 6),
        checkpoint_every=max(1, steps // 6),
    )


def run_folder(out: Path, arm: Arm, seed: int) -> Path:
    """Folder of one training."""
    return out / "runs" / f"{arm}-{seed}"


def _train_and_test(out: Path, arm: Arm, seed: int, minutes: float, progress: bool) -> DemoRun:
    folder = run_folder(out, arm, seed)
    config = demo_config(out, arm, seed, minutes)
    train(config, folder, resume=(folder / CONFIG).exists(), progress=progress)
    predictor = load(folder, device="cpu")
    speeds = [line["pairs_per_second"] for line in read_metrics(folder, "train")]
    seconds = [config.batch_size * config.log_every / speed for speed in speeds]
    return DemoRun(
        arm=arm,
        seed=seed,
        steps=config.max_steps or 0,
        seconds=sum(seconds),
        pairs_per_second=config.batch_size * config.log_every * len(speeds) / max(sum(seconds), 1e-9),
        curve=tuple(_curve(folder)),
        test={name: _test_figures(predictor, config, out / "data" / name) for name in DATASETS},
    )


def _curve(folder: Path) -> Iterator[CurvePoint]:
    for line in read_metrics(folder, "validation"):
        figures = {name: value for name, value in line.items() if name not in ("kind", "step", "time")}
        yield CurvePoint(step=int(line["step"]), figures=figures)


def _test_figures(predictor: Predictor, config: RunConfig, folder: Path) -> dict[str, float]:
    images = _images(predictor, folder)
    words = evaluate_masked_words(predictor.model, images, config.task.masking)
    return evaluate_retrieval(predictor.model, images, config.evaluation).figures() | words


def _images(predictor: Predictor, folder: Path) -> CaptionImages:
    return CaptionImages(DataConfig(folders=(str(folder),), cache=True), "test", predictor.processor)


def _report(out: Path, results: DemoResults, predictor: Predictor) -> None:
    evaluation = RECIPES[RECIPE_OF["bridgetower"]].evaluation
    searches, masks = {}, []
    for name in DATASETS:
        images = _images(predictor, out / "data" / name)
        result: RetrievalResult = evaluate_retrieval(predictor.model, images, evaluation)
        searches[name] = search_examples(predictor, images, result, count=6)
        masks += mask_examples(predictor, images, count=4)
    write_report(out / "report.html", results, searches, masks)


def _counts(folder: Path) -> dict[str, dict[str, int]]:
    info = read_info(folder)
    return {split: {"images": part.images, "captions": part.captions} for split, part in info.splits.items()}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "bridgetower": version("bridgetower")}


