"""The recorded cases of the official implementation: their files, their models, and the comparison with them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bridgetower import predictor
from bridgetower.checkpoints import Checkpoint, read_checkpoint
from bridgetower.checkpoints.keymap import Naming, Source, name_table
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu import optimize_for_cpu

FOLDER_VARIABLE = "BRIDGETOWER_GOLDEN"


@dataclass(frozen=True)
class Tolerance:
    """Largest difference |ours - recorded| that passes: atol + rtol · |recorded|."""

    atol: float
    rtol: float = 1e-5

    def holds(self, ours: Tensor, recorded: Tensor) -> bool:
        return ours.shape == recorded.shape and torch.allclose(ours, recorded, atol=self.atol, rtol=self.rtol)


FEATURES, EPS, GRADIENTS = Tolerance(2e-5), Tolerance(1e-6), Tolerance(1e-6)


@dataclass(frozen=True)
class Case:
    folder: Path

    def __post_init__(self) -> None:
        """Refuses a missing case: a comparison that was not made must not look like one that passed."""
        if not (self.folder / "meta.json").is_file():
            raise FileNotFoundError(f"no recorded case in {self.folder}; set {FOLDER_VARIABLE} to the folder of all")

    @cached_property
    def meta(self) -> Any:
        return self.json("meta.json")

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Input tensors; images were stored in half precision and are cast before use, as for the recording."""
        return self.tensors("inputs.safetensors")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self.tensors("outputs.safetensors")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return read_checkpoint(self.path("checkpoint.ckpt"), overrides=self.overrides)

    @property
    def overrides(self) -> dict[str, int]:
        """What an official file of unpublished towers does not tell: their numbers of heads."""
        vision, text = self.meta["arch"]["vision"], self.meta["arch"]["text"]
        heads = vision["num_heads"] if self.naming == "timm" else vision["heads"]
        return {"vision.num_heads": heads, "text.num_heads": text["num_attention_heads"]}

    @property
    def naming(self) -> Naming:
        """Under which names the official code keeps the image tower."""
        return "timm" if self.meta["arch"]["vision"]["kind"].startswith("timm") else "clip"

    def path(self, file: str) -> Path:
        """Where a file lies, in this case or in the one that shares it."""
        return self.folder / self.meta.get("files_elsewhere", {}).get(file, file)

    def json(self, file: str) -> Any:
        return json.loads((self.folder / file).read_text())

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Reads a tensor file of the case, half precision widened."""
        loaded = load_file(self.path(file))
        return {name: value.float() if value.dtype == torch.float16 else value for name, value in loaded.items()}

    def load(self, image_size: int | None = None) -> BridgeTower:
        """Returns the model through the public loader, with the kernels for a CPU, at its own or another image size."""
        source = self.path("checkpoint.ckpt")
        model = predictor.load(source, image_size=image_size, device="cpu", overrides=self.overrides).model
        optimize_for_cpu(model)
        return model

    def fresh_model(self) -> BridgeTower:
        model = self.checkpoint.model()
        optimize_for_cpu(model)
        return model

    def table(self) -> dict[str, Source]:
        return name_table(self.checkpoint.tensors, self.naming)

    def extra_tensor_names(self) -> set[str]:
        """Official names of what is carried along unread."""
        table = name_table(self.checkpoint.extra_tensors, self.naming)
        return {name for source in table.values() for name in source.names}


def folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE, Path(__file__).parents[1] / "golden"))


@cache
def case(name: str) -> Case:
    return Case(folder() / name)


def variant(checkpoint: Checkpoint, overrides: Mapping[str, Any]) -> BridgeTower:
    return replace(checkpoint, config=checkpoint.config.override(overrides)).model().requires_grad_(False)


def wrong(
    ours: Mapping[str, Tensor], recorded: Mapping[str, Tensor], tolerance: Tolerance = FEATURES
) -> dict[str, str]:
    """Returns the names whose values differ by more than the tolerance, and by how much at most."""
    found = {}
    for name, value in ours.items():
        if not tolerance.holds(value.detach(), recorded[name]):
            shapes = f"shape {list(value.shape)}, recorded {list(recorded[name].shape)}"
            same = value.shape == recorded[name].shape
            found[name] = f"off by {float((value - recorded[name]).abs().max()):.2e}" if same else shapes
    return found


def check(
    ours: Mapping[str, Tensor],
    recorded: Mapping[str, Tensor],
    tolerance: Tolerance = FEATURES,
    without: Collection[str] = (),
) -> None:
    """Fails unless everything recorded but `without` was recomputed, and is close."""
    assert set(ours) == set(recorded) - set(without)
    assert wrong(ours, recorded, tolerance) == {}
