"""LoRA with peft: small matrices beside frozen weights train, and every checkpoint of the run has them merged.

bridgetower train RECIPE --init MODEL --extensions examples/lora.py:LORA --optimizer.lr 2e-4 …

In Python: train(config, out, extensions=Extensions(callbacks=(Lora(LoraConfig(…)),))). `best/` and `last/` are models
as any others; what --resume continues from has the matrices themselves.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor

from bridgetower import Extensions
from bridgetower.training.setup import Callback, TrainContext


class Lora(Callback):
    """Trains the matrices and the heads; `model` is peft's, such as to save the matrices with `save_pretrained`."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    def prepare(self, context: TrainContext) -> None:
        """Puts the matrices into the model."""
        trained = [
            weight for name, weight in context.model.named_parameters() if weight.requires_grad
        ]
        of_heads = {
            id(weight) for name, weight in context.model.named_parameters() if "_head." in name
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.config.seed)
            self.model = get_peft_model(context.model, self.config)
        for weight in trained:
            weight.requires_grad_(id(weight) in of_heads)

    def exported(self, context: TrainContext, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Merges: W + scaling · B · A under the name of W."""
        merged = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in tensors.items()
            if ".lora_" not in name
        }
        for path, layer in context.model.named_modules():
            if isinstance(layer, Linear):
                down, up = (tensors[f"{path}.lora_{side}.default.weight"] for side in "AB")
                merged[f"{path}.weight"] = merged[f"{path}.weight"] + layer.scaling["default"] * (
                    up @ down
                )
        return merged


LAYERS = ["qkv", "query", "key_value", "out", "up", "down"]
"""The linear layers of the towers and of the fusion encoder; with --freeze-towers use r"fusion\\..*\\.(qkv|…)"."""

LORA = Extensions(callbacks=(Lora(LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS)),))
