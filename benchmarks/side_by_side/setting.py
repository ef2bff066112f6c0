"""What is compared: the same random weights in transformers and here, and inputs for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
)

from bridgetower.checkpoints import Checkpoint, read_checkpoint
from bridgetower.engines.config import EngineName, Precision
from bridgetower.engines.engine import Engine, EngineChoice
from bridgetower.files import new_folder
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.heads import ItcHead, LinearHead
from search import T, in_process

ITC_SIZE = 256
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "text_config": {
        "vocab_size": 70,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "max_position_embeddings": 70,
    },
    "vision_config": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "image_size": 32,
        "patch_size": 16,
    },
}


@dataclass(frozen=True)
class Setting:
    """Sizes and folders.

    Attributes:
        quick: Tiny models, each way once.
        cache: Folder in which models and their exports are kept from one run to the next.
        plain: Leave out what has to be exported or compiled first, of both sides.
    """

    quick: bool
    cache: Path
    plain: bool

    @property
    def repetitions(self) -> int:
        """Of each way, for `alternate`."""
        return 0 if self.quick else 5

    @cached_property
    def config(self) -> BridgeTowerConfig:
        """Of transformers: the published base model, or a tiny one."""
        return BridgeTowerConfig(**TINY) if self.quick else BridgeTowerConfig()

    @property
    def name(self) -> str:
        """Of the size."""
        return "tiny" if self.quick else "base"

    @property
    def graph(self) -> Path:
        """Model of transformers, exported."""
        return self.cache / f"{self.name}-itm.onnx"

    def apart(self, work: Callable[..., T], *arguments: Any) -> T:
        """Does some work in a process of its own, with as many threads; in a quick run, here."""
        if self.quick:
            return work(*arguments)
        return in_process(_as_here, torch.get_num_threads(), work, arguments)

    def theirs(self) -> BridgeTowerForImageAndTextRetrieval:
        """Model of transformers for matching, in evaluation mode."""
        torch.manual_seed(0)
        model: BridgeTowerForImageAndTextRetrieval = BridgeTowerForImageAndTextRetrieval(
            self.config
        ).eval()
        return model.requires_grad_(False)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The same weights, read from the folder that transformers writes."""
        return _through_folder(self.cache / f"{self.name}-itm", self.theirs)

    def engine(self, name: EngineName, precision: Precision) -> Engine:
        """One of our engines with these weights."""
        choice = EngineChoice(
            engine=name, precision=precision, device="cpu", cache=self.cache / "exports"
        )
        checkpoint = self.checkpoint
        if choice.dtype != torch.float32:
            tensors = {key: tensor.to(choice.dtype) for key, tensor in checkpoint.tensors.items()}
            checkpoint = replace(checkpoint, tensors=tensors)
        return choice.start(checkpoint)

    def inputs(self, batch: int, tokens: int, images: int | None = None) -> dict[str, Tensor]:
        """Returns smooth random images, random texts without padding and their mask, as transformers names them."""
        generator = torch.Generator().manual_seed(1)
        side, text = self.config.vision_config.image_size, self.config.text_config
        coarse = torch.randn(images or batch, 3, 6, 6, generator=generator)
        pixels = nn.functional.interpolate(coarse, (side, side), mode="bicubic")
        ids = torch.randint(
            text.pad_token_id + 2, text.vocab_size, (batch, tokens), generator=generator
        )
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def theirs_for_training(self) -> OfficialHeads:
        """Model of transformers for masked words, with further heads as the official code has them."""
        torch.manual_seed(0)
        return OfficialHeads(BridgeTowerForMaskedLM(self.config))

    def ours_for_training(self) -> BridgeTower:
        """Our model with the same weights."""
        folder = self.cache / f"{self.name}-mlm"
        checkpoint = _through_folder(folder, lambda: self.theirs_for_training().model)
        heads = {"heads.itm": True, "heads.itc": "tower", "heads.itc_size": ITC_SIZE}
        model = BridgeTower(
            checkpoint.config.override(heads), generator=torch.Generator().manual_seed(0)
        )
        model.load_state_dict({**model.state_dict(), **checkpoint.tensors})
        _draw_heads(cast(LinearHead, model.head("itm")).fc, model.head("itc"))
        optimize_for_cpu(model)
        return model


def _as_here(threads: int, work: Any, arguments: Any) -> Any:
    torch.set_num_threads(threads)
    return work(*arguments)


class OfficialHeads(nn.Module):
    """A model for masked words and further heads."""

    def __init__(self, model: BridgeTowerForMaskedLM) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.itm = nn.Linear(2 * config.hidden_size, 2)
        self.itc = ItcHead(
            config.vision_config.hidden_size, config.text_config.hidden_size, ITC_SIZE
        )
        _draw_heads(self.itm, self.itc)


@torch.no_grad()
def _draw_heads(*heads: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for head in heads:
        for name, parameter in head.named_parameters():
            if name.endswith("weight"):
                parameter.normal_(0, 0.02, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()


def _through_folder(folder: Path, make: Any) -> Checkpoint:
    if not folder.exists():
        with new_folder(folder) as temporary:
            make().save_pretrained(temporary)
    return read_checkpoint(folder)
