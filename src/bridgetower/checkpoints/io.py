"""Checkpoints on disk and on the hub: recognise, read, write, convert."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from bridgetower.checkpoints import huggingface, microsoft
from bridgetower.checkpoints.card import write_card
from bridgetower.checkpoints.checkpoint import Checkpoint, check_tensors, finite
from bridgetower.checkpoints.hub import HubOptions, download, download_ckpt, parse_hub_id
from bridgetower.checkpoints.reranking import UNMEASURED, Reranking
from bridgetower.checkpoints.states import ABOUT, state_weights
from bridgetower.checkpoints.tensors import (
    SHARD_BYTES,
    WEIGHTS,
    only_tensors,
    read_safetensors,
    read_torch_archive,
    read_weights,
    write_safetensors,
    write_weights,
)
from bridgetower.files import new_folder, parse_json, read_bytes, read_json, require_empty, write_json
from bridgetower.model.config import ModelConfig
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.model.plain import from_plain
from bridgetower.processor import Processor, ProcessorConfig, load_tokenizer

Format = Literal["bridgetower", "hf"]

LABELS = "labels.json"

_FORMAT = {"format": "bridgetower", "version": 1}

logger = logging.getLogger(__name__)


def read_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    answers: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    extensions: Extensions = NO_EXTENSIONS,
    **hub: Unpack[HubOptions],
) -> Checkpoint:
    """Reads a checkpoint of any published kind, recognised by what it holds.

    Args:
        source: A folder of this package, such as a state of a run, or of transformers, an official `.ckpt`, or a hub id
            (`owner/name`, `owner/name@revision`, `owner/name/FILE.ckpt`).
        revision: Branch, tag or commit of a hub id.
        tokenizer: Folder or file with the tokenizer, for sources without one (an official `.ckpt`).
        answers: JSON file with the list of answers of the VQA head, for sources without one (an official `.ckpt`).
        overrides: Dotted model config fields that an official `.ckpt` cannot tell, such as `{"text.num_heads": 12}`.
        dtype: Of the tensors, converted while they are read; None keeps each as it is stored.
        extensions: Custom towers, bridges and heads that a folder of this package names in its config.
        hub: For hub ids: `token`, `subfolder`, `cache_dir` and `local_files_only`, as in `huggingface_hub`.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: What is there is damaged, of no known kind, or does not fit together.
    """
    path = Path(source)
    if (revision is not None or hub) and path.exists():
        given = {"revision": revision, **hub} if revision is not None else hub
        settings = ", ".join(f"{name} {value!r}" for name, value in given.items() if name != "token")
        raise ValueError(f"{settings or 'token'} is for hub ids, but {source} is a local path; leave it out")
    if path.is_dir():
        checkpoint = _read_folder(path, str(source), overrides or {}, dtype, extensions)
    elif path.is_file():
        checkpoint = _read_official(path, overrides or {}, dtype)
    elif hub_id := parse_hub_id(str(source)):
        repo, file, named = hub_id
        if named and revision is not None:
            raise ValueError(f"{source} names a revision, and revision is {revision!r}; leave one of them out")
        wanted = named or revision
        if file is None:
            place, commit = download(repo, wanted, **hub)
        if file is None and any((place / name).exists() for name in ("config.json", "best/config.json")):
            name = f"{repo}@{commit}"
            checkpoint = _read_folder(place, name, overrides or {}, dtype, extensions)
        else:
            place, file, commit = download_ckpt(repo, wanted, file, **hub)
            name = f"{repo}/{file}@{commit}"
            checkpoint = replace(_read_official(place, overrides or {}, dtype), source=name)
        if commit != wanted:
            logger.warning("%s is at commit %s; pin it by its name %s (or --revision)", source, commit, name)
    else:
        raise FileNotFoundError(f"{source} does not exist; expected a folder, an official .ckpt file or a hub id")
    if checkpoint.dropped:
        logger.info("%s: not used: %s", checkpoint.source, ", ".join(checkpoint.dropped))
    if answers is not None:
        checkpoint = replace(checkpoint, labels={**checkpoint.labels, "vqa": _read_names(Path(answers))})
    return checkpoint if tokenizer is None else _with_tokenizer(checkpoint, Path(tokenizer))


def write_checkpoint(checkpoint: Checkpoint, folder: Path, *, shard_bytes: float = SHARD_BYTES) -> None:
    """Writes a folder of this package; the config comes last, so that a broken write is never read as whole."""
    require_empty(folder)
    write_weights(folder, checkpoint.tensors, shard_bytes=shard_bytes)
    write_description(checkpoint, folder)


def write_description(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes all of a checkpoint but the weights, such as beside those of a state of a run."""
    if checkpoint.extra_tensors:
        write_safetensors(folder / "carried.safetensors", checkpoint.extra_tensors)
    if checkpoint.processor is not None:
        checkpoint.processor.save(folder)
    if checkpoint.labels:
        write_json(folder / LABELS, checkpoint.labels)
    write_card(checkpoint, folder)
    _write_config(checkpoint, folder)


def update_weights(checkpoint: Checkpoint, folder: Path, *, shard_bytes: float = SHARD_BYTES) -> None:
    """Replaces the weights in a folder that `write_checkpoint` wrote of the same model, atomically, then the config."""
    write_weights(folder, checkpoint.tensors, shard_bytes=shard_bytes)
    _write_config(checkpoint, folder)


def _write_config(checkpoint: Checkpoint, folder: Path) -> None:
    values = _FORMAT | {"model": checkpoint.config.to_dict()}
    if checkpoint.reranking != UNMEASURED:
        values["reranking"] = checkpoint.reranking.to_plain()
    write_json(folder / "config.json", values)


def write_reranking(source: str | Path, reranking: Reranking | None) -> None:
    """Replaces what a folder of this package, or a run, records of reranking; None only checks that it can."""
    path = _checkpoint_folder(Path(source), str(source)) / "config.json"
    values = read_json(path)
    if values.get("format") != _FORMAT["format"]:
        raise ValueError(
            f"{source} is no folder of bridgetower, and what is found for reranking is stored in one; write one "
            "with `bridgetower convert --to bridgetower`"
        )
    if reranking is not None:
        write_json(path, values | {"reranking": reranking.to_plain()})


def convert(
    checkpoint: Checkpoint, folder: Path, to: Format, *, drop_itc: bool = False, shard_bytes: float = SHARD_BYTES
) -> None:
    """Writes a checkpoint as a folder of this package or of transformers, which appears as a whole or not at all.

    Args:
        checkpoint: What to write.
        folder: New or empty.
        to: `bridgetower` or `hf`; settings that transformers has no field for are lost with a warning.
        drop_itc: Leave the contrastive head out; transformers cannot hold the official kind.
        shard_bytes: Above this, weights are written in several files.

    Raises:
        FileExistsError: The folder holds something else.
        ValueError: transformers cannot hold the model, or there is no contrastive head to drop.
    """
    if drop_itc:
        checkpoint = checkpoint.without_itc()
        logger.info("%s: the contrastive head is left out", checkpoint.source)
    if to == "bridgetower":
        with new_folder(folder) as temporary:
            write_checkpoint(checkpoint, temporary, shard_bytes=shard_bytes)
        return
    values, tensors = huggingface.export(checkpoint)
    with new_folder(folder) as temporary:
        write_weights(temporary, tensors, for_transformers=True, shard_bytes=shard_bytes)
        if checkpoint.processor is not None:
            checkpoint.processor.save_huggingface(temporary)
        write_json(temporary / "config.json", values)


def _checkpoint_folder(folder: Path, name: str) -> Path:
    """Returns the folder itself, or of a training run `best/`, or `last/` where validation data was trained on."""
    places = folder / "best", folder, folder / "last"
    found = next((place for place in places if (place / "config.json").exists()), folder)
    if not (found / "config.json").exists():
        raise FileNotFoundError(f"{name} has no config.json; expected a folder of bridgetower or of transformers")
    return found


def _read_folder(
    folder: Path, name: str, overrides: Mapping[str, Any], dtype: torch.dtype | None, extensions: Extensions
) -> Checkpoint:
    folder = _checkpoint_folder(folder, name)
    values = read_json(folder / "config.json")
    if overrides:
        raise ValueError(f"overrides {sorted(overrides)} are for official .ckpt files; {name} has a config of its own")
    if values.get("format") == _FORMAT["format"]:
        return _read_bridgetower(folder, name, values, dtype, extensions)
    if values.get("model_type") != "bridgetower":
        raise ValueError(
            f"{name} is of model type {values.get('model_type')!r}; expected 'bridgetower' (a tower alone is where a "
            "model can start from: bridgetower train --vision or --text)"
        )
    checkpoint = huggingface.read_checkpoint(name, values, read_weights(folder, name), dtype)
    processor = _huggingface_processor(folder, checkpoint.config)
    return replace(checkpoint, processor=processor)


def _read_bridgetower(
    folder: Path, name: str, values: Mapping[str, Any], dtype: torch.dtype | None, extensions: Extensions
) -> Checkpoint:
    if values.get("version") != _FORMAT["version"]:
        raise ValueError(
            f"{name} is of format version {values.get('version')}; this release reads {_FORMAT['version']}"
        )
    if "model" not in values:
        raise ValueError(f"{name}/config.json has no model; copy the whole folder again")
    config = ModelConfig.from_dict(values["model"])
    tensors = state_weights(folder) if (folder / ABOUT).exists() else read_weights(folder, name)
    check_tensors(name, config, tensors, extensions)
    extra_tensors, labels = folder / "carried.safetensors", folder / LABELS
    return Checkpoint(
        source=name,
        config=config,
        extensions=extensions,
        tensors=finite(name, {parameter: tensor.to(dtype) for parameter, tensor in tensors.items()}),
        extra_tensors=dict(read_safetensors(extra_tensors)) if extra_tensors.exists() else {},
        processor=Processor.load(folder) if (folder / "processor.json").exists() else None,
        labels={head: _names(labels, names) for head, names in read_json(labels).items()} if labels.exists() else {},
        reranking=from_plain(Reranking, values.get("reranking", {}), f"{name}: reranking"),
    )


def _huggingface_processor(folder: Path, config: ModelConfig) -> Processor | None:
    if not (folder / "preprocessor_config.json").exists() and not (folder / "processor_config.json").exists():
        return None
    return Processor.from_huggingface(folder, patch_size=config.vision.patch_size)


def _read_official(path: Path, overrides: Mapping[str, Any], dtype: torch.dtype | None) -> Checkpoint:
    if path.suffix == ".safetensors" or path.name in WEIGHTS:
        raise ValueError(f"{path} holds weights without their config; pass its folder, {path.parent}")
    content = read_torch_archive(path)
    settings, state_dict = content.get("hyper_parameters"), content.get("state_dict")
    config = settings.get("config") if isinstance(settings, dict) else None
    if not isinstance(config, dict) or not isinstance(state_dict, dict):
        raise ValueError(f"{path} has no state_dict with hyper_parameters.config; expected an official .ckpt")
    official = microsoft.Settings.read(str(path), config)
    tensors = only_tensors(str(path), state_dict)
    checkpoint = microsoft.read_checkpoint(str(path), official, tensors, overrides, dtype)
    return replace(checkpoint, processor=_official_processor(official, checkpoint.config))


def _official_processor(official: microsoft.Settings, config: ModelConfig) -> Processor:
    """The official evaluation transform: `clip` crops, `blip` and `albef` squash; the tokenizer is only named."""
    squashes = any("blip" in key or "albef" in key for key in official.val_transform_keys)
    return Processor(
        ProcessorConfig(
            profile="official-finetune" if squashes else "official-pretrain",
            image_size=config.vision.image_size,
            max_length=official.max_text_len,
        ),
        tokenizer=None,
    )


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        return _names(path, parse_json(read_bytes(path), path))
    except ValueError as error:
        raise ValueError(f"{path} is no list of answers ({error}); expected a JSON list of texts") from error


def _names(path: Path, names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} holds names that are no list of texts; copy it again")
    return tuple(names)


def _with_tokenizer(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    if checkpoint.processor is None:
        raise ValueError(f"{checkpoint.source} has no image preprocessing to go with a tokenizer")
    return replace(checkpoint, processor=Processor(checkpoint.processor.config, load_tokenizer(path)))
