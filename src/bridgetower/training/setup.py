"""What a run starts from, trains and is judged by: from its config and the spec of its task."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bridgetower.checkpoints import UNMEASURED, Checkpoint, read_checkpoint
from bridgetower.checkpoints.towers import check_overrides, read_text_tower, read_vision_tower
from bridgetower.data.batches.batch import BatchDataset, derive_seed
from bridgetower.data.batches.examples import PreparedImages
from bridgetower.data.config import DataConfig
from bridgetower.evaluation.config import EvaluationOptions
from bridgetower.files import differences
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import (
    CLASS_COUNTS,
    FEATURE_FIELDS,
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

_OF_ITC = ("itc", "itc_size", *FEATURE_FIELDS)
"""What a checkpoint decides of the contrastive head unless the run changes one of them in its recipe."""

# The run decides these of a tower: positions are resized, and published weights are the same with any dropout.
_FREE = ("image_size", "dropout", "attention_dropout")

_MOST_EVALUATIONS = 20
"""Evaluations of a run that is evaluated by the epoch: of short epochs, several come between two."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """What is trained and how it is judged."""

    config: RunConfig
    model: BridgeTower
    task: nn.Module  # its `progress` is set to the share of the run that is done
    examples: BatchDataset
    images: tuple[PreparedImages, ...] = ()  # of the examples, and of those that are evaluated
    digests: Mapping[str, str] = field(
        default_factory=dict
    )  # of the sets that are trained on, by path and splits
    held_out: Mapping[str, str] = field(
        default_factory=dict
    )  # the same of those that are evaluated
    evaluate: Callable[[], dict[str, float]] = dict
    # what the run starts from, without its tensors; None: nothing is kept
    checkpoint: Checkpoint | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.examples) // self.config.batch_size

    @property
    def max_steps(self) -> int:
        """The steps of the run: those of the config or of its epochs, whichever are fewer."""
        config = self.config
        limits = [] if config.max_steps is None else [config.max_steps]
        if config.max_epochs is not None:
            limits.append(config.max_epochs * self.steps_per_epoch)
        return min(limits)

    def evaluates_after(self, step: int) -> bool:
        """Whether the validation split is measured after a step, counted from 1."""
        every = self.config.evaluate_every
        if every is None:
            return False
        if every == "epoch":
            epochs = math.ceil(self.max_steps / _MOST_EVALUATIONS / self.steps_per_epoch)
            interval = epochs * self.steps_per_epoch
        else:
            interval = every
        return step == self.max_steps or (interval > 0 and step % interval == 0)


class Callback:
    """Custom code along with the loop: override what is needed, and give an instance to `Extensions.callbacks`."""

    def prepare(self, context: TrainContext) -> None:
        """Is called before the optimiser is made, such as to freeze weights or to add some; a resumed run then loads.

        What is added to `context.model` is saved with the states of the run; `exported` keeps it out of checkpoints.
        """

    def exported(self, context: TrainContext, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns what `best/` and `last/` hold of the weights by name: those of the model as it was built."""
        return tensors

    def after_step(self, context: TrainContext, optimizer: Optimizer, step: int) -> None:
        """Is called after each step, counted from 1, that changed the weights."""

    @contextmanager
    def evaluating(self, context: TrainContext, optimizer: Optimizer) -> Iterator[None]:
        """Surrounds each evaluation and the writing of `best/` and `last/`, such as to swap the weights."""
        yield


def build_task(
    config: RunConfig, checkpoint: Checkpoint, model: BridgeTower, task: TaskSpec | None = None
) -> TrainContext:
    spec, data, processor = spec_of(config.task, task), config.data, checkpoint.processor
    assert processor is not None  # starting_checkpoint refused it
    names = () if spec.head is None else checkpoint.class_names(spec.head)
    source = ExampleSource(
        data=data,
        splits=data.train_splits,
        processor=processor,
        task=config.task,
        names=names,
        heads=model.config.heads,
        use="train",
    )
    train, module = spec.examples(source), spec.module(model, config.task)
    context = TrainContext(
        config=config,
        model=model,
        task=module,
        examples=train,
        images=(train.images,),
        digests=train.images.digests(),
        checkpoint=replace(checkpoint, tensors={}),
    )
    if config.evaluate_every is None:
        return context
    source = replace(
        source, data=data.as_evaluated(), splits=(data.validation_split,), use="validate"
    )
    held_out, known, own = (
        spec.examples(source),
        data.trains_on_validation,
        model.extensions.metrics,
    )
    evaluation = Evaluation(
        **vars(source),
        model=model,
        module=lambda: module,
        examples=held_out,
        settings=config.evaluation,
        reranking=UNMEASURED if known else None,
        options=EvaluationOptions(num_workers=data.num_workers),
    )
    if (
        config.select_by not in own
        and (reason := spec.unavailable(evaluation, config.select_by)) is not None
    ):
        possible = [
            *(name for name in config.task.metrics if spec.unavailable(evaluation, name) is None),
            *own,
        ]
        raise ValueError(
            f"select_by is {config.select_by!r}, but {reason}; use one of {', '.join(possible)}"
        )
    return replace(
        context,
        images=(train.images, held_out.images),
        held_out=held_out.images.digests(),
        evaluate=lambda: spec.metrics(replace(evaluation)) | ({TRAINED_ON: 1.0} if known else {}),
    )


def with_classes(config: RunConfig, spec: TaskSpec) -> RunConfig:
    """Returns the run with as many answers or classes as its data has, unless it changes the number of its recipe."""
    if spec.head not in CLASS_COUNTS or spec.class_names is None:
        return config
    recipe, heads = spec.recipe(config.recipe), config.model.heads
    usual = (recipe.model if recipe else ModelConfig()).heads
    found: dict[str, Any] = {
        spec.head: len(spec.class_names(config.data, config.task)) or 1
    }  # a number: one output
    if spec.head == "classification":
        found["multi_label"] = spec.multi_label(config.data)
    found = {
        name: value
        for name, value in found.items()
        if getattr(usual, name) == getattr(heads, name) != value
    }
    for name, value in found.items():
        logger.info("model.heads.%s is %s, as in %s", name, value, config.data.folders[0])
    return replace(config, model=replace(config.model, heads=replace(heads, **found)))


def starting_checkpoint(
    config: RunConfig, task: TaskSpec | None = None, extensions: Extensions = NO_EXTENSIONS
) -> Checkpoint:
    """Reads the checkpoint to start from, or draws the weights of a new model around the towers that are given."""
    spec = spec_of(config.task, task)
    recipe = spec.recipe(config.recipe)
    usual, usual_data = (recipe.model, recipe.data) if recipe else (ModelConfig(), DataConfig())
    if config.init is None:
        checkpoint = _new(config, spec, usual, extensions)
    else:
        checkpoint = _initial(config, spec, usual, config.init, extensions)
    longest, wanted = checkpoint.config.text.max_length, config.data.max_length
    if wanted > longest and wanted != usual_data.max_length:
        raise ValueError(
            f"data.max_length is {wanted}; the text tower takes at most {longest} tokens"
        )
    if wanted > longest:
        cut = "texts are cut at %d tokens, which the text tower takes, not at the recipe's %d"
        logger.warning(cut, longest, wanted)
    return checkpoint


def _initial(
    config: RunConfig, spec: TaskSpec, usual: ModelConfig, init: str, extensions: Extensions
) -> Checkpoint:
    """Returns `init` with exactly the heads of the run's config; new ones are drawn."""
    checkpoint = read_checkpoint(
        init, dtype=torch.float32, extensions=extensions
    )  # some are in half precision
    processor, data = checkpoint.processor, config.data
    if processor is None or processor.tokenizer is None:
        raise ValueError(
            f"{init} has no tokenizer; convert it with one first: bridgetower convert --tokenizer"
        )
    values = replace(
        processor.config,
        max_length=data.max_length,
        background=data.background or processor.config.background,
        fast_decode=data.fast_decode or processor.config.fast_decode,
    )
    if data.profile is not None:  # the other two belong to transformers' profile
        values = replace(values, profile=data.profile, shortest_edge=None, size_divisor=None)
    checkpoint = replace(
        checkpoint, processor=Processor(values, processor.tokenizer), extensions=extensions
    )
    vision, recipe, size = checkpoint.config.vision, spec.recipe(config.recipe), config.image_size
    if size and size % vision.patch_size and recipe and size == recipe.image_size:
        kept_size = "%s: images have its %d pixels; its patches of %d do not divide the recipe's %d"
        logger.warning(kept_size, checkpoint.source, vision.image_size, vision.patch_size, size)
        config = replace(config, image_size=None)
    if config.image_size is not None:
        checkpoint = checkpoint.resized(config.image_size)
    found, chosen = checkpoint.config.heads, config.model.heads
    if chosen.nlvr2:
        checkpoint = checkpoint.with_token_types(3)
    if (
        found.itc
        and chosen.itc
        and all(getattr(chosen, name) == getattr(usual.heads, name) for name in _OF_ITC)
    ):
        chosen = replace(chosen, **{name: getattr(found, name) for name in _OF_ITC})
        if found.itc != usual.heads.itc:
            logger.info(
                "%s: its contrastive head is kept, of the kind %s", checkpoint.source, found.itc
            )
    there_now, needed = (
        chosen_heads(found),
        chosen_heads(chosen),
    )  # a contrastive head of another kind is in both
    names, known = _labels(config, spec), checkpoint.labels
    renamed = [head for head in names if head in known and set(names[head]) != set(known[head])]
    kept = [
        head for head in there_now if needed.get(head) == there_now[head] and head not in renamed
    ]
    new, dropped = ([head for head in heads if head not in kept] for heads in (needed, there_now))
    # One that is kept keeps its width, its epsilon and the features that it reads.
    keeps: dict[str, object] = {
        "hidden_scale": any(HEADS[head].hidden_scale for head in kept if head in HEADS),
        "itc_size": "itc" in kept,
        **dict.fromkeys(("mlm_layer_norm_eps", "mlm_activation"), "mlm" in kept),
        **dict.fromkeys(FEATURE_FIELDS, {"itc", *chosen.custom} & set(kept)),
    }
    heads = replace(
        chosen, **{name: getattr(found, name) for name, holds in keeps.items() if holds}
    )
    model_config = replace(checkpoint.config, heads=heads)
    wanted = config.model.to_dict()
    if config.image_size is not None:  # takes precedence over the model's, for a new model too
        wanted["vision"]["image_size"] = config.image_size
    changed = {name for name, _, _ in differences(usual.to_dict(), wanted)}
    ignored = [
        f"model.{name}"
        for name, _, _ in differences(model_config.to_dict(), wanted)
        if name in changed
    ]
    if ignored:
        raise ValueError(
            f"{', '.join(ignored)} would be ignored: init {checkpoint.source} brings its own architecture; leave them "
            "out, or pre-train with them (heads can be chosen with model.heads.*, the image size with image_size)"
        )
    if dropped:
        logger.info(
            "%s: heads that the run does not use are left behind: %s",
            checkpoint.source,
            ", ".join(dropped),
        )
    there = checkpoint.tensors
    ranks = "rank" in new and "itm_head.fc.weight" in there
    named = {head: f"{head} (there of other classes)" for head in renamed}
    drawn = [named.get(head, head) for head in new if not (ranks and head == "rank")]
    if ranks:
        logger.info(
            "%s: the head rank starts as the logit of a match of the head itm", checkpoint.source
        )
    if drawn:
        logger.warning(
            "%s lacks heads that the run needs; they start anew: %s",
            checkpoint.source,
            ", ".join(drawn),
        )
    left = tuple(f"{head}_head." for head in dropped)
    tensors = {name: tensor for name, tensor in there.items() if not name.startswith(left)}
    tensors |= _new_heads(model_config, checkpoint.extensions, new, config.seed)
    if ranks:  # official: it starts as the matching head's logit of a match
        tensors |= {
            f"rank_head.fc.{kind}": there[f"itm_head.fc.{kind}"][1:].clone()
            for kind in ("weight", "bias")
        }
    labels = {head: known[head] for head in kept if head in known}
    labels |= {head: names[head] for head in new if head in names}
    return replace(checkpoint, config=model_config, tensors=tensors, labels=labels)


def _new_heads(
    config: ModelConfig, extensions: Extensions, heads: list[str], seed: int
) -> dict[str, Tensor]:
    """Draws the weights of some heads, whose shapes depend on widths only, in a shallow model."""
    shallow: dict[str, Any] = {f"{part}.num_layers": 1 for part in ("vision", "text", "fusion")}
    shallow |= dict.fromkeys(("fusion.vision_layers", "fusion.text_layers"), (1,))
    # Towers of libraries have a depth of their own, and heads do not depend on the kind of a tower.
    shallow |= {"vision.architecture": "vit"} if config.vision.settings else {}
    shallow |= {"text.architecture": "bert"} if config.text.settings else {}
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights"))
    model = BridgeTower(config.override(shallow), extensions, generator=generator)
    prefixes = tuple(f"{head}_head." for head in heads)
    return {
        name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)
    }


def _new(
    config: RunConfig, spec: TaskSpec, defaults: ModelConfig, extensions: Extensions
) -> Checkpoint:
    config = with_named_towers(config, defaults, extensions)
    if spec.recipe(config.recipe) in spec.fine_tuning and not (config.vision or config.text):
        logger.warning(
            "%s fine-tunes a pre-trained model, but starts from random weights; give init",
            config.recipe,
        )
    vision = text = None
    if config.vision is not None:
        vision = read_vision_tower(config.vision, _overrides(config.model.vision, defaults.vision))
    if config.text is not None:
        text = read_text_tower(config.text, _overrides(config.model.text, defaults.text))
    image_size = config.image_size or config.model.vision.image_size
    if vision and vision.config.architecture == "timm" and config.image_size is None:
        image_size = (
            vision.config.image_size if image_size == defaults.vision.image_size else image_size
        )
    data, preprocessing = (
        config.data,
        {"profile": "official-pretrain", **(vision.preprocessing if vision else {})},
    )
    if data.profile is not None:
        preprocessing["profile"] = data.profile
    values = ProcessorConfig(
        **preprocessing,
        image_size=image_size,
        max_length=data.max_length,
        background=data.background,
        fast_decode=data.fast_decode,
    )
    path, tokenizer = config.tokenizer, text.tokenizer if text else None
    if text and path is None and tokenizer is None:
        raise ValueError(
            f"the text tower {text.source} has no tokenizer; give tokenizer, a folder or file"
        )
    if text and path is not None and tokenizer is not None:
        raise ValueError(
            f"tokenizer {path} with text {text.source}, which has its own; leave one out"
        )
    if tokenizer is None and path is not None:
        tokenizer = load_tokenizer(path)
    if tokenizer is None:
        texts = spec.training_texts(config, Processor(values, None))
        tokenizer = train_tokenizer(texts, vocab_size=config.model.text.vocab_size)
    processor = Processor(values, tokenizer)
    ids, pad, given = processor.vocab_size, processor.pad_token_id, config.model.text
    if text is None:
        text_config = replace(given, vocab_size=ids, pad_token_id=pad)
    else:
        text_config = replace(
            text.config, dropout=given.dropout, attention_dropout=given.attention_dropout
        )
        rows = text_config.vocab_size
        if ids > rows or pad != text_config.pad_token_id:
            raise ValueError(
                f"the tokenizer has {ids} ids and pads with {pad}; the text tower {text.source} has {rows} and pads "
                f"with {text_config.pad_token_id}: give the tokenizer that it was trained with"
            )
    vision_config = replace(vision.config if vision else config.model.vision, image_size=image_size)
    model_config = replace(config.model, vision=vision_config, text=text_config)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "weights"))
    tensors = BridgeTower(model_config, extensions, generator=generator).state_dict()
    tensors |= vision.resized(image_size).tensors if vision else {}
    tensors |= text.tensors if text else {}
    return Checkpoint(
        source=config.recipe,
        config=model_config,
        extensions=extensions,
        tensors=tensors,
        processor=processor,
        labels=_labels(config, spec),
    )


def with_named_towers(
    config: RunConfig, defaults: ModelConfig, extensions: Extensions
) -> RunConfig:
    """Returns the run with the towers that are given by name in its model; `vision` and `text` keep weights only."""
    kinds = (
        ("vision", VISION_TOWERS, extensions.vision_towers),
        ("text", TEXT_TOWERS, extensions.text_towers),
    )
    for part, presets, own in kinds:
        name, tower = getattr(config, part), getattr(config.model, part)
        if name in own:
            fields: dict[str, Any] = {"architecture": name}
        elif name in presets:
            fields = {
                field: value for field, value in vars(presets[name]).items() if field not in _FREE
            }
            logger.warning("%s %s is an architecture, which starts from random weights", part, name)
        else:
            continue
        if Path(name).exists():
            raise ValueError(
                f"{part} {name} is a tower's name and a path here; give ./{name} for the weights in there"
            )
        check_overrides(name, part, fields, _overrides(tower, getattr(defaults, part)))
        if part == "vision" and config.image_size is not None:
            fields["image_size"] = config.image_size
        changes: dict[str, Any] = {part: None}
        config = replace(
            config, model=replace(config.model, **{part: replace(tower, **fields)}), **changes
        )
    return config


def _overrides(
    config: VisionConfig | TextConfig, defaults: VisionConfig | TextConfig
) -> Mapping[str, Any]:
    """The fields that the run sets otherwise than its recipe, which does not bind published towers."""
    return {
        name: value
        for name, value in vars(config).items()
        if name not in _FREE and value != getattr(defaults, name)
    }


def _labels(config: RunConfig, spec: TaskSpec) -> dict[str, tuple[str, ...]]:
    """Returns the names of the classes of a new head, by head, where they are not the same for all data."""
    if spec.head is None or spec.class_names is None:
        return {}
    names = tuple(spec.class_names(config.data, config.task))
    if spec.head in config.model.heads.custom:
        return {spec.head: names}
    expected, found = (
        getattr(config.model.heads, spec.head),
        len(names) or 1,
    )  # a number needs one output
    if found != expected:
        raise ValueError(
            f"{spec.name} has {found} answers or classes here, but model.heads.{spec.head} is {expected}; leave it "
            "out, or choose another set"
        )
    return {spec.head: names} if names else {}
