"""Commands of runs: train, compare."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg
from tyro.extras import subcommand_type_from_defaults

from bridgetower.cli.options import Json, custom_extensions, custom_task, split_names
from bridgetower.cli.output import emit, emit_metrics, emit_next_command, emit_rows, is_json
from bridgetower.extras import require
from bridgetower.tasks.run_config import TIMEOUT_MINUTES, RunConfig
from bridgetower.tasks.spec import TaskSpec
from bridgetower.tasks.table import RECIPES, spec_of

logger = logging.getLogger(__name__)


def train_command(
    config: RunConfig,
    *,
    out: Path,
    task_spec: str | None = None,
    extensions: str | None = None,
    resume: bool = False,
    async_checkpoints: bool = False,
    report_to: tuple[str, ...] = ("tensorboard",),
    timeout_minutes: float = TIMEOUT_MINUTES,
    feature_cache: Path | None = None,
    json: Json = False,
) -> None:
    """Train a recipe. Every value can be overridden by its option.

    On a terminal it shows bars and ends with a table, else it logs lines and prints the metrics as JSON.

    Example: bridgetower train pretrain-nano --data.folders data/emoji data/flags --out runs/nano

    From published towers: bridgetower train pretrain-base --vision openai/clip-vit-base-patch16 --text roberta-base/ …

    A custom task: bridgetower train my-recipe --task-spec my_task.py:MY_TASK … (docs/architecture.md)

    With several processes: torchrun --nproc-per-node 2 -m bridgetower train …

    Args:
        config: Recipe and changes to it.
        out: Folder of the run: run.json, best/, last/, states/, metrics.jsonl, tensorboard/.
        task_spec: A custom task, FILE.py:NAME or module:NAME; its recipes can be trained too.
        extensions: Custom towers, bridges, heads, objectives, metrics, optimisers, schedules, loggers, callbacks.
        resume: Continue the run in --out, if there is one, where it was stopped or killed, also with other values.
        async_checkpoints: Write what --resume continues from while the run goes on, from a copy on the CPU.
        report_to: Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio, mlflow, or of --extensions.
        timeout_minutes: How long a process waits for the others before it ends with an error that names them.
        feature_cache: Folder for what frozen towers give, which runs share; by default features/ of the run, which is
            removed when the run is done.
    """
    require("train")
    logger.info("%s: loading the libraries", config.recipe or "train")  # which takes seconds
    from bridgetower.training.run import train as train_run
    from bridgetower.training.trainer import Interrupted

    task = custom_task(task_spec)
    try:
        metrics = train_run(
            config,
            out,
            task=task,
            extensions=custom_extensions(extensions),
            resume=resume,
            async_checkpoints=async_checkpoints,
            report_to=report_to,
            timeout_minutes=timeout_minutes,
            feature_cache=feature_cache,
        )
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    if os.environ.get("RANK", "0") != "0":
        return
    if is_json(json):
        emit({"run": str(out), **metrics})
        return
    emit_metrics(f"{out}: {config.data.validation_split}", metrics)
    if benchmarks := spec_of(config.task, task).benchmarks:
        benchmark = next(iter(benchmarks))
        next_command = ["evaluate", out, benchmark, "--data", *config.data.folders]
        if task_spec is not None:
            next_command += ["--task-spec", task_spec]
        emit_next_command(*next_command)


def train_with(task: TaskSpec | None) -> Callable[..., None]:
    """Returns the command with all recipes, also those of a custom task, and an option for each value."""
    recipes = dict(RECIPES)
    if task is not None:
        for recipe in (*task.recipes, *task.fine_tuning):
            recipes[recipe.recipe] = recipe
    sources = {name: recipe.source for name, recipe in recipes.items()}
    kind: Any = subcommand_type_from_defaults(recipes, descriptions=sources, prefix_names=False)
    train_command.__annotations__["config"] = Annotated[kind, arg(name="")]
    return train_command


def compare_command(
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]")],
    *,
    metric: str | None = None,
    reach: float | None = None,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Compare learning curves of finished runs, with differences paired by seed and their 95 % intervals.

    Runs that differ in nothing but the seed are one arm. A run has three measures: the mean of the metric over all
    evaluations, its last value and, with --reach, the first step at which the metric is at least that. An arm has the
    means of its runs. From the first arm each other one is subtracted, over the seeds that both have. All runs have to
    be evaluated at the same steps. On a terminal it prints a table, else one line of JSON.

    Example: bridgetower compare BridgeTower=runs/add-1 BridgeTower=runs/add-2 METER=runs/meter-1 METER=runs/meter-2

    Args:
        runs: Folders of runs, or ARM=FOLDER; without a name, an arm is called by the values of its config.
        metric: Metric of the validation split; default: the one by which the first run selects its best checkpoint.
        reach: A value of the metric, for the number of steps to it.
        out: Folder for comparison.html, curves.png and comparison.json; default: none are written.
    """
    require("train")
    require("plot")
    from bridgetower.reports.comparison import Comparison, finished_runs

    arms, folders = zip(*split_names(runs), strict=True)
    name, finished = finished_runs(list(map(Path, folders)), arms, metric)
    comparison = Comparison(metric=name, reach=reach, runs=tuple(finished))
    if len(comparison.arms) < 2:
        raise ValueError(
            f"one arm only ({comparison.arms[0]}); expected runs of at least two to compare"
        )
    if out is not None:
        comparison.write(out, " / ".join(comparison.arms))
    if is_json(json):
        emit(comparison.to_dict())
    else:
        emit_rows(f"{name}, validation; * marks an interval without zero", *comparison.rows())
