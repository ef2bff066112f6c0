"""The parts of a run, built from its config: the starting checkpoint, the examples, the task and its evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim import Optimizer

from bridgetower.checkpoints import UNMEASURED, Checkpoint, read_checkpoint
from bridgetower.checkpoints.towers import (
    TowerWeights,
    check_overrides,
    read_text_tower,
    read_vision_tower,
)
from bridgetower.data.batches.batch import BatchDataset, derive_seed
from bridgetower.data.batches.examples import PreparedImages
from bridgetower.evaluation.config import EvaluationOptions
from bridgetower.files import differences
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import (
    CLASS_COUNTS,
    FEATURE_FIELDS,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.model.heads import HEADS, chosen_heads
from bridgetower.model.presets import TEXT_TOWERS, VISION_TOWERS
from bridgetower.processor import Processor, ProcessorConfig, load_tokenizer, train_tokenizer
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec
from bridgetower.tasks.table import spec_of

TRAINED_ON = "validation_is_trained_on"
"""Metric of a run whose validation split is also trained on."""

_WIDE_HEADS = {head for head, spec in HEADS.items() if spec.hidden_scale}
# Fields that a kept head keeps.
_KEPT_FIELDS = {"itc": ("itc_size",), "mlm": ("mlm_layer_norm_eps", "mlm_activation")}
_ITC_FIELDS = ("itc", "itc_size", *FEATURE_FIELDS)
"""Settings of the contrastive head that are those of `init`, unless the run changes one of them in its recipe."""

# Settings of a tower that the run decides: positions are resized, and published weights work with any dropout.
_FREE = ("image_size", "dropout", "attention_dropout")

_MAX_EVALUATIONS = 20
"""Evaluations of a run that is evaluated by the epoch; with more epochs, several lie between two."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """The parts of a run that its loop uses."""

    config: RunConfig
    model: BridgeTower
    task: nn.Module  # its `progress` is set to the share of the steps that are done
    examples: BatchDataset
    images: tuple[PreparedImages, ...] = ()  # of the examples, and of the validation split
    # Digests of the sets, by path and splits.
    digests: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[str, str] = field(default_factory=dict)
    evaluate: Callable[[], dict[str, float]] = dict
    # The starting checkpoint without its tensors. None: no checkpoints are written.
    checkpoint: Checkpoint | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.examples) // self.config.batch_size

    @property
    def max_steps(self) -> int:
        """The steps of the run: its number of steps or of epochs, whichever ends first."""
        max_epochs = self.config.max_epochs
        limits = (self.config.max_steps, max_epochs and max_epochs * self.steps_per_epoch)
        return min(limit for limit in limits if limit is not None)

    def to_device(self, batch: Any) -> Any:
        """Copies a batch, and the features of frozen towers, to the device of the model."""
        device = self.model.device
        return self.images[0].on_device(batch, device) if self.images else batch.to(device)

    def evaluates_after(self, step: int) -> bool:
        """Whether the validation split is measured after a step, counted from 1."""
        interval = self.config.evaluate_every
        if interval is None:
            return False
        if interval == "epoch":
            epochs = math.ceil(self.max_steps / _MAX_EVALUATIONS / self.steps_per_epoch)
            interval = epochs * self.steps_per_epoch
        return step == self.max_steps or (interval > 0 and step % interval == 0)


class Callback:
    """Custom code in the loop. Override some methods, and give an instance to `Extensions.callbacks`."""

    def prepare(self, context: TrainContext) -> None:
        """Runs before the optimiser is made and a state is loaded, such as to freeze or to add weights.

        Weights that are added to `context.model` are saved with the states of the run. `exported` keeps them out of
        checkpoints.
        """

    def exported(self, context: TrainContext, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights for `best/` and `last/` by name: those of the model as it was built."""
        return tensors

    def after_step(self, context: TrainContext, optimizer: Optimizer, step: int) -> None:
        """Runs after each step, counted from 1, that changed the weights."""

    @contextmanager
    def evaluating(self, context: TrainContext, optimizer: Optimizer) -> Iterator[None]:
        """Surrounds each evaluation and the writing of `best/` and `last/`, such as to swap the weights."""
        yield


def build_task(
    config: RunConfig, checkpoint: Checkpoint, model: BridgeTower, task: TaskSpec | None = None
) -> TrainContext:
    """Opens the examples, builds the module with the losses, and prepares the evaluation."""
    spec = spec_of(config.task, task)
    data = config.data
    processor = checkpoint.processor
    assert processor is not None  # starting_checkpoint refused it
    source = ExampleSource(
        data=data,
        splits=data.train_splits,
        processor=processor,
        task=config.task,
        names=() if spec.head is None else checkpoint.class_names(spec.head),
        heads=model.config.heads,
        use="train",
    )
    examples = spec.examples(source)
    module = spec.module(model, config.task)
    context = TrainContext(
        config=config,
        model=model,
        task=module,
        examples=examples,
        images=(examples.images,),
        digests=examples.images.digests(),
        checkpoint=replace(checkpoint, tensors={}),
    )
    if config.evaluate_every is None:
        return context

    # The evaluation of the validation split.
    source = replace(
        source, data=data.as_evaluated(), splits=(data.validation_split,), use="validate"
    )
    held_out = spec.examples(source)
    evaluation = Evaluation(
        **vars(source),
        model=model,
        module=lambda: module,
        examples=held_out,
        settings=config.evaluation,
        reranking=UNMEASURED if data.trains_on_validation else None,
        options=EvaluationOptions(num_workers=data.num_workers),
    )
    custom_metrics = model.extensions.metrics
    if config.select_by not in custom_metrics:
        reason = spec.unavailable(evaluation, config.select_by)
        if reason is not None:
            available = [
                name for name in config.task.metrics if spec.unavailable(evaluation, name) is None
            ]
            raise ValueError(
                f"select_by is {config.select_by!r}, but {reason}; use one of "
                f"{', '.join([*available, *custom_metrics])}"
            )

    def evaluate() -> dict[str, float]:
        metrics = spec.metrics(replace(evaluation))  # a copy, without cached predictions
        return metrics | ({TRAINED_ON: 1.0} if data.trains_on_validation else {})

    return replace(
        context,
        images=(examples.images, held_out.images),
        held_out=held_out.images.digests(),
        evaluate=evaluate,
    )


def with_classes(config: RunConfig, spec: TaskSpec) -> RunConfig:
    """Returns the run with the number of classes of its data, unless it changes the number of its recipe."""
    if spec.head not in CLASS_COUNTS or spec.class_names is None:
        return config
    heads = config.model.heads
    recipe_heads = _recipe(config, spec).model.heads
    num_outputs = len(spec.class_names(config.data, config.task)) or 1  # a number has one output
    values: dict[str, Any] = {spec.head: num_outputs}
    if spec.head == "classification":
        values["multi_label"] = spec.multi_label(config.data)
    for name, value in values.items():
        if getattr(recipe_heads, name) == getattr(heads, name) != value:
            logger.info("model.heads.%s is %s, as in %s", name, value, config.data.folders[0])
            heads = replace(heads, **{name: value})
    return replace(config, model=replace(config.model, heads=heads))


def _recipe(config: RunConfig, spec: TaskSpec) -> RunConfig:
    """Returns the recipe that the run started from, or the defaults."""
    return spec.recipe(config.recipe) or RunConfig(max_steps=1)


def starting_checkpoint(
    config: RunConfig, task: TaskSpec | None = None, extensions: Extensions = NO_EXTENSIONS
) -> Checkpoint:
    """Reads the checkpoint to start from, or draws the weights of a new model around given towers."""
    spec = spec_of(config.task, task)
    if config.init is None:
        checkpoint = _new_checkpoint(config, spec, extensions)
    else:
        checkpoint = _initial_checkpoint(config, spec, config.init, extensions)

    max_tokens = checkpoint.config.text.max_length
    max_length = config.data.max_length
    if max_length > max_tokens:
        if max_length != _recipe(config, spec).data.max_length:
            raise ValueError(
                f"data.max_length is {max_length}; the text tower takes at most {max_tokens} tokens"
            )
        logger.warning(
            "texts are cut at %d tokens, which the text tower takes, not at the recipe's %d",
            max_tokens,
            max_length,
        )
    return checkpoint


def _initial_checkpoint(
    config: RunConfig, spec: TaskSpec, init: str, extensions: Extensions
) -> Checkpoint:
    """Returns `init` with exactly the heads of the run's config, of which new ones are drawn."""
    recipe = _recipe(config, spec)
    # Some checkpoints are in half precision.
    checkpoint = read_checkpoint(init, dtype=torch.float32, extensions=extensions)
    source = checkpoint.source
    checkpoint = replace(
        checkpoint, processor=_run_processor(checkpoint, init, config), extensions=extensions
    )

    # Resize the images, unless the patches do not divide the size of the recipe.
    vision = checkpoint.config.vision
    image_size = config.image_size
    if image_size and image_size % vision.patch_size and image_size == recipe.image_size:
        logger.warning(
            "%s: images have its %d pixels; its patches of %d do not divide the recipe's %d",
            source,
            vision.image_size,
            vision.patch_size,
            image_size,
        )
        image_size = None
    if image_size is not None:
        checkpoint = checkpoint.resized(image_size)

    # Sort the heads. One that has other settings or classes is dropped and drawn anew.
    labels = checkpoint.labels
    class_names = _new_labels(config, spec)
    heads, kept_heads = _merged_heads(checkpoint, config, recipe, class_names)
    new = [head for head in chosen_heads(heads) if head not in kept_heads]
    dropped = [head for head in chosen_heads(checkpoint.config.heads) if head not in kept_heads]
    if heads.nlvr2:
        checkpoint = checkpoint.with_token_types(3)
    model_config = replace(checkpoint.config, heads=heads)
    _check_architecture(config, recipe, model_config, source, image_size)

    # Exchange the heads. Officially, `rank` starts as the logit of a match of `itm`.
    if dropped:
        logger.info(
            "%s: heads that the run does not use are left behind: %s", source, ", ".join(dropped)
        )
    prefixes = tuple(f"{head}_head." for head in dropped)
    tensors = {
        name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(prefixes)
    }
    tensors |= _new_heads(model_config, extensions, new, config.seed)
    if "rank" in new and "itm_head.fc.weight" in checkpoint.tensors:
        for kind in ("weight", "bias"):
            match_row = checkpoint.tensors[f"itm_head.fc.{kind}"][1:]
            tensors[f"rank_head.fc.{kind}"] = match_row.clone()
        logger.info("%s: the head rank starts as the logit of a match of the head itm", source)
        new.remove("rank")
    if new:
        relabelled = labels.keys() & class_names.keys()
        titles = [
            f"{head} (there of other classes)" if head in relabelled else head for head in new
        ]
        logger.warning(
            "%s lacks heads that the run needs; they start anew: %s", source, ", ".join(titles)
        )
    labels = {head: names for head, names in labels.items() if head in kept_heads}
    labels |= {head: names for head, names in class_names.items() if head in new}
    return replace(checkpoint, config=model_config, tensors=tensors, labels=labels)


def _merged_heads(
    checkpoint: Checkpoint,
    config: RunConfig,
    recipe: RunConfig,
    class_names: Mapping[str, tuple[str, ...]],
) -> tuple[HeadsConfig, list[str]]:
    """Returns the heads of the run, and the names of those that the checkpoint has with the same classes."""
    old = checkpoint.config.heads
    heads = config.model.heads
    is_itc_changed = any(
        getattr(heads, name) != getattr(recipe.model.heads, name) for name in _ITC_FIELDS
    )
    if old.itc and heads.itc and not is_itc_changed:
        heads = replace(heads, **{name: getattr(old, name) for name in _ITC_FIELDS})
        if old.itc != recipe.model.heads.itc:
            logger.info(
                "%s: its contrastive head is kept, of the kind %s", checkpoint.source, old.itc
            )
    kept_heads = []
    needed = chosen_heads(heads)
    for head, value in chosen_heads(old).items():
        labels = checkpoint.labels.get(head)
        has_same_classes = labels is None or set(labels) == set(class_names.get(head, labels))
        if needed.get(head) == value and has_same_classes:
            kept_heads.append(head)

    # A kept head keeps its width, its epsilon and its features.
    fields: list[str] = []
    for head in kept_heads:
        fields += _KEPT_FIELDS.get(head, ())
        if head in _WIDE_HEADS:
            fields.append("hidden_scale")
        if head == "itc" or head in heads.custom:
            fields += FEATURE_FIELDS
    return replace(heads, **{name: getattr(old, name) for name in fields}), kept_heads


def _run_processor(checkpoint: Checkpoint, init: str, config: RunConfig) -> Processor:
    """Returns the processor of `init` with the settings of the run."""
    processor = checkpoint.processor
    if processor is None or processor.tokenizer is None:
        raise ValueError(
            f"{init} has no tokenizer; convert it with one first: bridgetower convert --tokenizer"
        )
    data = config.data
    values = replace(
        processor.config,
        max_length=data.max_length,
        background=data.background or processor.config.background,
        fast_decode=data.fast_decode or processor.config.fast_decode,
    )
    if data.profile is not None:  # the other two belong to transformers' profile
        values = replace(values, profile=data.profile, shortest_edge=None, size_divisor=None)
    return Processor(values, processor.tokenizer)


def _check_architecture(
    config: RunConfig,
    recipe: RunConfig,
    model_config: ModelConfig,
    source: str,
    image_size: int | None,
) -> None:
    """Refuses changes of the recipe's model that `init` would ignore."""
    wished = config.model.to_dict()
    if image_size is not None:
        wished["vision"]["image_size"] = image_size
    changed = {name for name, _, _ in differences(recipe.model.to_dict(), wished)}
    ignored = [
        f"model.{name}"
        for name, _, _ in differences(model_config.to_dict(), wished)
        if name in changed
    ]
    if ignored:
        raise ValueError(
            f"{', '.join(ignored)} would be ignored: init {source} brings its own architecture; leave them "
            "out, or pre-train with them (heads can be chosen with model.heads.*, the image size with image_size)"
        )


def _new_heads(
    config: ModelConfig, extensions: Extensions, heads: list[str], seed: int
) -> dict[str, Tensor]:
    """Draws the weights of new heads in a shallow model, as their shapes depend on widths only."""
    shallow: dict[str, Any] = {f"{module}.num_layers": 1 for module in ("vision", "text", "fusion")}
    shallow |= dict.fromkeys(("fusion.vision_layers", "fusion.text_layers"), (1,))
    # Towers of libraries are replaced, as they have a fixed depth.
    if config.vision.settings:
        shallow["vision.architecture"] = "vit"
    if config.text.settings:
        shallow["text.architecture"] = "bert"
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights"))
    model = BridgeTower(config.override(shallow), extensions, generator=generator)
    prefixes = tuple(f"{head}_head." for head in heads)
    return {
        name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)
    }


def _new_checkpoint(config: RunConfig, spec: TaskSpec, extensions: Extensions) -> Checkpoint:
    """Draws the weights of a new model, except for towers that the run reads."""
    recipe = _recipe(config, spec)
    defaults = recipe.model
    data = config.data
    config = with_named_towers(config, defaults, extensions)
    if recipe in spec.fine_tuning and not (config.vision or config.text):
        logger.warning(
            "%s fine-tunes a pre-trained model, but starts from random weights; give init",
            config.recipe,
        )

    # Read the towers.
    vision = text = None
    if config.vision is not None:
        vision = read_vision_tower(config.vision, _overrides(config.model.vision, defaults.vision))
    if config.text is not None:
        text = read_text_tower(config.text, _overrides(config.model.text, defaults.text))
    image_size = config.image_size or config.model.vision.image_size
    has_usual_size = config.image_size is None and image_size == defaults.vision.image_size
    if vision and vision.config.architecture == "timm" and has_usual_size:
        image_size = vision.config.image_size

    # Make the processor.
    preprocessing = {"profile": "official-pretrain", **(vision.preprocessing if vision else {})}
    if data.profile is not None:
        preprocessing["profile"] = data.profile
    values = ProcessorConfig(
        **preprocessing,
        image_size=image_size,
        max_length=data.max_length,
        background=data.background,
        fast_decode=data.fast_decode,
    )
    processor = Processor(values, _new_tokenizer(config, spec, text, values))

    # The tokenizer decides the vocabulary of a new text tower, and has to fit a given one.
    num_ids = processor.vocab_size
    pad_id = processor.pad_token_id
    text_config = config.model.text
    if text is None:
        text_config = replace(text_config, vocab_size=num_ids, pad_token_id=pad_id)
    else:
        text_config = replace(
            text.config,
            dropout=text_config.dropout,
            attention_dropout=text_config.attention_dropout,
        )
        num_rows = text_config.vocab_size
        if num_ids > num_rows or pad_id != text_config.pad_token_id:
            raise ValueError(
                f"the tokenizer has {num_ids} ids and pads with {pad_id}; the text tower {text.source} has {num_rows} "
                f"and pads with {text_config.pad_token_id}: give the tokenizer that it was trained with"
            )

    # Draw the weights, and put in those of the towers.
    vision_config = replace(vision.config if vision else config.model.vision, image_size=image_size)
    model_config = replace(config.model, vision=vision_config, text=text_config)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "weights"))
    tensors = BridgeTower(model_config, extensions, generator=generator).state_dict()
    if vision:
        tensors |= vision.resized(image_size).tensors
    if text:
        tensors |= text.tensors
    return Checkpoint(
        source=config.recipe,
        config=model_config,
        extensions=extensions,
        tensors=tensors,
        processor=processor,
        labels=_new_labels(config, spec),
    )


def _new_tokenizer(
    config: RunConfig, spec: TaskSpec, text: TowerWeights | None, values: ProcessorConfig
) -> Tokenizer:
    """Returns the tokenizer of the text tower or of a file, or trains one."""
    tokenizer = text.tokenizer if text else None
    if config.tokenizer is not None:
        if text and tokenizer is not None:
            raise ValueError(
                f"tokenizer {config.tokenizer} with text {text.source}, which has its own; leave one out"
            )
        return load_tokenizer(config.tokenizer)
    if tokenizer is not None:
        return tokenizer
    if text:
        raise ValueError(
            f"the text tower {text.source} has no tokenizer; give tokenizer, a folder or file"
        )
    texts = spec.training_texts(config, Processor(values, None))
    return train_tokenizer(texts, vocab_size=config.model.text.vocab_size)


def with_named_towers(
    config: RunConfig, defaults: ModelConfig, extensions: Extensions
) -> RunConfig:
    """Returns the run with named towers in its model. Only sources of weights stay in `vision` and `text`."""
    tables: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
        "vision": (VISION_TOWERS, extensions.vision_towers),
        "text": (TEXT_TOWERS, extensions.text_towers),
    }
    for modality, (presets, custom) in tables.items():
        name = getattr(config, modality)
        tower = getattr(config.model, modality)
        if name in custom:
            fields: dict[str, Any] = {"architecture": name}
        elif name in presets:
            preset = vars(presets[name])
            fields = {field: value for field, value in preset.items() if field not in _FREE}
            logger.warning(
                "%s %s is an architecture, which starts from random weights", modality, name
            )
        else:
            continue
        if Path(name).exists():
            raise ValueError(
                f"{modality} {name} is a tower's name and a path here; give ./{name} for the weights in there"
            )
        check_overrides(name, modality, fields, _overrides(tower, getattr(defaults, modality)))
        if modality == "vision" and config.image_size is not None:
            fields["image_size"] = config.image_size
        model = replace(config.model, **{modality: replace(tower, **fields)})
        changes: dict[str, Any] = {modality: None, "model": model}
        config = replace(config, **changes)
    return config


def _overrides(
    config: VisionConfig | TextConfig, defaults: VisionConfig | TextConfig
) -> Mapping[str, Any]:
    """Returns the fields in which the run differs from its recipe, which does not bind published towers."""
    return {
        name: value
        for name, value in vars(config).items()
        if name not in _FREE and value != getattr(defaults, name)
    }


def _new_labels(config: RunConfig, spec: TaskSpec) -> dict[str, tuple[str, ...]]:
    """Returns the class names of a new head, by head, where the data decides them."""
    if spec.head is None or spec.class_names is None:
        return {}
    names = tuple(spec.class_names(config.data, config.task))
    if spec.head in config.model.heads.custom:
        return {spec.head: names}
    num_outputs = len(names) or 1  # a number has one output
    expected = getattr(config.model.heads, spec.head)
    if num_outputs != expected:
        raise ValueError(
            f"{spec.name} has {num_outputs} answers or classes here, but model.heads.{spec.head} is {expected}; leave "
            "it out, or choose another set"
        )
    return {spec.head: names} if names else {}
