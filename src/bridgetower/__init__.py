"""BridgeTower: embed, match and describe pictures; train and evaluate the model.

    model = bridgetower.load("BridgeTower/bridgetower-large-itm-mlm-itc")
    model.embed_images(images); model.embed_texts(texts); model.match(images, texts)

The names below are the public API. They are imported when they are first used, so that `import bridgetower` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridgetower.checkpoints import convert, read_checkpoint
    from bridgetower.model.bridgetower import BridgeTower
    from bridgetower.model.config import ModelConfig
    from bridgetower.predictor import Predictor, load
    from bridgetower.processor import Processor
    from bridgetower.training.config import RunConfig
    from bridgetower.training.recipes import RECIPES
    from bridgetower.training.run import train

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "BridgeTower",
    "ModelConfig",
    "Predictor",
    "Processor",
    "RunConfig",
    "convert",
    "load",
    "read_checkpoint",
    "train",
]

_HOMES = {
    "RECIPES": "bridgetower.training.recipes",
    "BridgeTower": "bridgetower.model.bridgetower",
    "ModelConfig": "bridgetower.model.config",
    "Predictor": "bridgetower.predictor",
    "Processor": "bridgetower.processor",
    "RunConfig": "bridgetower.training.config",
    "convert": "bridgetower.checkpoints",
    "load": "bridgetower.predictor",
    "read_checkpoint": "bridgetower.checkpoints",
    "train": "bridgetower.training.run",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
