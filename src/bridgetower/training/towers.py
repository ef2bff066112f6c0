"""The towers of a new model, by name or with weights: what they decide, and where their weights go."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from bridgetower.checkpoints.towers import (
    TextWeights,
    VisionWeights,
    check_overrides,
    read_text_tower,
    read_vision_tower,
)
from bridgetower.model.config import ModelConfig
from bridgetower.model.extensions import Extensions
from bridgetower.model.presets import TEXT_TOWERS, VISION_TOWERS
from bridgetower.model.tower_config import TextConfig, VisionConfig
from bridgetower.processor import Processor, Profile, load_tokenizer
from bridgetower.tasks.run_config import RunConfig

logger = logging.getLogger(__name__)

# The run decides these: positions are resized, and published weights are the same with any dropout.
_FREE = ("image_size", "dropout", "attention_dropout")


@dataclass(frozen=True)
class Towers:
    """The towers whose weights a run takes from `vision` and `text`, each None if it starts anew."""

    vision: VisionWeights | None
    text: TextWeights | None

    def model_config(self, model: ModelConfig, processor: Processor, image_size: int) -> ModelConfig:
        """Returns the architecture with these towers, for the processor's tokens and images of `image_size`."""
        vision = replace(model.vision if self.vision is None else self.vision.config, image_size=image_size)
        if self.text is None:
            text = replace(model.text, vocab_size=processor.vocab_size, pad_token_id=processor.pad_token_id)
        else:
            _check_tokenizer(self.text, processor)
            text = replace(self.text.config, dropout=model.text.dropout, attention_dropout=model.text.attention_dropout)
        return replace(model, vision=vision, text=text)

    def tensors(self, image_size: int) -> dict[str, Tensor]:
        """Returns the parameters of the towers, by their names in the model."""
        vision = {} if self.vision is None else self.vision.resized(image_size).tensors
        return vision | ({} if self.text is None else self.text.tensors)

    def tokenizer(self, path: str | None) -> Tokenizer | None:
        """Returns the tokenizer to use: the text tower's own, or that at `path`; None if one is to be trained."""
        if self.text is None:
            return None if path is None else load_tokenizer(path)
        if path is None and self.text.tokenizer is None:
            raise ValueError(f"the text tower {self.text.source} has no tokenizer; give tokenizer, a folder or file")
        if path is not None and self.text.tokenizer is not None:
            raise ValueError(f"tokenizer {path} with text {self.text.source}, which has its own; leave one out")
        return self.text.tokenizer if path is None else load_tokenizer(path)

    def image_size(self, config: RunConfig, defaults: ModelConfig) -> int:
        """Returns the image size: the run's, else that of a tower of timm, else that of its recipe."""
        size = config.model.vision.image_size
        if config.image_size is not None or size != defaults.vision.image_size:
            return config.image_size or size
        follows = self.vision is not None and self.vision.config.architecture == "timm"
        return self.vision.config.image_size if self.vision is not None and follows else size

    def preprocessing(self, profile: Profile | None) -> dict[str, Any]:
        """Returns fields of the preprocessing: those of the image tower, with the profile of the run if it has one."""
        of_tower = {} if self.vision is None else self.vision.preprocessing
        return {"profile": "official-pretrain", **of_tower, **({} if profile is None else {"profile": profile})}


def with_named_towers(config: RunConfig, defaults: ModelConfig, extensions: Extensions) -> RunConfig:
    """Returns the run with the towers that are given by name in its model; `vision` and `text` keep weights only."""
    kinds = (("vision", VISION_TOWERS, extensions.vision_towers), ("text", TEXT_TOWERS, extensions.text_towers))
    for part, presets, own in kinds:
        name, tower = getattr(config, part), getattr(config.model, part)
        if name in own:
            fields: dict[str, Any] = {"architecture": name}
        elif name in presets:
            fields = {field: value for field, value in vars(presets[name]).items() if field not in _FREE}
            logger.warning("%s %s is an architecture, which starts from random weights", part, name)
        else:
            continue
        if Path(name).exists():
            raise ValueError(f"{part} {name} is a tower's name and a path here; give ./{name} for the weights in there")
        check_overrides(name, part, fields, _overrides(tower, getattr(defaults, part)))
        if part == "vision" and config.image_size is not None:
            fields["image_size"] = config.image_size
        changes: dict[str, Any] = {part: None}
        config = replace(config, model=replace(config.model, **{part: replace(tower, **fields)}), **changes)
    return config


def read_towers(config: RunConfig, defaults: ModelConfig) -> Towers:
    """Reads the towers that a run starts from."""
    vision, text = config.vision, config.text
    return Towers(
        None if vision is None else read_vision_tower(vision, _overrides(config.model.vision, defaults.vision)),
        None if text is None else read_text_tower(text, _overrides(config.model.text, defaults.text)),
    )


def _overrides(config: VisionConfig | TextConfig, defaults: VisionConfig | TextConfig) -> Mapping[str, Any]:
    """The fields that the run sets otherwise than its recipe, which does not bind published towers."""
    return {
        name: value for name, value in vars(config).items() if name not in _FREE and value != getattr(defaults, name)
    }


def _check_tokenizer(text: TextWeights, processor: Processor) -> None:
    rows, pad = text.config.vocab_size, text.config.pad_token_id
    if processor.vocab_size > rows or processor.pad_token_id != pad:
        raise ValueError(
            f"the tokenizer has {processor.vocab_size} ids and pads with {processor.pad_token_id}; the text "
            f"tower {text.source} has {rows} and pads with {pad}: give the tokenizer that it was trained with"
        )
