"""Every task, and the recipes and benchmarks that follow from them; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping

from bridgetower.objectives.config import TaskConfig
from bridgetower.tasks.entries import CLASSIFICATION, NLVR2, REGRESSION, SNLI_VE, VQA
from bridgetower.tasks.pretraining import PRETRAINING, RANKING
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.spec import TaskSpec

TASKS: Mapping[str, TaskSpec] = {
    spec.name: spec for spec in (PRETRAINING, RANKING, VQA, SNLI_VE, NLVR2, CLASSIFICATION, REGRESSION)
}
"""By the `kind` of their configs."""

RECIPES: Mapping[str, RunConfig] = {
    recipe.recipe: recipe for spec in TASKS.values() for recipe in (*spec.recipes, *spec.fine_tuning)
}

BENCHMARKS: Mapping[str, TaskSpec] = {name: spec for spec in TASKS.values() for name in spec.benchmarks}
"""What `bridgetower evaluate` can measure."""


def spec_of(config: TaskConfig, own: TaskSpec | None = None) -> TaskSpec:
    if own is None and config.kind not in TASKS:
        raise ValueError(f"there is no task {config.kind!r} among {', '.join(TASKS)}; pass its spec as task")
    spec = TASKS[config.kind] if own is None else own
    if type(config) is not spec.config:
        raise ValueError(f"task {spec.name} takes a {spec.config.__name__}; the run has a {type(config).__name__}")
    return spec
