"""A fit from its source to its report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.sets.custom import CUSTOM_SETS, prepare_custom
from bridgetower.distributed import broadcast_object, process_group, rank
from bridgetower.evaluation.config import EvaluationOptions, Outcome, RetrievalConfig
from bridgetower.files import remove_folder, require_space, write_json
from bridgetower.fitting.measure import (
    FitResult,
    HeldOutExamples,
    Scores,
    joined_scores,
    result_of,
)
from bridgetower.fitting.plan import FitPlan, measure_costs
from bridgetower.fitting.report import write_report
from bridgetower.fitting.rules import choose_splits, choose_trained, chosen_config, recipe_of
from bridgetower.fitting.survey import FitColumns, choose_task, survey_source
from bridgetower.inference.predictor import Predictor, load
from bridgetower.tasks.run_config import CONFIG, TIMEOUT_MINUTES, Device
from bridgetower.tasks.spec import TaskSpec
from bridgetower.tasks.table import evaluate, spec_of
from bridgetower.training.data_parallel import run_device
from bridgetower.training.run import FEATURES, train

PUBLISHED = "BridgeTower/bridgetower-large-itm-mlm-itc"
"""The model that a fit starts from by default."""

SCRATCH = "none"
"""Value of `init` that starts from random weights."""

PLAN = "plan.json"
RESULT = "result.json"
REPORT = "report.html"

_BAD_SHARE = 0.1  # of the rows may be left out

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitOutcome:
    """What a fit has made.

    Attributes:
        plan: What was done.
        result: What was reached; None if only the plan was asked for.
        model: Folder of the model, for `bridgetower.load`.
    """

    plan: FitPlan
    result: FitResult | None
    model: Path


def fit(
    source: str | Path,
    out: str | Path,
    init: str | None = None,
    *,
    columns: FitColumns | None = None,
    plan_only: bool = False,
    max_errors: int | None = None,
    device: Device = "auto",
    max_epochs: int | None = None,
    seed: int = 0,
    timeout_minutes: float = TIMEOUT_MINUTES,
    progress: bool = True,
    on_plan: Callable[[FitPlan], None] = lambda plan: None,
) -> FitOutcome:
    """Prepares a source, trains the task that its columns make, and measures the model on what it was not trained on.

    The task, the splits and the settings of the training follow from the data (docs/fit.md). A killed fit goes on where
    it was, by the same call. Started by torchrun, all processes train.

    Args:
        source: As `bridgetower prepare` takes it: a folder of images, a table, tar shards, or the URL of one.
        out: Folder with `data/`, `run/` (of the model), `folds/`, plan.json, result.json and report.html.
        init: Model to start from, as `bridgetower.load` takes it; "none": random weights; None: `PUBLISHED`.
        columns: Task and columns that are given; None: by the usual names.
        plan_only: Stop after the plan, for which the source is prepared.
        max_errors: Rows that may be left out because they cannot be used; None: a tenth of them.
        device: `auto` takes a GPU if there is one.
        max_epochs: Passes over the training examples at most; None: by the number of examples.
        seed: Of new weights, order and draws.
        timeout_minutes: How long a process waits for the others.
        progress: Show progress bars.
        on_plan: Is called with the plan before the training starts.

    Raises:
        OSError: The source or the model cannot be read, or the disk has no room.
        ValueError: The columns make no task, too many rows are bad, or the model does not fit the data.
    """
    out = Path(out)
    columns = columns or FitColumns()
    with process_group(device, timeout_minutes):
        plan = None
        error = None
        if rank() == 0:
            try:
                plan = _make_plan(
                    str(source),
                    out,
                    init,
                    columns,
                    max_errors=max_errors,
                    device=device,
                    max_epochs=max_epochs,
                    seed=seed,
                    progress=progress,
                )
            except (ValueError, OSError) as problem:
                error = problem
        plan, error = broadcast_object((plan, error))
        if error is not None:
            raise error
        assert plan is not None
        # Losses compare the pairs of all processes, so that all time their steps.
        plan = replace(plan, costs=measure_costs(plan))
        if rank() == 0:
            assert plan.costs is not None
            require_space(out, plan.costs.disk, "features, states and models")
            write_json(out / PLAN, plan.to_dict())
            on_plan(plan)
        if plan_only:
            return FitOutcome(plan=plan, result=None, model=plan.checkpoint)

        # Train the model of each fold and that of all, or the only one.
        configs = {plan.fold_run(fold): plan.fold_config(fold) for fold in plan.folds}
        configs[plan.run] = plan.config
        for number, (run, config) in enumerate(configs.items(), start=1):
            if rank() == 0:
                logger.info("training %d of %d: %s", number, len(configs), run)
            train(
                config,
                run,
                resume=(run / CONFIG).exists(),
                feature_cache=out / FEATURES,
                timeout_minutes=timeout_minutes,
                progress=progress,
            )

        if rank() == 0 and (out / FEATURES).exists():
            remove_folder(out / FEATURES)
        result = _measure(plan, device, progress=progress)
        return FitOutcome(plan=plan, result=result, model=plan.checkpoint)


def _make_plan(
    source: str,
    out: Path,
    init: str | None,
    columns: FitColumns,
    *,
    max_errors: int | None,
    device: Device,
    max_epochs: int | None,
    seed: int,
    progress: bool,
) -> FitPlan:
    """Prepares the source and returns the plan, without its costs."""
    logger.info("reading the rows of %s", source)
    survey = survey_source(source, columns)
    task = choose_task(source, survey, columns)
    splits = choose_splits(survey.images, survey.splits)
    # Read the config of the model to start from.
    model = None
    if init != SCRATCH:
        try:
            model = read_checkpoint(init or PUBLISHED).config
        except FileNotFoundError as error:
            if init is not None:
                raise
            raise FileNotFoundError(
                f"no init is given, and {PUBLISHED} (916 million weights, 3.7 GB to download) is not at hand "
                f"({error}); give init: a model's folder, demo for that of `make demo`, or none for random weights, "
                "which learn captions and questions of small drawings"
            ) from error
    recipe = recipe_of(task.kind, None if model is None else model.heads)

    # Prepare the set: what is wrong with an image is found here.
    if max_errors is None:
        max_errors = int(_BAD_SHARE * survey.rows)
    spec = CUSTOM_SETS[task.kind]
    settings = {**task.settings, **splits.settings, "max_errors": max_errors}
    folder = out / "data"
    info = prepare_custom(task.kind, source, folder, spec.config(**settings), progress=progress)

    # Choose the run.
    num_examples = sum(info.splits[name].examples for name in splits.train)
    device_type = run_device(device).type
    trained = "all" if model is None else choose_trained(device_type)
    config = chosen_config(
        recipe,
        splits,
        num_examples=num_examples,
        trained=trained,
        init=None if init == SCRATCH else init or PUBLISHED,
        folder=str(folder),
        precision="bf16" if device_type == "cuda" else "fp32",
        max_length=None if model is None else model.text.max_length,
    )
    config = replace(config, device=device, seed=seed, max_epochs=max_epochs or config.max_epochs)
    return FitPlan(
        source=source,
        out=out,
        task=task,
        splits=splits,
        config=config,
        trained=trained,
        counts=info.counts(),
        left_out=info.left_out,
        max_errors=max_errors,
    )


def _measure(plan: FitPlan, device: str, *, progress: bool) -> FitResult:
    """Measures the model on tested examples, and what it started from, and writes the report."""
    spec = spec_of(plan.config.task)
    folds = plan.folds
    tested_splits = folds or (plan.splits.test,)
    examples = HeldOutExamples.read(
        plan.task.kind,
        str(plan.data),
        spec.schema,
        tested_splits,
        plan.splits.train,
    )
    outcomes: list[Outcome] = []
    befores: list[Outcome] = []
    # Measure the model that the fit started from too, if it has the head.
    before: Predictor | None = None
    init = plan.config.init
    if init is not None:
        heads = read_checkpoint(init).config.heads
        if {"pairs": heads.itc, "vqa": heads.vqa}.get(plan.task.kind):
            before = load(init, device=device)
    predictor = None
    for split in tested_splits:
        folder = plan.fold_run(split) / "last" if folds else plan.checkpoint
        predictor = load(str(folder), device=device)
        outcomes.append(_evaluated(plan, spec, predictor, split, progress=progress))
        if before is not None:
            befores.append(_evaluated(plan, spec, before, split, progress=progress))
    assert predictor is not None

    scores = joined_scores([examples.scores(outcome) for outcome in outcomes])
    baselines: list[tuple[str, Scores]] = []
    if befores:
        before_scores = joined_scores([examples.scores(outcome) for outcome in befores])
        baselines.append((f"the model before, {plan.config.init}", before_scores))
    if constant := examples.constant_scores(scores):
        baselines.append(constant)
    names = predictor.class_names(spec.head) if spec.head else ()
    result = result_of(plan.task.kind, scores, baselines, examples.chance(names, outcomes))
    if rank() == 0:
        write_json(plan.out / RESULT, {**result.to_dict(), "model": str(plan.checkpoint)})
        judgements = [examples.judgements(outcome) for outcome in outcomes]
        write_report(plan.out / REPORT, plan, result, outcomes, judgements)
    return result


def _evaluated(
    plan: FitPlan, spec: TaskSpec, predictor: Predictor, split: str, *, progress: bool
) -> Outcome:
    benchmark = next(iter(spec.benchmarks))
    config = RetrievalConfig(batch_size=plan.config.evaluation.batch_size)
    if spec.name == "pretraining":
        config = replace(plan.config.evaluation, protocol="standard")
    return evaluate(
        predictor,
        benchmark,
        [plan.data],
        split,
        config,
        EvaluationOptions(progress=progress),
    )
