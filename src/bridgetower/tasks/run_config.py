"""The config of a training run, which is saved beside it and repeats it. It imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import AvoidSubcommands

from bridgetower.data.config import DataConfig
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import EncoderName, ModelConfig
from bridgetower.model.presets import BASE
from bridgetower.objectives.config import NotAnOption, PretrainingConfig, TaskConfig
from bridgetower.plain import AT_LEAST_0, AT_LEAST_1, check_choice, check_numbers, from_plain

Precision = Literal["fp32", "tf32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
Parallel = Literal["ddp", "fsdp"]
Compile = Literal["auto", "yes", "no"]
Rule = Literal["adamw", "hf_adamw"] | str
Schedule = Literal["polynomial", "cosine"] | str
ContrastOver = Literal["micro-batch", "step"]
EachEpoch = Literal["epoch"]

CONFIG = "run.json"
METRICS = "metrics.jsonl"
"""Files in the folder of a run that other modules read."""

TIMEOUT_MINUTES = 30.0
"""How long a process waits for the others, such as for one that writes a checkpoint."""

_CHOICES = {
    "precision": Precision,
    "device": Device,
    "parallel": Parallel,
    "contrast_over": ContrastOver,
    "compile": Compile,
}
"""Fields of a run config with a few values."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its groups and its schedule.

    Attributes:
        lr: Learning rate of the towers; heads and fusion encoder multiply it.
        betas: Adam's beta 1 and 2, the decay of the running means of the gradient and of its square.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay, which a step multiplies by the learning rate.
        head_multiplier: Multiplier of the learning rate for heads; the official code reads a float as an absolute rate.
        fusion_multiplier: Multiplier of the learning rate for the fusion encoder with its projections and poolers.
        rule: `adamw` is torch's and decays matrices only; `hf_adamw` is that of transformers 4.17, which the official
            code used (epsilon before the bias correction, decay after the step), with its list of what decays: also
            CLIP's LayerNorms, embeddings, the temperature and LayerNorms of task heads. Or of `Extensions.optimizers`.
        schedule: Rate after the warm-up: `polynomial` to `end_lr`, `cosine` to 0, or of `Extensions.schedules`.
        warmup: Share of all steps over which the rate rises from 0.
        power: Power of the polynomial decay; 1 is linear.
        end_lr: Rate at the end of the polynomial decay, of the towers as `lr`; at most `lr`.
        clip_norm: Largest gradient norm; None does not clip.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    head_multiplier: float = 5.0
    fusion_multiplier: float = 5.0
    rule: Rule = "adamw"
    schedule: Schedule = "polynomial"
    warmup: float = 0.1
    power: float = 1.0
    end_lr: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        naturals = dict.fromkeys(
            ("weight_decay", "head_multiplier", "fusion_multiplier"), AT_LEAST_0
        )
        check_numbers(self, "", warmup=(0, 1), **naturals)
        check_numbers(self, "", end_lr=(0, max(0, self.lr)))
        for name in ("lr", "eps", "power", "clip_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; expected more than 0")
        if self.warmup == 1 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"warmup {self.warmup}, betas {self.betas}; expected numbers in [0, 1)"
            )
        if self.schedule == "cosine" and (self.power, self.end_lr) != (1.0, 0.0):
            raise ValueError(
                f"power {self.power} and end_lr {self.end_lr} are for the polynomial schedule; leave them out"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's result.

    Attributes:
        recipe: Name of the recipe that the run started from; no option of the command.
        source: Where the recipe's numbers come from; no option of the command.
        task: What is learnt, with its objectives.
        model: Architecture. With `init`, only its `heads` may be changed: heads that `init` lacks start anew, those
            that the run does not name are left behind, and the kind of `itc` is that of `init` unless it is set.
        init: Folder, `.ckpt` or hub id to start from; its architecture and tokenizer are kept.
        vision: Image tower of a new model: published weights, which decide its architecture, in a file, a folder or a
            hub id with CLIP, ViT or DeiT, or of timm, `timm:NAME`; or, for random weights, a name of `VISION_TOWERS`,
            such as `clip-b16`, or a custom tower.
        text: Text tower of a new model, likewise: a folder or a hub id with an encoder of transformers, whose tokenizer
            is used; a name of `TEXT_TOWERS`, such as `bert-base`; or a custom tower. Dropout is the recipe's.
        image_size: Pixels; with `init`, position embeddings are resized to it. None keeps that of `model` or `init`, as
            does a recipe's that the patches of `init` do not divide.
        tokenizer: Folder or file with a tokenizer; default: that of `text`, or byte-level BPE trained on the captions.
        data: What is trained on and how it is read.
        optimizer: AdamW and its schedule.
        evaluation: How the validation split is measured; all but `batch_size` is for retrieval.
        batch_size: Pairs per optimiser step, over all processes and accumulated micro-batches.
        micro_batch_size: Pairs that one process holds at once, None for all of its share. ITC compares these pairs with
            those of the other processes, and negatives are drawn from them, so a smaller number makes both easier.
        contrast_over: `micro-batch`, or `step`: ITC compares all pairs of the step, with the gradients of one large
            batch in the memory of a micro-batch; the towers run twice. Negatives stay in the micro-batch.
        checkpoint_activations: Parts whose layers keep only their inputs and run twice: less memory, the same numbers.
        freeze_towers: Train fusion encoder and heads only, on hidden states that are computed once and cached.
        train_top: Train the number of top layers of each tower; default: all, or none with `freeze_towers`, which then
            caches the hidden states below them (CLIP, ViT, DeiT, RoBERTa, BERT), computed without dropout.
        frozen_views: Views of each image, and of each text whose words are masked, that `freeze_towers` computes.
        align_first: Steps of ITC on the projections alone, before the first step, with `freeze_towers`.
        max_steps: Optimiser steps at most; with `max_epochs`, the run ends at the lower of both.
        max_epochs: Passes over the training examples at most; what does not fill a batch is left out of each.
        precision: Precision of the forward pass; weights and optimiser stay in float32. `tf32` is for GPUs.
        deterministic: Use kernels of PyTorch that give the same bits in every run; an error where there are none.
        compile: Compile the layers of the towers and of the fusion encoder; `auto` does so on a GPU unless the run is
            deterministic, and lets what cannot be compiled run as it is, with a warning.
        device: `auto` takes a GPU if there is one, `cuda` is an error if there is none.
        parallel: How several processes share the work: with `ddp` each has all weights, with `fsdp` a share of the
            weights, the gradients and the optimiser state, which takes less memory and more communication.
        seed: Seed of new weights, order, masks, negatives and dropout.
        max_skipped_steps: Steps with gradients that are not finite to skip before one is an error.
        evaluate_every: Steps between evaluations of the validation split, or `epoch`: after each epoch,
            or every few epochs where there are more than 20. The end is measured too, with 0 alone; None: never.
        checkpoint_every: Steps between checkpoints that a killed run resumes from.
        select_by: Validation metric whose best checkpoint is kept; higher is better.
        patience: Evaluations in a row without a better score after which the run ends; None: it ends at its last step.
        log_every: Steps between lines of `metrics.jsonl`, which also has the first and the last step; losses are those
            of that step, as means over the processes.
    """

    recipe: NotAnOption = ""
    source: NotAnOption = ""
    task: Annotated[TaskConfig, AvoidSubcommands] = field(default_factory=PretrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: str | None = None
    vision: str | None = None
    text: str | None = None
    image_size: int | None = None
    tokenizer: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: RetrievalConfig = field(default_factory=RetrievalConfig)
    batch_size: int = 256
    micro_batch_size: int | None = None
    contrast_over: ContrastOver = "micro-batch"
    checkpoint_activations: tuple[EncoderName, ...] = ()
    freeze_towers: bool = False
    train_top: int | None = None
    frozen_views: int = 1
    align_first: int = 0
    max_steps: int | None = None
    max_epochs: int | None = None
    precision: Precision = "fp32"
    deterministic: bool = False
    compile: Compile = "auto"
    device: Device = "auto"
    parallel: Parallel = "ddp"
    seed: int = 0
    max_skipped_steps: int = 0
    evaluate_every: int | EachEpoch | None = 0
    checkpoint_every: int = 500
    select_by: str = "rsum"
    patience: int | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        counts = (
            "batch_size",
            "micro_batch_size",
            "max_steps",
            "max_epochs",
            "checkpoint_every",
            "log_every",
            "frozen_views",
            "train_top",
            "patience",
        )
        bounds = {"align_first": AT_LEAST_0, "max_skipped_steps": AT_LEAST_0}
        check_numbers(self, "", **bounds, **dict.fromkeys(counts, AT_LEAST_1))
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for model_part in self.checkpoint_activations:
            check_choice("checkpoint_activations", model_part, EncoderName)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuses settings that others exclude, or that would be ignored."""
        retrieval_defaults = RetrievalConfig(batch_size=self.evaluation.batch_size)
        of_captions = {
            "evaluation": self.evaluation != retrieval_defaults,
            "data.captions": self.data.captions != DataConfig.captions,
            "data.word_dropout": self.data.word_dropout != DataConfig.word_dropout,
        }
        ignored = ", ".join(filter(of_captions.get, of_captions))
        evaluates_at_steps = type(self.evaluate_every) is int and self.evaluate_every >= 0
        towers = " ".join(name for name in self.checkpoint_activations if name != "fusion")
        start = {"tokenizer": self.tokenizer, "vision": self.vision, "text": self.text}
        in_init = ", ".join(f"{name} {value}" for name, value in start.items() if value is not None)
        for is_wrong, message in (
            (
                {self.max_steps, self.max_epochs} == {None},
                "max_steps and max_epochs are None; give one of them",
            ),
            (
                self.evaluate_every not in ("epoch", None) and not evaluates_at_steps,
                f"evaluate_every is {self.evaluate_every!r}; expected steps, at least 0, or epoch, or None",
            ),
            (
                self.patience is not None
                and (self.evaluate_every in (0, None) or self.data.trains_on_validation),
                f"patience {self.patience} needs evaluations while the run goes on, of a split that is not trained on; "
                "set evaluate_every, or leave patience out",
            ),
            (
                self.init is not None and in_init,
                f"{in_init} with init {self.init}, which has its own; leave one out",
            ),
            (
                ignored and self.task.reads != "captions",
                f"{ignored} would be ignored by {self.task.kind}; leave it out",
            ),
            (
                self.contrast_over == "step" and "ITC" not in self.task.contrasts,
                "contrast_over is 'step', but no phase has ITC (itc is 0); leave it out or set itc",
            ),
            (
                self.frozen_views > 1 and not self.freeze_towers,
                f"frozen_views {self.frozen_views} would be ignored without freeze_towers; leave it out",
            ),
            (
                self.align_first and not self.freeze_towers,
                f"align_first is {self.align_first}; expected 0 without freeze_towers",
            ),
            (
                self.align_first and not isinstance(self.task, PretrainingConfig),
                f"align_first compares images with captions; leave it out for {self.task.kind}",
            ),
            (
                self.freeze_towers and self.data.transform is not None,
                f"data.transform {self.data.transform} with frozen towers, whose features are kept by the data and its "
                "settings: they would outlast a change of the function; leave one out",
            ),
            (
                self.freeze_towers and self.train_top is None and towers,
                f"checkpoint_activations {towers} would be ignored with freeze_towers; leave it out",
            ),
        ):
            if is_wrong:
                raise ValueError(message)

    def compiles(self, device: str) -> bool:
        """Whether layers are compiled on a kind of device."""
        return self.compile == "yes" or (
            self.compile == "auto" and device == "cuda" and not self.deterministic
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], tasks: Mapping[str, type[TaskConfig]]
    ) -> RunConfig:
        """Reads a saved config, whose task is one of `tasks` by `kind`."""
        if "task" in values:
            task = values["task"]
            kind: Any = task.get("kind") if isinstance(task, Mapping) else task
            if kind not in tasks:
                raise ValueError(
                    f"run config.task.kind is {kind!r}; expected one of {', '.join(tasks)}"
                )
            values = {**values, "task": from_plain(tasks[kind], task, "run config.task")}
        return from_plain(cls, values, "run config")


def read_metrics(run: Path, kind: str) -> list[dict[str, float]]:
    """Returns the lines of a run's `metrics.jsonl` of one kind, `train` or `validation`."""
    if not (run / METRICS).exists():
        raise FileNotFoundError(
            f"{run} holds no run ({METRICS} is missing); expected the --out of bridgetower train"
        )
    return [entry for _, entry in whole_lines(run / METRICS) if entry["kind"] == kind]


def whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every line with its content, but not the half line at the end of a killed run."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:
            continue


# Settings that recipes share.
PAPER_OPTIMIZER = OptimizerConfig(
    lr=1e-5, weight_decay=0.01, warmup=0.1, head_multiplier=5, fusion_multiplier=5, rule="hf_adamw"
)

BASE_AT_384 = BASE.override({"vision.image_size": 384})

# Official `blip_randaug_wc` in training; squashed images in evaluation (official `blip`).
COLOUR_VIEWS = DataConfig(
    profile="official-finetune",
    random_crop=0.5,
    flip=True,
    rand_augment="colour",
    rand_magnitude=7,
    max_length=50,
    num_workers=12,
)

# Official `blip_randaug_wohf`: nothing is mirrored, since questions name left and right.
QUESTION_VIEWS = replace(COLOUR_VIEWS, flip=False, rand_augment="geometry", rand_magnitude=5)

# Official `clip_randaug` in training; the short side resized and the centre cropped in both (official `clip`).
CLIP_VIEWS = DataConfig(
    profile="official-pretrain",
    rand_augment="colour",
    rand_magnitude=9,
    max_length=50,
    num_workers=12,
)
