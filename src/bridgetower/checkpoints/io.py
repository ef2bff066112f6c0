"""Checkpoints on disk and on the hub: recognise, read, write, convert."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal, Unpack

import torch

from bridgetower.arguments import checked
from bridgetower.checkpoints import huggingface, microsoft
from bridgetower.checkpoints.checkpoint import Checkpoint, check_tensors, finite
from bridgetower.checkpoints.hub import HubOptions, Source, locate
from bridgetower.checkpoints.reranking import UNMEASURED, Reranking
from bridgetower.checkpoints.tensors import (
    ABOUT,
    SHARD_BYTES,
    WEIGHTS,
    only_tensors,
    read_safetensors,
    read_torch_archive,
    read_weights,
    state_weights,
    write_safetensors,
    write_weights,
)
from bridgetower.files import (
    new_folder,
    parse_json,
    read_bytes,
    read_json,
    require_empty,
    write_json,
    write_text,
)
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import ModelConfig
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.model.heads import chosen_heads
from bridgetower.plain import from_plain
from bridgetower.processor import Processor, load_tokenizer

Format = Literal["bridgetower", "hf"]

LABELS, CARD = "labels.json", "README.md"
_LOADING = {
    "bridgetower": 'import bridgetower\n\nmodel = bridgetower.load("{}")',
    "transformers": 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{}")',
}

_FORMAT = {"format": "bridgetower", "version": 1}

logger = logging.getLogger(__name__)


@checked
def read_checkpoint(
    source: Source,
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
            (`owner/name`, `owner/name@revision`, `owner/name/FILE.ckpt`, or its address at huggingface.co).
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
    given = {
        name: value for name, value in {"revision": revision, **hub}.items() if value is not None
    }
    if given and Path(source).exists():
        named = ", ".join(f"{name} {value!r}" for name, value in given.items() if name != "token")
        raise ValueError(
            f"{named or 'token'} is for hub ids, but {source} is a local path; leave it out"
        )
    place, name = locate(str(source), "a folder, an official .ckpt file", revision, **hub)
    if place.is_dir():
        checkpoint = _read_folder(place, name, overrides or {}, dtype, extensions)
    elif place.suffix == ".safetensors" or place.name in WEIGHTS:
        raise ValueError(
            f"{place} holds weights without their config; pass its folder, {place.parent}"
        )
    else:
        content = read_torch_archive(place)
        settings, state_dict = content.get("hyper_parameters"), content.get("state_dict")
        config = settings.get("config") if isinstance(settings, dict) else None
        if not isinstance(config, dict) or not isinstance(state_dict, dict):
            raise ValueError(
                f"{place} has no state_dict with hyper_parameters.config; expected an official .ckpt"
            )
        tensors = only_tensors(str(place), state_dict)
        checkpoint = replace(
            microsoft.read_checkpoint(str(place), config, tensors, overrides or {}, dtype),
            source=name,
        )
    if checkpoint.dropped:
        logger.info("%s: not used: %s", checkpoint.source, ", ".join(checkpoint.dropped))
    if answers is not None:
        try:
            names = _names(answers, parse_json(read_bytes(Path(answers)), answers))
        except ValueError as error:
            raise ValueError(
                f"{answers} is no list of answers ({error}); expected a JSON list of texts"
            ) from error
        checkpoint = replace(checkpoint, labels={**checkpoint.labels, "vqa": names})
    if tokenizer is not None:
        if checkpoint.processor is None:
            raise ValueError(
                f"{checkpoint.source} has no image preprocessing to go with a tokenizer"
            )
        processor = Processor(checkpoint.processor.config, load_tokenizer(Path(tokenizer)))
        checkpoint = replace(checkpoint, processor=processor)
    return checkpoint


def write_checkpoint(
    checkpoint: Checkpoint, folder: Path, *, shard_bytes: float = SHARD_BYTES
) -> None:
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


def update_weights(
    checkpoint: Checkpoint, folder: Path, *, shard_bytes: float = SHARD_BYTES
) -> None:
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
    checkpoint: Checkpoint,
    folder: Path,
    to: Format,
    *,
    drop_itc: bool = False,
    shard_bytes: float = SHARD_BYTES,
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
    values, tensors = ({}, {}) if to == "bridgetower" else huggingface.export(checkpoint)
    with new_folder(folder) as temporary:
        if to == "bridgetower":
            write_checkpoint(checkpoint, temporary, shard_bytes=shard_bytes)
            return
        if checkpoint.processor is not None:
            # refuses settings before weights are written
            checkpoint.processor.save_huggingface(temporary)
        write_weights(temporary, tensors, for_transformers=True, shard_bytes=shard_bytes)
        write_card(checkpoint, temporary, library="transformers")
        write_json(temporary / "config.json", values)


def _checkpoint_folder(folder: Path, name: str) -> Path:
    """Returns the folder itself, or of a training run `best/`, or `last/` where validation data was trained on."""
    for place in (folder / "best", folder, folder / "last"):
        if (place / "config.json").exists():
            return place
    if (folder / "run.json").exists():
        run, state = (
            read_json(folder / "run.json"),
            max((folder / "states").glob("step-*"), default=None),
        )
        step = state and int(state.name[5:])
        lengths = {"steps": run.get("max_steps"), "epochs": run.get("max_epochs")}
        end = " or ".join(f"{number} {unit}" for unit, number in lengths.items() if number)
        advice = f"go on with --resume --out {name}" + (
            f", or give the state {state}" if state else ""
        )
        raise FileNotFoundError(
            f"{name} is an unfinished run, at step {step or 0} of {end}: {advice}"
        )
    if folder.exists() and [path.name for path in folder.iterdir()] == [".lock"]:
        raise FileNotFoundError(f"{name} is a run that ended before it had a model; start it again")
    raise FileNotFoundError(
        f"{name} has no config.json; expected a folder of bridgetower or of transformers"
    )


def _read_folder(
    folder: Path,
    name: str,
    overrides: Mapping[str, Any],
    dtype: torch.dtype | None,
    extensions: Extensions,
) -> Checkpoint:
    folder = _checkpoint_folder(folder, name)
    values = read_json(folder / "config.json")
    if overrides:
        raise ValueError(
            f"overrides {sorted(overrides)} are for official .ckpt files; {name} has a config of its own"
        )
    if values.get("format") != _FORMAT["format"]:
        if values.get("model_type") != "bridgetower":
            raise ValueError(
                f"{name} is of model type {values.get('model_type')!r}; expected 'bridgetower' (a tower alone is where "
                "a model can start from: bridgetower train --vision or --text)"
            )
        checkpoint = huggingface.read_checkpoint(name, values, read_weights(folder, name), dtype)
        if not any(
            (folder / file).exists()
            for file in ("preprocessor_config.json", "processor_config.json")
        ):
            return checkpoint
        patch_size = checkpoint.config.vision.patch_size
        return replace(
            checkpoint, processor=Processor.from_huggingface(folder, patch_size=patch_size)
        )
    if values.get("version") != _FORMAT["version"]:
        raise ValueError(
            f"{name} is of format version {values.get('version')}; this release reads {_FORMAT['version']}"
        )
    model: Any = values.get("model")
    config = from_plain(ModelConfig, model, f"{name}/config.json: model")
    tensors = state_weights(folder) if (folder / ABOUT).exists() else read_weights(folder, name)
    check_tensors(name, config, tensors, extensions)
    extra_tensors, labels = folder / "carried.safetensors", folder / LABELS
    return Checkpoint(
        source=name,
        config=config,
        extensions=extensions,
        tensors=finite(
            name, {parameter: tensor.to(dtype) for parameter, tensor in tensors.items()}
        ),
        extra_tensors=dict(read_safetensors(extra_tensors)) if extra_tensors.exists() else {},
        processor=Processor.load(folder) if (folder / "processor.json").exists() else None,
        labels={head: _names(labels, names) for head, names in read_json(labels).items()}
        if labels.exists()
        else {},
        reranking=from_plain(Reranking, values.get("reranking", {}), f"{name}: reranking"),
    )


def _names(path: str | Path, names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} holds names that are no list of texts; copy it again")
    return tuple(names)


def checkpoint_of(model: BridgeTower) -> Checkpoint:
    """Returns the weights of a model with what came along when it was read."""
    origin = model.origin
    if not isinstance(origin, Checkpoint):
        origin = Checkpoint(
            source="random weights", config=model.config, tensors={}, extensions=model.extensions
        )
    return replace(origin, config=model.config, tensors=model.state_dict())


@checked
def save(model: BridgeTower, folder: str | Path) -> None:
    """Writes a model as a folder for `load`, with all that its checkpoint had besides the weights.

    A new model has no preprocessing: write that of a `Processor` beside it, with `processor.save(folder)`.

    Args:
        model: With the weights to write.
        folder: New or empty; it appears as a whole or not at all.

    Raises:
        FileExistsError: The folder holds something else.
    """
    convert(checkpoint_of(model), Path(folder), "bridgetower")


@checked
def push_to_hub(
    model: BridgeTower,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,  # noqa: A002 - as model cards call it
    datasets: Sequence[str] = (),
    metrics: Mapping[str, float] = MappingProxyType({}),
    command: str | None = None,
) -> str:
    """Uploads what `save` writes, with a model card, and returns the URL of the commit.

    Args:
        model: With the weights to upload.
        repo_id: Such as `owner/name`; it is made if it is not there.
        private: Whether it is made so; None is the owner's default.
        token: Of the hub; None is the one of `hf auth login`.
        license: Of the weights, such as `mit`.
        datasets: Ids on the hub of what it was trained on.
        metrics: Measured values by name.
        command: That trained it.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        checkpoint = checkpoint_of(model)
        convert(checkpoint, folder, "bridgetower")
        write_card(
            checkpoint,
            folder,
            repo_id,
            license=license,
            datasets=datasets,
            metrics=metrics,
            command=command,
        )
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Upload {repo_id}"
        )
    return commit.commit_url


def write_card(
    checkpoint: Checkpoint,
    folder: Path,
    name: str | None = None,
    *,
    license: str | None = None,  # noqa: A002 - as model cards call it
    datasets: Sequence[str] = (),
    data: Sequence[str] = (),
    metrics: Mapping[str, float] = MappingProxyType({}),
    command: str | None = None,
    library: Literal["bridgetower", "transformers"] = "bridgetower",
) -> None:
    """Writes the model card of a folder: `name` and `datasets` are ids on the hub, `data` was trained on elsewhere."""
    from huggingface_hub import ModelCardData

    config, source = checkpoint.config, checkpoint.source
    tags = ["bridgetower", "vision-language", "arxiv:2206.08657"]
    values = ModelCardData(
        license=license, library_name=library, datasets=list(datasets) or None, tags=tags
    )
    millions = sum(tensor.numel() for tensor in checkpoint.tensors.values()) / 1e6
    vision, text = config.vision, config.text
    parts = [
        f"---\n{values.to_yaml()}\n---\n\n# {name or 'BridgeTower'}\n",
        f"[BridgeTower](https://arxiv.org/abs/2206.08657) with {millions:.1f} million parameters: "
        f"{vision.num_layers} layers of the image tower ({vision.architecture}, {vision.image_size} pixels), "
        f"{text.num_layers} of the text tower ({text.architecture}) and {config.fusion.num_layers} of the fusion "
        f"encoder. Heads: {', '.join(chosen_heads(config.heads)) or 'none'}. "
        f"Made from `{Path(source).name if Path(source).exists() else source}`.\n",
        f"```python\n{_LOADING[library].format(name or 'FOLDER')}\n```\n",
    ]
    if datasets or data:
        parts.append(f"Training data: {', '.join(f'`{each}`' for each in (*datasets, *data))}.\n")
    if command:
        parts.append(f"Trained by:\n\n```bash\n{command}\n```\n")
    if metrics:
        parts.append("| metric | value |\n|---|---|")
    parts += [f"| {metric} | {value:.4g} |" for metric, value in metrics.items()]
    write_text(folder / CARD, "\n".join(parts).rstrip() + "\n")
