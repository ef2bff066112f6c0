"""Packages of the optional extras: there, or an error that says how to get them."""

from importlib.util import find_spec
from typing import Literal

Extra = Literal["onnx", "openvino", "serve"]


def require(*names: str, extra: Extra) -> None:
    """Checks that packages are installed, without importing them.

    Raises:
        FileNotFoundError: One is not.
    """
    for name in names:
        if not is_installed(name):
            raise FileNotFoundError(f"package {name} is not installed; run: pip install 'bridgetower[{extra}]'")


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(name) is not None
