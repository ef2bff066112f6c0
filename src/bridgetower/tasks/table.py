"""Every task, the recipes and benchmarks that follow from them, and their evaluation; importable without torch."""

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

BENCHMARKS: Mapping[str, TaskSpec] = {
    name: spec
    for spec in (*TASKS.values(), ZERO_SHOT, COMPOSITIONALITY)
    for name in spec.benchmarks
}
"""What `bridgetower evaluate` can measure."""


def spec_of(config: TaskConfig, own: TaskSpec | None = None) -> TaskSpec:
    if own is None and config.kind not in TASKS:
        raise ValueError(
            f"there is no task {config.kind!r} among {', '.join(TASKS)}; pass its spec as task"
        )
    spec = TASKS[config.kind] if own is None else own
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
    """Returns the task that a benchmark measures, with its config; a ValueError says what does not go together."""
    if fit_two_stage:
        if benchmark != "retrieval" or config.protocol == "paper":
            raise ValueError(
                f"fit_two_stage with benchmark {benchmark}, protocol {config.protocol}; expected retrieval by protocol "
                "standard: leave fit_two_stage out"
            )
        if split.startswith("test"):
            raise ValueError(
                f"fit_two_stage on split {split!r}; reranking is fitted on other data than tests: validation"
            )
    known = BENCHMARKS if spec is None else dict.fromkeys(spec.benchmarks, spec)
    if benchmark not in known:
        raise ValueError(f"there is no benchmark {benchmark!r}; expected one of {', '.join(known)}")
    if templates and known[benchmark] is not ZERO_SHOT:
        raise ValueError(f"templates are for zero-shot; leave them out for {benchmark}")
    task = known[benchmark].benchmarks[benchmark]
    others = replace(
        config, protocol=RetrievalConfig.protocol, batch_size=RetrievalConfig.batch_size
    )
    if task.reads != "captions" and others != RetrievalConfig():
        raise ValueError(
            f"candidates, folds and captions are for retrieval; leave them out for {benchmark}"
        )
    return known[benchmark], task


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
    """Measures a model on a split; every process of a distributed run gets the same outcome."""
    spec, task = benchmark_task(
        benchmark, split, config, spec, fit_two_stage=fit_two_stage, templates=templates
    )
    for head in ("itc", "itm") if fit_two_stage else ():
        predictor.model.head(head)
    if spec.head is not None:
        recipes = (
            *spec.fine_tuning,
            *spec.recipes,
        )  # the one that trains a model for the benchmark is named first
        recipes = (*(each for each in recipes if each.task == task), *recipes)
        predictor.model.head(spec.head, recipe=next((each.recipe for each in recipes), None))
    given: dict[str, Any] = {"protocol": config.protocol, "templates": tuple(templates)}
    task = replace(task, **{name: value for name, value in given.items() if hasattr(task, name)})
    data = DataConfig(folders=tuple(map(str, folders)), num_workers=options.num_workers)
    names = spec.class_names(data, task) if spec.class_names and not spec.head else ()
    source = ExampleSource(
        data=data,
        splits=(split,),
        processor=predictor.processor,
        task=task,
        names=predictor.class_names(spec.head) if spec.head else names,
        heads=predictor.model.config.heads,
        use="test",
    )
    evaluation = Evaluation(
        **vars(source),
        model=predictor.model,
        module=lambda: spec.module(predictor.model, task),
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
