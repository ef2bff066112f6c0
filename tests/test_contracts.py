"""Recipes, defaults, signatures and constants are those in `tests/contracts`."""

import inspect
import pkgutil
import re
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import import_module
from pathlib import Path

import bridgetower
from bridgetower.cli import COMMANDS
from bridgetower.data.sets.custom import CUSTOM_SETS
from bridgetower.data.sets.datasets import DATASETS
from bridgetower.tasks.table import RECIPES, TASKS
from helpers.contracts import check_contract

CONFIG_NAMES = ("Config", "Options", "Choice", "Columns")


def defaults_of(config):
    """Returns the default of each field: None if it has to be given, only the kind if the machine decides."""
    defaults = {}
    for field in fields(config):
        if field.default is not MISSING:
            defaults[field.name] = text_of(field.default)
        elif field.default_factory is not MISSING:
            value = field.default_factory()
            defaults[field.name] = "a path" if isinstance(value, Path) else text_of(value)
        else:
            defaults[field.name] = None
    return defaults


def text_of(value):
    return value.__qualname__ if inspect.isfunction(value) else repr(value)


def signature_of(function):
    return [
        f"{parameter.name} {parameter.kind.name.lower()} {text_of(parameter.default)}"
        for parameter in inspect.signature(function).parameters.values()
    ]


def plain_data(value):
    """Returns numbers and names as JSON holds them. Wording and objects that are no data are a TypeError."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): plain_data(entry) for key, entry in value.items()}
    if isinstance(value, frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        return [*map(plain_data, value)]
    if value is None or isinstance(value, int | float) or re.fullmatch(r"[\w./:+ -]{0,40}", value):
        return value
    raise TypeError(value)


def modules():
    """Yields each module of the package."""
    for entry in pkgutil.walk_packages(bridgetower.__path__, "bridgetower."):
        if not entry.name.endswith("__main__"):
            yield import_module(entry.name)


def test_constants():
    """Names and formats of files, headings, limits: what a module defines for others."""
    constants = {}
    for module in modules():
        for name in re.findall(
            r"^([A-Z][A-Z0-9_]*)\b.* = ", inspect.getsource(module), re.MULTILINE
        ):
            with suppress(TypeError):
                constants[f"{module.__name__}.{name}"] = plain_data(getattr(module, name))
    check_contract("constants", constants)


def test_recipes():
    check_contract("recipes", {name: recipe.to_dict() for name, recipe in RECIPES.items()})


def test_tasks():
    tasks = {}
    for task in TASKS.values():
        benchmarks = {name: asdict(config) for name, config in task.benchmarks.items()}
        tasks[task.name] = {
            "config": task.config.__name__,
            "metrics": task.config.metrics,
            "schema": task.schema.name,
            "head": task.head,
            "recipes": [recipe.recipe for recipe in task.recipes],
            "fine_tuning": [recipe.recipe for recipe in task.fine_tuning],
            "benchmarks": benchmarks,
        }
    check_contract("tasks", tasks)


def test_sets():
    specs = {**DATASETS, **CUSTOM_SETS}
    sets = {
        name: {
            "schema": spec.schema.name,
            "summary": spec.summary,
            "config": spec.config.__name__,
            "defaults": defaults_of(spec.config),
        }
        for name, spec in specs.items()
    }
    for name, spec in DATASETS.items():
        sets[name] |= {
            "splits": spec.splits,
            "more_splits": spec.more_splits,
            "split_rule": spec.split_rule,
            "protocol": spec.protocol,
            "published": {
                split: [list(count) for count in counts] for split, counts in spec.published.items()
            },
        }
    check_contract("sets", sets)


def test_defaults_of_configs():
    configs = {}
    for module in modules():
        for name, value in vars(module).items():
            is_config = isinstance(value, type) and name.endswith(CONFIG_NAMES)
            if is_config and is_dataclass(value) and value.__module__ == module.__name__:
                configs[name] = defaults_of(value)
    check_contract("configs", configs)


def test_commands():
    commands = {}
    for name, module in COMMANDS.items():
        command = getattr(
            import_module(f"bridgetower.cli.{module}"), f"{name.replace('-', '_')}_command"
        )
        if callable(command):
            commands[name] = signature_of(command)
    check_contract("commands", commands)


def test_functions_and_methods():
    signatures = {}
    for name in bridgetower.__all__:
        value = getattr(bridgetower, name)
        if not callable(value):
            continue
        signatures[name] = signature_of(value)
        if isinstance(value, type):
            for method, function in inspect.getmembers(value, inspect.isfunction):
                if not method.startswith("_") and function.__module__.startswith("bridgetower"):
                    signatures[f"{name}.{method}"] = signature_of(function)
    check_contract("python", signatures)
