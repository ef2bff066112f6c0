"""BridgeTower embeds, matches and describes images, and is trained and evaluated here.

    model = bridgetower.load("BridgeTower/bridgetower-large-itm-mlm-itc")
    model.embed_images(images); model.embed_texts(texts); model.match(images, texts)
    bridgetower.build_index("photos", "photos.lance", model)
    bridgetower.Searcher("photos.lance", model).search("two dogs in the snow")

The names below are the public API. They are imported when they are first used, so that `import bridgetower` is quick.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from bridgetower.extras import Extra, require

os.environ.setdefault("LANCEDB_LOG", "error")  # it warns of each empty group of vectors

if TYPE_CHECKING:
    from bridgetower.checkpoints import convert as convert
    from bridgetower.checkpoints import push_to_hub as push_to_hub
    from bridgetower.checkpoints import read_checkpoint as read_checkpoint
    from bridgetower.checkpoints import save as save
    from bridgetower.fitting.run import fit as fit
    from bridgetower.inference.attention import draw_explanation as draw_explanation
    from bridgetower.inference.attention import explain as explain
    from bridgetower.inference.predictor import Predictor as Predictor
    from bridgetower.inference.predictor import load as load
    from bridgetower.inference.vector_files import embed_source as embed_source
    from bridgetower.model.bridgetower import BridgeTower as BridgeTower
    from bridgetower.model.config import ModelConfig as ModelConfig
    from bridgetower.model.extensions import Extensions as Extensions
    from bridgetower.model.heads import HeadSpec as HeadSpec
    from bridgetower.model.hidden_states import hidden_states as hidden_states
    from bridgetower.model.towers import TextTower as TextTower
    from bridgetower.model.towers import VisionTower as VisionTower
    from bridgetower.processor import Processor as Processor
    from bridgetower.search.build import build_index as build_index
    from bridgetower.search.index import Index as Index
    from bridgetower.search.searcher import Searcher as Searcher
    from bridgetower.tasks.run_config import RunConfig as RunConfig
    from bridgetower.tasks.table import RECIPES as RECIPES
    from bridgetower.training.run import train as train

__version__ = "0.1.0"

_HOMES = {
    "RECIPES": "bridgetower.tasks.table",
    "BridgeTower": "bridgetower.model.bridgetower",
    "Extensions": "bridgetower.model.extensions",
    "HeadSpec": "bridgetower.model.heads",
    "Index": "bridgetower.search.index",
    "ModelConfig": "bridgetower.model.config",
    "Predictor": "bridgetower.inference.predictor",
    "Processor": "bridgetower.processor",
    "RunConfig": "bridgetower.tasks.run_config",
    "Searcher": "bridgetower.search.searcher",
    "TextTower": "bridgetower.model.towers",
    "VisionTower": "bridgetower.model.towers",
    "build_index": "bridgetower.search.build",
    "convert": "bridgetower.checkpoints",
    "draw_explanation": "bridgetower.inference.attention",
    "embed_source": "bridgetower.inference.vector_files",
    "explain": "bridgetower.inference.attention",
    "fit": "bridgetower.fitting.run",
    "hidden_states": "bridgetower.model.hidden_states",
    "load": "bridgetower.inference.predictor",
    "push_to_hub": "bridgetower.checkpoints",
    "read_checkpoint": "bridgetower.checkpoints",
    "save": "bridgetower.checkpoints",
    "train": "bridgetower.training.run",
}
__all__ = sorted(_HOMES)
_EXTRAS: Mapping[str, Extra] = {
    "Index": "search",
    "Searcher": "search",
    "build_index": "search",
    "draw_explanation": "plot",
    "fit": "train",
    "train": "train",
}
"""What is missing in a plain installation."""


def __getattr__(name: str) -> Any:
    if name in _EXTRAS:
        require(_EXTRAS[name])
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return __all__
