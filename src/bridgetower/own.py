"""Parts of a user's own, in a module that a setting names; importable without torch."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

_Own = TypeVar("_Own")


def own_part(option: str, place: str, kind: type[_Own] | Any) -> _Own:
    """Returns an object of a user's own; of their modules, only the named one is imported."""
    where, _, name = place.partition(":")
    module = _from_file(option, Path(where)) if where.endswith(".py") else _on_path(option, where)
    own = {key: value for key, value in vars(module).items() if isinstance(value, kind)}
    if not name and len(own) == 1:
        return next(iter(own.values()))
    if name not in own:
        found = f"; {name} is a {type(vars(module)[name]).__name__}" if name in vars(module) else ""
        names = ", ".join(f"{where}:{each}" for each in own) or f"a module with a {kind.__name__}"
        raise ValueError(f"{option} is {place}{found}; expected {names}")
    return own[name]


def _from_file(option: str, file: Path) -> ModuleType:
    """Imports a file, once, under its path as name: it takes the place of no other module."""
    name = str(file.resolve())
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, name)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{option} is {file}, but there is no such file; expected FILE.py:NAME")
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _on_path(option: str, name: str) -> ModuleType:
    """Imports a module; the working directory is on Python's path, as its last folder, for that time only."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option} is {name}: {error}; expected FILE.py:NAME, or module:NAME of a module here or on PYTHONPATH"
        ) from error
    finally:
        sys.path.reverse()
        sys.path.remove(folder)
        sys.path.reverse()
