"""The table of all tasks, with their recipes and benchmarks, and their evaluation. It imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridgetower.data.config import DataConfig
from bridgetower.evaluation.config import DEFAULTS, EvaluationOptions, Outcome, RetrievalConfig
from bridgetower.objectives.config import TaskConfig
from bridgetower.tasks.entries import (
    CLASSIFICATION,
    COMPOSITIONALITY,
    NLVR2,
    REGRESSION,
    SNLI_VE,
    VQA,
    ZERO_SHOT,
)
from bridgetower.tasks.pretraining import PRETRAINING, RANKING
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec

if TYPE_CHECKING:
    from bridgetower.inference.predictor import Predictor

TASKS: Mapping[str, TaskSpec] = {
    spec.name: spec
    for spec in (PRETRAINING, RANKING, VQA, SNLI_VE, NLVR2, CLASSIFICATION, REGRESSION)
}
"""By the `kind` of their configs."""

RECIPES: Mapping[str, RunConfig] = {
    recipe.recipe: recipe
    for spec in TASKS.values()
    for recipe in (*spec.recipes, *spec.fine_tuning)
}
"""The named settings of `train`, as a `RunConfig` each."""

BENCHMARKS: Mapping[str, TaskSpec] = {
    name: spec
    for spec in (*TASKS.values(), ZERO_SHOT, COMPOSITIONALITY)
    for name in spec.benchmarks
}
"""Tasks of `bridgetower evaluate` by benchmark."""


def spec_of(config: TaskConfig, custom_spec: TaskSpec | None = None) -> TaskSpec:
    """Returns the spec of the task of a config."""
    spec = custom_spec or TASKS.get(config.kind)
    if spec is None:
        raise ValueError(
            f"there is no task {config.kind!r} among {', '.join(TASKS)}; pass its TaskSpec"
        )
    if type(config) is not spec.config:
        raise ValueError(
            f"task {spec.name} takes a {spec.config.__name__}; the run has a {type(config).__name__}"
        )
    return spec


def benchmark_task(
    benchmark: str,
    split: str,
    config: RetrievalConfig,
    spec: TaskSpec | None = None,
    *,
    fit_two_stage: bool = False,
    templates: Sequence[str] = (),
) -> tuple[TaskSpec, TaskConfig]:
    """Returns the spec of a benchmark and its task config, after checking the options."""
    if fit_two_stage:
        if benchmark != "retrieval" or config.protocol == "paper":
            raise ValueError(
                f"fit_two_stage with benchmark {benchmark}, protocol {config.protocol}; expected retrieval by protocol "
                "standard: leave fit_two_stage out"
            )
        if split.startswith("test"):
            raise ValueError(
                f"fit_two_stage on split {split!r}; fit reranking on validation data, not on a test split"
            )
    benchmarks = BENCHMARKS if spec is None else dict.fromkeys(spec.benchmarks, spec)
    if benchmark not in benchmarks:
        raise ValueError(
            f"there is no benchmark {benchmark!r}; expected one of {', '.join(benchmarks)}"
        )
    spec = benchmarks[benchmark]
    if templates and spec is not ZERO_SHOT:
        raise ValueError(f"templates are for zero-shot; leave them out for {benchmark}")
    task = spec.benchmarks[benchmark]
    # Other benchmarks use the protocol and the batch size alone.
    defaults = RetrievalConfig(protocol=config.protocol, batch_size=config.batch_size)
    if task.reads != "captions" and config != defaults:
        raise ValueError(
            f"candidates, folds and captions are for retrieval; leave them out for {benchmark}"
        )
    return spec, task


def evaluate(
    predictor: Predictor,
    benchmark: str,
    folders: Sequence[str | Path],
    split: str,
    config: RetrievalConfig,
    options: EvaluationOptions = DEFAULTS,
    *,
    spec: TaskSpec | None = None,
    fit_two_stage: bool = False,
    templates: Sequence[str] = (),
) -> Outcome:
    """Measures a model on a split. All processes of a distributed run return the same outcome."""
    spec, task = benchmark_task(
        benchmark, split, config, spec, fit_two_stage=fit_two_stage, templates=templates
    )
    model = predictor.model

    # Look for the heads. The error names a recipe that trains one, for this benchmark if there is such a recipe.
    if fit_two_stage:
        model.head("itc")
        model.head("itm")
    if spec.head is not None:
        recipes = (*spec.fine_tuning, *spec.recipes)
        matching = [recipe for recipe in recipes if recipe.task == task]
        recipe = next(iter([*matching, *recipes]), None)
        model.head(spec.head, recipe=None if recipe is None else recipe.recipe)

    # Open the examples.
    # Some tasks have no protocol or no templates.
    settings: dict[str, Any] = {"protocol": config.protocol, "templates": tuple(templates)}
    task = replace(task, **{name: value for name, value in settings.items() if hasattr(task, name)})
    data = DataConfig(folders=tuple(map(str, folders)), num_workers=options.num_workers)
    class_names: Sequence[str] = ()
    if spec.head:
        class_names = predictor.class_names(spec.head)
    elif spec.class_names:
        class_names = spec.class_names(data, task)
    source = ExampleSource(
        data=data,
        splits=(split,),
        processor=predictor.processor,
        task=task,
        names=class_names,
        heads=model.config.heads,
        use="test",
    )

    # An `Evaluation` has all fields of an `ExampleSource`.
    evaluation = Evaluation(
        **vars(source),
        model=model,
        module=lambda: spec.module(model, task),
        examples=spec.examples(source),
        settings=config,
        reranking=None if fit_two_stage else predictor.reranking,
        options=options,
    )
    outcome = spec.evaluate(evaluation)
    return replace(
        outcome,
        metrics=evaluation.with_custom_metrics(outcome.metrics),
        images=evaluation.examples.images,
    )
