"""Options that several verbs of the command line share; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from bridgetower.engines.config import EngineRequest, Precision
from bridgetower.training.recipes import RECIPES

Recipe = tyro.extras.subcommand_type_from_defaults(
    RECIPES, descriptions={name: recipe.source for name, recipe in RECIPES.items()}, prefix_names=False
)
Model = Annotated[str, arg(help="Hub id, folder of bridgetower or transformers, run folder, or official .ckpt.")]
ModelOrDemo = Annotated[Positional[Model | None], arg(metavar="[MODEL]")]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What is loaded.

    Attributes:
        revision: Branch, tag or commit of a hub id.
        image_size: Resize the position embeddings to this many pixels.
        device: Such as cpu or cuda:0; default: a GPU if there is one.
        tokenizer: Folder or file with a tokenizer, for an official .ckpt.
        answers: JSON file with the list of answers, for an official .ckpt with a VQA head.
        fast_decode: Decode large JPEG files at reduced scale: faster, and pixels differ a little.
    """

    revision: str | None = None
    image_size: int | None = None
    device: str | None = None
    tokenizer: Path | None = None
    answers: Path | None = None
    fast_decode: bool = False

    def load(self, model: str) -> Any:
        """Returns the `bridgetower.predictor.Predictor` of a model."""
        from bridgetower.predictor import load

        return load(model, **vars(self))


@dataclass(frozen=True, kw_only=True)
class LoadOptions(SourceOptions):
    """How a model is loaded.

    Attributes:
        precision: bf16 takes about half the time on hardware that has it.
    """

    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True, kw_only=True)
class RunOptions(SourceOptions):
    """How a model is loaded, and what runs it.

    Attributes:
        precision: bf16 (engines torch and openvino) and int8 (engine onnxruntime) take less time on hardware that has
            them, and give other numbers.
        engine: onnxruntime and openvino run exported parts, on the CPU; a model that was not exported is exported once.
            auto takes the fastest that is installed, see docs/engines.md.
        cache: Folder of such exports; default: ~/.cache/bridgetower.
        compile: Let torch.compile make kernels for engine torch when it starts, which takes minutes and a C++ compiler.
    """

    precision: Precision = "fp32"
    engine: EngineRequest = "torch"
    cache: Path | None = None
    compile: bool = False


Loading = Annotated[LoadOptions, arg(name="")]
AS_USUAL = LoadOptions()
Running = Annotated[RunOptions, arg(name="")]
PLAIN_RUN = RunOptions()
