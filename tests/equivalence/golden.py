"""The recorded cases of the official implementation: their files, their models, and the comparison with them."""

import json
import os
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

from bridgetower.checkpoints import read_checkpoint
from bridgetower.checkpoints.keymap import name_table
from bridgetower.inference import predictor
from bridgetower.model.cpu import optimize_for_cpu

FOLDER_VARIABLE = "BRIDGETOWER_GOLDEN"


@dataclass(frozen=True)
class Tolerance:
    """Largest difference |ours - recorded| that passes: atol + rtol · |recorded|."""

    atol: float
    rtol: float = 1e-5

    def holds(self, ours, recorded):
        return ours.shape == recorded.shape and torch.allclose(
            ours, recorded, atol=self.atol, rtol=self.rtol
        )


FEATURES = Tolerance(2e-5)
EPS = Tolerance(1e-6)
GRADIENTS = Tolerance(1e-6)


@dataclass(frozen=True)
class Case:
    folder: Path

    def __post_init__(self):
        """Refuses a missing case: a comparison that was not made must not look like one that passed."""
        if not (self.folder / "meta.json").is_file():
            raise FileNotFoundError(
                f"no recorded case in {self.folder}; set {FOLDER_VARIABLE} to the folder of all"
            )

    @cached_property
    def meta(self):
        return self.json("meta.json")

    @cached_property
    def inputs(self):
        """Returns input tensors. Images were stored in half precision and are cast before use, as for the recording."""
        return self.tensors("inputs.safetensors")

    @cached_property
    def outputs(self):
        return self.tensors("outputs.safetensors")

    @cached_property
    def checkpoint(self):
        return read_checkpoint(self.path("checkpoint.ckpt"), overrides=self.overrides)

    @property
    def overrides(self):
        """What an official file of unpublished towers does not tell: their numbers of heads."""
        vision = self.meta["arch"]["vision"]
        text = self.meta["arch"]["text"]
        heads = vision["num_heads"] if self.naming == "timm" else vision["heads"]
        return {"vision.num_heads": heads, "text.num_heads": text["num_attention_heads"]}

    @property
    def naming(self):
        return "timm" if self.meta["arch"]["vision"]["kind"].startswith("timm") else "clip"

    def path(self, file):
        return self.folder / self.meta.get("files_elsewhere", {}).get(file, file)

    def json(self, file):
        return json.loads((self.folder / file).read_text())

    def tensors(self, file):
        loaded = load_file(self.path(file))
        return {
            name: value.float() if value.dtype == torch.float16 else value
            for name, value in loaded.items()
        }

    def load(self, image_size=None):
        """Returns the model through the public loader, with the kernels for a CPU, at its own or another image size."""
        source = self.path("checkpoint.ckpt")
        model = predictor.load(
            source, image_size=image_size, device="cpu", overrides=self.overrides
        ).model
        optimize_for_cpu(model)
        return model

    def fresh_model(self):
        model = self.checkpoint.model()
        optimize_for_cpu(model)
        return model

    def table(self):
        return name_table(self.checkpoint.tensors, self.naming)

    def extra_tensor_names(self):
        table = name_table(self.checkpoint.extra_tensors, self.naming)
        return {name for source in table.values() for name in source.names}


def folder():
    return Path(os.environ.get(FOLDER_VARIABLE, Path(__file__).parents[1] / "golden"))


@cache
def case(name):
    return Case(folder() / name)


def variant(checkpoint, overrides):
    return (
        replace(checkpoint, config=checkpoint.config.override(overrides))
        .model()
        .requires_grad_(False)
    )


def wrong(ours, recorded, tolerance=FEATURES):
    problems = {}
    for name, value in ours.items():
        if not tolerance.holds(value.detach(), recorded[name]):
            shapes = f"shape {list(value.shape)}, recorded {list(recorded[name].shape)}"
            same = value.shape == recorded[name].shape
            problems[name] = (
                f"off by {float((value - recorded[name]).abs().max()):.2e}" if same else shapes
            )
    return problems


def check(ours, recorded, tolerance=FEATURES, without=()):
    """Fails unless everything recorded but `without` was recomputed, and is close."""
    assert set(ours) == set(recorded) - set(without)
    assert wrong(ours, recorded, tolerance) == {}
