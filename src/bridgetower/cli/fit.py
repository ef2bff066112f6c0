"""The command from a table to a model: fit."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from bridgetower.cli.options import Json, resolve_demo
from bridgetower.cli.output import emit, emit_next_command, emit_rows, is_json
from bridgetower.data.sets.custom import SOURCE_HELP
from bridgetower.extras import require
from bridgetower.fitting.survey import FitColumns
from bridgetower.tasks.run_config import TIMEOUT_MINUTES, Device

if TYPE_CHECKING:
    from bridgetower.fitting.plan import FitPlan


def fit_command(
    source: Annotated[Positional[str], arg(help=SOURCE_HELP)],
    *,
    out: Path,
    init: str | None = None,
    columns: Annotated[FitColumns, arg(name="")] = FitColumns(),  # noqa: B008 - frozen
    plan: bool = False,
    max_errors: int | None = None,
    max_epochs: int | None = None,
    device: Device = "auto",
    seed: int = 0,
    timeout_minutes: float = TIMEOUT_MINUTES,
    json: Json = False,
) -> None:
    """Train and measure a model on your images and their table.

    It chooses the task by the columns (captions, questions with answers, statements, labels, numbers), and the
    splits and settings by the number of images (docs/fit.md). Before it trains it prints this plan, the minutes, the
    memory, the disk space, and the plain commands that do the same. Afterwards it measures the model on images that it
    was not trained on, beside what it started from, the most frequent answer and guessing, and writes report.html.

    Killed or stopped, the same command continues.

    Examples: bridgetower fit photos.csv --out runs/photos --plan
              bridgetower fit photos.csv --out runs/photos --init runs/mine
              torchrun --nproc-per-node 2 -m bridgetower fit photos.csv --out runs/photos

    Args:
        out: Folder for the prepared set, the runs, the report and the model.
        init: Model to start from; default: the published one; `none`: random weights.
        columns: Columns, where the usual names are not theirs.
        plan: Stop after the plan.
        max_errors: Rows that may be left out because they cannot be used; default: a tenth of them.
        max_epochs: Passes over the training examples at most; default: by their number.
        device: cpu, cuda or auto, which takes a GPU if there is one.
        seed: Seed of new weights, order and draws.
        timeout_minutes: How long a process waits for the others.
    """
    require("train")
    require("plot")
    from bridgetower.fitting.run import fit
    from bridgetower.training.trainer import Interrupted

    as_json = is_json(json)
    try:
        outcome = fit(
            source,
            out,
            None if init is None else resolve_demo(init, "model"),
            columns=columns,
            plan_only=plan,
            max_errors=max_errors,
            device=device,
            max_epochs=max_epochs,
            seed=seed,
            timeout_minutes=timeout_minutes,
            progress=sys.stderr.isatty(),
            on_plan=lambda made: None if as_json else print_plan(made),
        )
    except Interrupted as stopped:
        print(f"{str(stopped).partition(';')[0]}; the same command continues it", file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        values = None if outcome.result is None else outcome.result.to_dict()
        emit({**outcome.plan.to_dict(), "result": values, "model": str(outcome.model)})
    elif outcome.result is not None:
        result = outcome.result
        title = f"{result.metric}, {result.num_examples:,} tested examples"
        emit_rows(title, ("", "95 % interval in brackets"), result.lines(), texts=(0, 1))
        print(result.verdict)
        print(f"Report: {out / 'report.html'}")
        emit_next_command("serve", "--model", outcome.model)


def print_plan(plan: FitPlan) -> None:
    """Prints a plan in lines."""
    print(*plan.task.lines, sep="\n")
    counts = ", ".join(
        f"{name} {' and '.join(f'{number:,} {noun}' for noun, number in of_split.items())}"
        for name, of_split in plan.counts.items()
    )
    print(f"splits: {plan.splits.reason}: {counts}")
    for reason, number in plan.left_out.items():
        print(f"left out, {reason}: {number:,} (named in {plan.data / 'dataset.json'})")
    config = plan.config
    trained = {
        "fusion": "fusion encoder and heads, on features of the towers that are computed once",
        "top": "fusion encoder, heads and the top layers of the towers",
        "all": "all weights",
    }[plan.trained]
    print(f"trained: {trained}, from {config.init or 'random weights'}")
    print(
        f"settings: batches of {config.batch_size}, at most {config.max_epochs} epochs, learning rate "
        f"{config.optimizer.lr:g}, {config.precision}"
    )
    if plan.costs is not None:
        costs = plan.costs
        print(
            f"takes: about {costs.minutes:.1f} minutes ({costs.steps:,} steps of {costs.step_seconds:.2f} s), "
            f"{costs.memory / 2**30:.1f} GiB of memory, {costs.disk / 2**30:.1f} GiB on the disk"
        )
    print("the same by plain commands:", *plan.commands(), sep="\n  ", flush=True)
