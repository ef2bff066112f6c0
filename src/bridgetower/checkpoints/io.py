"""Reads, writes and converts checkpoints on disk and on the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Unpack

import torch

from bridgetower.arguments import checked
from bridgetower.checkpoints.checkpoint import Checkpoint, check_finite, check_tensors
from bridgetower.checkpoints.hub import HubOptions, Source, locate
from bridgetower.checkpoints.huggingface import export, read_hf_checkpoint
from bridgetower.checkpoints.microsoft import read_official
from bridgetower.checkpoints.reranking import UNMEASURED, Reranking
from bridgetower.checkpoints.tensors import (
    SHARD_BYTES,
    STATE_JSON,
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

LABELS = "labels.json"
CARD = "README.md"
_EXTRA_TENSORS = "carried.safetensors"  # tensors that no computation reads
_LOADING = {
    "bridgetower": 'import bridgetower\n\nmodel = bridgetower.load("{}")',
    "transformers": 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{}")',
}

_FORMAT = {"format": "bridgetower", "version": 1}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedSource:
    """A folder or file to read a checkpoint from, and how to read it."""

    path: Path
    name: str
    # The content of the folder's config.json, or of the official file.
    values: Mapping[str, Any]
    overrides: Mapping[str, Any]
    dtype: torch.dtype | None
    extensions: Extensions


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
    """Reads a checkpoint of any published kind, recognised by its content.

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
        FileNotFoundError: There is no such source.
        ValueError: The source is damaged, of no known kind, or its files do not fit together.
    """
    # Find the source.
    all_options = {"revision": revision, **hub}
    hub_options = {name: value for name, value in all_options.items() if value is not None}
    if hub_options and Path(source).exists():
        options = [f"{name} {value!r}" for name, value in hub_options.items() if name != "token"]
        raise ValueError(
            f"{', '.join(options) or 'token'} is for hub ids, but {source} is a local path; leave it out"
        )
    path, name = locate(str(source), "a folder, an official .ckpt file", revision, **hub)

    # Read the config of a folder, or the whole of an official file.
    if path.is_dir():
        path = _checkpoint_folder(path, name)
        values = read_json(path / "config.json")
        if overrides:
            raise ValueError(
                f"overrides {sorted(overrides)} are for official .ckpt files; {name} has a config of its own"
            )
    elif path.suffix == ".safetensors" or path.name in WEIGHTS:
        raise ValueError(
            f"{path} holds weights without their config; pass its folder, {path.parent}"
        )
    else:
        values = read_torch_archive(path)

    # The first family that recognises the source reads it.
    opened = OpenedSource(path, name, values, overrides or {}, dtype, extensions)
    family = next(family for family in FAMILIES.values() if family.recognises(opened))
    checkpoint = family.read(opened)
    if checkpoint.dropped:
        logger.info("%s: not used: %s", checkpoint.source, ", ".join(checkpoint.dropped))

    # Add what an official file lacks.
    if answers is not None:
        try:
            content = parse_json(read_bytes(Path(answers)), answers)
            names = _label_names(answers, content)
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


def _checkpoint_folder(folder: Path, name: str) -> Path:
    """Returns `best/` of a training run if it has one, else the folder itself, else `last/` of the run."""
    for candidate in (folder / "best", folder, folder / "last"):
        if (candidate / "config.json").exists():
            return candidate

    # Say how a run goes on that has no model yet.
    if (folder / "run.json").exists():
        run = read_json(folder / "run.json")
        lengths = {"steps": run.get("max_steps"), "epochs": run.get("max_epochs")}
        end = " or ".join(f"{number} {unit}" for unit, number in lengths.items() if number)
        step = 0
        advice = f"go on with --resume --out {name}"
        state = max((folder / "states").glob("step-*"), default=None)
        if state:
            step = int(state.name.removeprefix("step-"))
            advice += f", or give the state {state}"
        raise FileNotFoundError(f"{name} is an unfinished run, at step {step} of {end}: {advice}")
    if folder.exists() and [path.name for path in folder.iterdir()] == [".lock"]:
        raise FileNotFoundError(f"{name} is a run that ended before it had a model; start it again")
    raise FileNotFoundError(
        f"{name} has no config.json; expected a folder of bridgetower or of transformers"
    )


def read_folder(opened: OpenedSource) -> Checkpoint:
    """Reads a folder of this package, or a state of a run."""
    # Check that this release can read the format.
    folder = opened.path
    name = opened.name
    values = opened.values
    if values.get("version") != _FORMAT["version"]:
        raise ValueError(
            f"{name} is of format version {values.get('version')}; this release reads {_FORMAT['version']}"
        )

    # Read config and weights.
    model: Any = values.get("model")
    config = from_plain(ModelConfig, model, f"{name}/config.json: model")
    is_state = (folder / STATE_JSON).exists()
    tensors = state_weights(folder) if is_state else read_weights(folder, name)
    check_tensors(name, config, tensors, opened.extensions)
    converted = {parameter: tensor.to(opened.dtype) for parameter, tensor in tensors.items()}
    check_finite(name, converted)

    # Read the files that a folder may lack.
    optional: dict[str, Any] = {}
    if (folder / _EXTRA_TENSORS).exists():
        optional["extra_tensors"] = dict(read_safetensors(folder / _EXTRA_TENSORS))
    if (folder / "processor.json").exists():
        optional["processor"] = Processor.load(folder)
    path = folder / LABELS
    if path.exists():
        labels = read_json(path)
        optional["labels"] = {head: _label_names(path, names) for head, names in labels.items()}
    return Checkpoint(
        source=name,
        config=config,
        extensions=opened.extensions,
        tensors=converted,
        reranking=from_plain(Reranking, values.get("reranking", {}), f"{name}: reranking"),
        **optional,
    )


def read_hf_folder(opened: OpenedSource) -> Checkpoint:
    """Reads a folder of transformers."""
    model_type = opened.values.get("model_type")
    if model_type != "bridgetower":
        raise ValueError(
            f"{opened.name} is of model type {model_type!r}; expected 'bridgetower' (to start from a "
            "tower alone, use bridgetower train --vision or --text)"
        )
    folder = opened.path
    weights = read_weights(folder, opened.name)
    checkpoint = read_hf_checkpoint(opened.name, opened.values, weights, opened.dtype)
    files = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / file).exists() for file in files):
        return checkpoint
    patch_size = checkpoint.config.vision.patch_size
    processor = Processor.from_huggingface(folder, patch_size=patch_size)
    return replace(checkpoint, processor=processor)


def read_official_file(opened: OpenedSource) -> Checkpoint:
    """Reads an official `.ckpt` file."""
    path = opened.path
    settings = opened.values.get("hyper_parameters")
    config = settings.get("config") if isinstance(settings, dict) else None
    state_dict = opened.values.get("state_dict")
    if not isinstance(config, dict) or not isinstance(state_dict, dict):
        raise ValueError(
            f"{path} has no state_dict with hyper_parameters.config; expected an official .ckpt"
        )
    tensors = only_tensors(str(path), state_dict)
    checkpoint = read_official(str(path), config, tensors, opened.overrides, opened.dtype)
    return replace(checkpoint, source=opened.name)


class Family(NamedTuple):
    """A family of checkpoints. The first one in `FAMILIES` that recognises a source reads it."""

    recognises: Callable[[OpenedSource], bool]
    read: Callable[[OpenedSource], Checkpoint]


FAMILIES = {
    "bridgetower": Family(lambda source: source.values.get("format") == "bridgetower", read_folder),
    "transformers": Family(lambda source: source.path.is_dir(), read_hf_folder),
    "official": Family(lambda source: True, read_official_file),
}


def _label_names(path: str | Path, names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} holds names that are no list of texts; copy it again")
    return tuple(names)


def write_checkpoint(
    checkpoint: Checkpoint, folder: Path, *, shard_bytes: float = SHARD_BYTES
) -> None:
    """Writes a folder of this package, with the config last, so that a broken write is never read as whole."""
    require_empty(folder)
    write_weights(folder, checkpoint.tensors, shard_bytes=shard_bytes)
    write_description(checkpoint, folder)


def write_description(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes all of a checkpoint but its weights. The state of a run has its weights in files of its own."""
    if checkpoint.extra_tensors:
        write_safetensors(folder / _EXTRA_TENSORS, checkpoint.extra_tensors)
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
    """Replaces the record of reranking in a folder of this package or a run.

    With None it writes nothing, and only checks that the folder can hold a record.
    """
    path = _checkpoint_folder(Path(source), str(source)) / "config.json"
    values = read_json(path)
    if values.get("format") != _FORMAT["format"]:
        raise ValueError(
            f"{source} is not a folder of bridgetower, and cannot hold settings of reranking; convert it with "
            "`bridgetower convert --to bridgetower`"
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
        drop_itc: Leave the contrastive head out; transformers has no field for the one of official checkpoints.
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
    values, tensors = export(checkpoint)
    with new_folder(folder) as temporary:
        # Save the processor first: it may refuse its settings, and weights take long to write.
        if checkpoint.processor is not None:
            checkpoint.processor.save_huggingface(temporary)
        write_weights(temporary, tensors, for_transformers=True, shard_bytes=shard_bytes)
        write_card(checkpoint, temporary, library="transformers")
        write_json(temporary / "config.json", values)


def checkpoint_of(model: BridgeTower) -> Checkpoint:
    """Returns the checkpoint that a model was built from, with its present config and weights."""
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
    # The name is that of model cards.
    license: str | None = None,  # noqa: A002
    datasets: Sequence[str] = (),
    data: Sequence[str] = (),
    metrics: Mapping[str, float] = MappingProxyType({}),
    command: str | None = None,
    library: Literal["bridgetower", "transformers"] = "bridgetower",
) -> None:
    """Writes the model card of a folder: `name` and `datasets` are ids on the hub, `data` names other training data."""
    from huggingface_hub import ModelCardData

    # Describe the model.
    config = checkpoint.config
    vision = config.vision
    text = config.text
    tags = ["bridgetower", "vision-language", "arxiv:2206.08657"]
    values = ModelCardData(
        license=license, library_name=library, datasets=list(datasets) or None, tags=tags
    )
    millions = sum(tensor.numel() for tensor in checkpoint.tensors.values()) / 1e6
    source = checkpoint.source
    if Path(source).exists():
        source = Path(source).name
    paragraphs = [
        f"---\n{values.to_yaml()}\n---\n\n# {name or 'BridgeTower'}\n",
        f"[BridgeTower](https://arxiv.org/abs/2206.08657) with {millions:.1f} million parameters: "
        f"{vision.num_layers} layers of the image tower ({vision.architecture}, {vision.image_size} pixels), "
        f"{text.num_layers} of the text tower ({text.architecture}) and {config.fusion.num_layers} of the fusion "
        f"encoder. Heads: {', '.join(chosen_heads(config.heads)) or 'none'}. Made from `{source}`.\n",
        f"```python\n{_LOADING[library].format(name or 'FOLDER')}\n```\n",
    ]

    # Describe its training.
    sets = [f"`{dataset}`" for dataset in (*datasets, *data)]
    if sets:
        paragraphs.append(f"Training data: {', '.join(sets)}.\n")
    if command:
        paragraphs.append(f"Trained by:\n\n```bash\n{command}\n```\n")
    if metrics:
        paragraphs.append("| metric | value |\n|---|---|")
    paragraphs += [f"| {metric} | {value:.4g} |" for metric, value in metrics.items()]
    write_text(folder / CARD, "\n".join(paragraphs).rstrip() + "\n")
