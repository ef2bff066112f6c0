"""The checkpoint that a run starts from: a new model, or `init` with the heads that the run needs."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bridgetower.checkpoints import Checkpoint, read_checkpoint
from bridgetower.data.batch import derive_seed
from bridgetower.data.config import DataConfig
from bridgetower.files import differences
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import POOLING_FIELDS, HeadsConfig, ModelConfig
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.model.heads import HEADS, chosen_heads
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.spec import TaskSpec
from bridgetower.tasks.table import spec_of
from bridgetower.training.setup import class_labels
from bridgetower.training.towers import Towers, read_towers, with_named_towers

logger = logging.getLogger(__name__)

_OF_ITC = ("itc", "itc_size", *POOLING_FIELDS)
"""What a checkpoint decides of the contrastive head unless the run changes one of them in its recipe."""


def starting_checkpoint(
    config: RunConfig, task: TaskSpec | None = None, extensions: Extensions = NO_EXTENSIONS
) -> Checkpoint:
    """Reads the checkpoint to start from, or draws the weights of a new model around the towers that are given."""
    spec = spec_of(config.task, task)
    if config.init is None:
        checkpoint = _new(config, spec, extensions)
    else:
        checkpoint = _initial(config, spec, config.init, extensions)
    _check_length(checkpoint.config.text.max_length, config, spec)
    return checkpoint


def _check_length(longest: int, config: RunConfig, spec: TaskSpec) -> None:
    """Refuses longer texts than the tower takes; where the recipe has them, says that they are cut."""
    wanted = config.data.max_length
    if wanted <= longest:
        return
    recipe = spec.recipe(config.recipe)
    if wanted != (recipe.data if recipe else DataConfig()).max_length:
        raise ValueError(f"data.max_length is {wanted}; the text tower takes at most {longest} tokens")
    logger.warning("texts are cut at %d tokens, which the text tower takes, not at the recipe's %d", longest, wanted)


def _initial(config: RunConfig, spec: TaskSpec, init: str, extensions: Extensions) -> Checkpoint:
    """Reads the checkpoint to start from; of its preprocessing, what the run's data settings name is replaced."""
    checkpoint = read_checkpoint(init, dtype=torch.float32, extensions=extensions)  # some are in half precision
    processor = checkpoint.processor
    if processor is None or processor.tokenizer is None:
        raise ValueError(f"{init} has no tokenizer; convert it with one first: bridgetower convert --tokenizer")
    values = _with_data_settings(processor.config, config)
    checkpoint = replace(checkpoint, processor=Processor(values, processor.tokenizer))
    if config.image_size is not None:
        checkpoint = checkpoint.resized(config.image_size)
    return _with_heads(checkpoint, config, spec)


def _with_data_settings(values: ProcessorConfig, config: RunConfig) -> ProcessorConfig:
    data = config.data
    if data.profile is not None:  # the other two belong to transformers' profile
        values = replace(values, profile=data.profile, shortest_edge=None, size_divisor=None)
    return replace(
        values,
        max_length=data.max_length,
        background=data.background or values.background,
        fast_decode=data.fast_decode or values.fast_decode,
    )


def _with_heads(checkpoint: Checkpoint, config: RunConfig, spec: TaskSpec) -> Checkpoint:
    """Returns the checkpoint with exactly the heads of the run's config; new ones are drawn."""
    usual, found, chosen = _default_model(config, spec), checkpoint.config.heads, config.model.heads
    if chosen.nlvr2:
        checkpoint = checkpoint.with_token_types(3)
    if found.itc and chosen.itc and all(getattr(chosen, name) == getattr(usual.heads, name) for name in _OF_ITC):
        chosen = replace(chosen, **{name: getattr(found, name) for name in _OF_ITC})
        if found.itc != usual.heads.itc:
            logger.info("%s: its contrastive head is kept, of the kind %s", checkpoint.source, found.itc)
    kept, new, dropped = _sorted_heads(found, chosen)
    model_config = replace(checkpoint.config, heads=_effective_heads(found, chosen, kept))
    _check_model(usual, config, checkpoint, model_config)
    if dropped:
        logger.info("%s: heads that the run does not use are left behind: %s", checkpoint.source, ", ".join(dropped))
    there = checkpoint.tensors
    ranks = "rank" in new and "itm_head.fc.weight" in there
    drawn = [head for head in new if not (ranks and head == "rank")]
    if ranks:
        logger.info("%s: the head rank starts as the logit of a match of the head itm", checkpoint.source)
    if drawn:
        logger.warning("%s lacks heads that the run needs; they start anew: %s", checkpoint.source, ", ".join(drawn))
    tensors = {
        name: tensor
        for name, tensor in there.items()
        if not name.startswith(tuple(f"{head}_head." for head in dropped))
    }
    tensors |= _new_heads(model_config, checkpoint.extensions, new, config.seed)
    if ranks:  # official: it starts as the matching head's logit of a match
        tensors |= {f"rank_head.fc.{kind}": there[f"itm_head.fc.{kind}"][1:].clone() for kind in ("weight", "bias")}
    labels = {head: names for head, names in checkpoint.labels.items() if head in kept}
    labels |= {head: names for head, names in class_labels(config, spec).items() if head in new}
    return replace(checkpoint, config=model_config, tensors=tensors, labels=labels)


def _sorted_heads(there: HeadsConfig, chosen: HeadsConfig) -> tuple[list[str], list[str], list[str]]:
    """Names of the heads that are kept, start anew, and are left behind; a contrastive head of another kind is both."""
    found, needed = chosen_heads(there), chosen_heads(chosen)
    kept = [head for head in found if needed.get(head) == found[head]]
    return kept, [head for head in needed if head not in kept], [head for head in found if head not in kept]


def _effective_heads(there: HeadsConfig, chosen: HeadsConfig, kept: list[str]) -> HeadsConfig:
    """The heads of the run; one that is kept keeps its width, its epsilon and the features that it reads."""
    scaled = any(HEADS[head].hidden_scale for head in kept if head in HEADS)
    pools = {"itc", "image", "text"} & set(kept)
    return replace(
        chosen,
        hidden_scale=there.hidden_scale if scaled else chosen.hidden_scale,
        itc_size=there.itc_size if "itc" in kept else chosen.itc_size,
        mlm_layer_norm_eps=(there if "mlm" in kept else chosen).mlm_layer_norm_eps,
        mlm_activation=(there if "mlm" in kept else chosen).mlm_activation,
        **{name: getattr(there if pools else chosen, name) for name in POOLING_FIELDS},
    )


def _check_model(usual: ModelConfig, config: RunConfig, checkpoint: Checkpoint, effective: ModelConfig) -> None:
    """Raises ValueError if the run changes a value of its recipe's model that the checkpoint decides."""
    default, chosen = usual.to_dict(), config.model.to_dict()
    if config.image_size is not None:  # takes precedence over the model's, for a new model too
        chosen["vision"]["image_size"] = config.image_size
    changed = {name for name, _, _ in differences(default, chosen)}
    ignored = [f"model.{name}" for name, _, _ in differences(effective.to_dict(), chosen) if name in changed]
    if ignored:
        raise ValueError(
            f"{', '.join(ignored)} would be ignored: init {checkpoint.source} brings its own architecture; leave them "
            "out (heads can be chosen with model.heads.*, the image size with image_size)"
        )


def _new_heads(config: ModelConfig, extensions: Extensions, heads: list[str], seed: int) -> dict[str, Tensor]:
    """Draws the weights of some heads, whose shapes depend on widths and pooled layers only, in a shallow model."""
    depth = max(config.heads.image_pooled_layers, config.heads.text_pooled_layers)
    shallow: dict[str, Any] = {f"{part}.num_layers": depth for part in ("vision", "text", "fusion")}
    shallow |= dict.fromkeys(("fusion.vision_layers", "fusion.text_layers"), tuple(range(1, depth + 1)))
    # Towers of libraries have a depth of their own, and heads do not depend on the kind of a tower.
    shallow |= {"vision.architecture": "vit"} if config.vision.settings else {}
    shallow |= {"text.architecture": "bert"} if config.text.settings else {}
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights"))
    model = BridgeTower(config.override(shallow), extensions, generator=generator)
    prefixes = tuple(f"{head}_head." for head in heads)
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}


def _new(config: RunConfig, spec: TaskSpec, extensions: Extensions) -> Checkpoint:
    config = with_named_towers(config, _default_model(config, spec), extensions)
    if spec.recipe(config.recipe) in spec.fine_tuning and not (config.vision or config.text):
        logger.warning("%s fine-tunes a pre-trained model, but starts from random weights; give init", config.recipe)
    towers = read_towers(config, _default_model(config, spec))
    processor = _processor(config, spec, towers)
    image_size = processor.config.image_size
    model_config = towers.model_config(config.model, processor, image_size)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "weights"))
    model = BridgeTower(model_config, extensions, generator=generator)
    tensors = model.state_dict() | towers.tensors(image_size)
    return Checkpoint(
        source=config.recipe,
        config=model_config,
        extensions=extensions,
        tensors=tensors,
        processor=processor,
        labels=class_labels(config, spec),
    )


def _processor(config: RunConfig, spec: TaskSpec, towers: Towers) -> Processor:
    """Preprocessing of a new model: the given tokenizer, or byte-level BPE trained on the training texts."""
    values = ProcessorConfig(
        **towers.preprocessing(config.data.profile),
        image_size=towers.image_size(config, _default_model(config, spec)),
        max_length=config.data.max_length,
        background=config.data.background,
        fast_decode=config.data.fast_decode,
    )
    tokenizer = towers.tokenizer(config.tokenizer)
    if tokenizer is not None:
        return Processor(values, tokenizer)
    texts = spec.training_texts(config, Processor(values, None))
    return Processor(values, train_tokenizer(texts, vocab_size=config.model.text.vocab_size))


def _default_model(config: RunConfig, spec: TaskSpec) -> ModelConfig:
    """The model of the recipe that the run started from."""
    recipe = spec.recipe(config.recipe)
    return recipe.model if recipe else ModelConfig()
