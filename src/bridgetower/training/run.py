"""From a run config to a trained model: builds data, task and evaluation, and hands them to the loop."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bridgetower.checkpoints import Checkpoint, read_checkpoint, update_weights, write_checkpoint
from bridgetower.checkpoints.tensors import read_json
from bridgetower.data.captions import CaptionImages, CaptionPairs, derive_seed
from bridgetower.evaluation.masked_words import evaluate_masked_words
from bridgetower.evaluation.retrieval import evaluate_matching, evaluate_retrieval
from bridgetower.files import locked, remove_leftovers, write_json
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.init import init_weights
from bridgetower.processor import Processor, ProcessorConfig, load_tokenizer, train_tokenizer
from bridgetower.tasks.pretraining import PretrainingTask
from bridgetower.training.config import RunConfig
from bridgetower.training.logs import METRICS
from bridgetower.training.loop import Fabric, Parts, fit, make_fabric
from bridgetower.training.state import FILE as STATE

CONFIG = "run.json"

# The heads that the figures of `RunConfig.select_by` come from.
_HEADS_OF = {
    "rsum": ("itc",),
    "itc_rsum": ("itc",),
    "two_stage_rsum": ("itc", "itm"),
    "itm_accuracy": ("itm",),
    "mlm_accuracy": ("mlm",),
}


def train(config: RunConfig, out: Path, *, resume: bool = False, progress: bool = True) -> dict[str, float]:
    """Trains a model; everything goes to the folder `out`.

    The folder holds `run.json` (the config), `best/` and `last/` (checkpoints of this package), `last.pt` (what a
    killed run continues from), `metrics.jsonl` and `tensorboard/`.

    Args:
        config: Decides the result; the same config on the same machine gives the same bits.
        out: Folder of the run.
        resume: Continue the run in `out`; its config must be the same.
        progress: Show a progress bar.

    Returns:
        Figures of the last evaluation; a finished run is not trained any further.

    Raises:
        FileNotFoundError: `out` holds no run and `resume` is True.
        FileExistsError: `out` holds a run and `resume` is False.
        ValueError: `resume` with another config, or data that does not fit.
        FloatingPointError: A loss is not finite.
    """
    fabric = make_fabric(config)
    with locked(out) if fabric.global_rank == 0 else nullcontext():
        return _train(config, out, fabric, resume=resume, progress=progress)


def _train(config: RunConfig, out: Path, fabric: Fabric, *, resume: bool, progress: bool) -> dict[str, float]:
    if fabric.global_rank == 0:
        _claim(config, out, resume=resume)
    fabric.barrier()
    checkpoint = _start(config)
    model = checkpoint.model().train().to(fabric.device)
    parts = _parts(config, replace(checkpoint, tensors={}), model)
    figures = fit(parts, fabric, out, resume=resume, progress=progress)
    if fabric.global_rank == 0:
        parts.save(out / "last")
    fabric.barrier()
    return figures


def read_run(out: Path) -> RunConfig:
    """Returns the config of the run in a folder.

    Raises:
        FileNotFoundError: The folder holds no run.
    """
    if not (out / CONFIG).exists():
        raise FileNotFoundError(f"{out} holds no run ({CONFIG} is missing); start one without --resume")
    return RunConfig.from_dict(read_json(out / CONFIG))


def _claim(config: RunConfig, out: Path, *, resume: bool) -> None:
    """Writes the config of a new run, or checks that of the run to continue."""
    if not resume:
        if (out / METRICS).exists():  # a run that failed before its first step may be started anew
            raise FileExistsError(f"{out} already holds a run; continue it with --resume or choose another --out")
        write_json(out / CONFIG, config.to_dict())
        return
    changed = list(_differences(read_run(out).to_dict(), config.to_dict()))
    if changed:
        raise ValueError(f"{out} was started with other values of {', '.join(changed)}; resume it with the same config")
    for folder in (out, out / "best", out / "last"):
        remove_leftovers(folder)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of the values that differ."""
    for name in now:
        if isinstance(now[name], dict) and isinstance(before[name], dict):
            yield from _differences(before[name], now[name], f"{prefix}{name}.")
        elif now[name] != before[name]:
            yield prefix + name


def _start(config: RunConfig) -> Checkpoint:
    """Reads the checkpoint to start from, or draws the weights of a new model."""
    checkpoint = _new(config) if config.init is None else _initial(config, config.init)
    longest = checkpoint.config.text.max_length
    if config.data.max_length > longest:
        raise ValueError(f"data.max_length is {config.data.max_length}; the text tower takes at most {longest} tokens")
    return checkpoint


def _initial(config: RunConfig, init: str) -> Checkpoint:
    """Reads the checkpoint to start from; of its preprocessing, what the run's data settings name is replaced."""
    checkpoint = read_checkpoint(init)
    processor = checkpoint.processor
    if processor is None or processor.tokenizer is None:
        raise ValueError(f"{init} has no tokenizer; convert it with one first: bridgetower convert --tokenizer")
    values = replace(
        processor.config,
        max_length=config.data.max_length,
        background=config.data.background or processor.config.background,
    )
    checkpoint = replace(checkpoint, processor=Processor(values, processor.tokenizer))
    return checkpoint if config.image_size is None else checkpoint.resized(config.image_size)


def _new(config: RunConfig) -> Checkpoint:
    processor = _processor(config)
    model_config = config.model.override(
        {"text.vocab_size": processor.vocab_size, "text.pad_token_id": processor.pad_token_id}
    )
    if config.image_size is not None:
        model_config = model_config.override({"vision.image_size": config.image_size})
    model = BridgeTower(model_config)
    init_weights(model, torch.Generator().manual_seed(derive_seed(config.seed, "weights")))
    return Checkpoint(source=config.recipe, config=model_config, tensors=model.state_dict(), processor=processor)


def _processor(config: RunConfig) -> Processor:
    """Preprocessing of a new model: the given tokenizer, or byte-level BPE trained on the training captions."""
    values = ProcessorConfig(
        profile="official-pretrain",
        image_size=config.image_size or config.model.vision.image_size,
        max_length=config.data.max_length,
        background=config.data.background,
    )
    if config.tokenizer is not None:
        return Processor(values, load_tokenizer(config.tokenizer))
    images = CaptionImages(config.data, config.data.train_split, Processor(values, None))
    captions = [caption for captions in images.captions for caption in captions]
    return Processor(values, train_tokenizer(captions, vocab_size=config.model.text.vocab_size))


def _parts(config: RunConfig, checkpoint: Checkpoint, model: BridgeTower) -> Parts:
    processor = checkpoint.processor
    assert processor is not None  # _start refused it
    data = config.data
    train_pairs = CaptionPairs(CaptionImages(data, data.train_split, processor), config.task.masking)
    # What is evaluated is neither repeated nor cut.
    held_out = CaptionImages(
        replace(data, repeats=(), augmentation="none", word_dropout=0.0), data.validation_split, processor
    )
    _check_selection(config, model)

    def evaluate() -> dict[str, float]:
        figures = evaluate_masked_words(model, held_out, config.task.masking) if model.mlm_head else {}
        if model.itc_head:
            figures |= evaluate_retrieval(model, held_out, config.evaluation).figures()
        elif model.itm_head:
            figures["itm_accuracy"] = evaluate_matching(model, held_out, config.evaluation)
        return figures

    def save(folder: Path) -> None:
        tensors = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        current = replace(checkpoint, tensors=tensors)
        if (folder / "config.json").exists():
            update_weights(current, folder)
            return
        if folder.exists():  # without the config, which comes last: a killed run's first write
            shutil.rmtree(folder)
        write_checkpoint(current, folder)

    max_steps = config.max_steps or (config.max_epochs or 0) * (len(train_pairs) // config.batch_size)
    return Parts(
        config=config,
        task=PretrainingTask(model, config.task),
        model=model,
        pairs=train_pairs,
        evaluate=evaluate,
        save=save,
        max_steps=max_steps,
    )


def _check_selection(config: RunConfig, model: BridgeTower) -> None:
    """Raises before training starts if the evaluation cannot give the figure that selects the best checkpoint."""
    missing = [head for head in _HEADS_OF[config.select_by] if getattr(model, f"{head}_head") is None]
    if missing:
        possible = [
            figure
            for figure, heads in _HEADS_OF.items()
            if all(getattr(model, f"{head}_head") is not None for head in heads)
        ]
        raise ValueError(
            f"select_by is {config.select_by!r}, but the model has no {' and no '.join(missing)} head; "
            f"use one of {', '.join(possible)}"
        )


__all__ = ["CONFIG", "STATE", "read_run", "train"]
