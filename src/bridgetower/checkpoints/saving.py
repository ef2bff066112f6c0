"""A model to a folder or to the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Unpack

from bridgetower.checkpoints.card import CardFacts, write_card
from bridgetower.checkpoints.checkpoint import Checkpoint
from bridgetower.checkpoints.io import convert
from bridgetower.model.bridgetower import BridgeTower


def checkpoint_of(model: BridgeTower) -> Checkpoint:
    """Returns the weights of a model with what came along when it was read."""
    about: Checkpoint = model.origin or Checkpoint(
        source="random weights", config=model.config, tensors={}, extensions=model.extensions
    )
    return replace(about, config=model.config, tensors=model.state_dict())


def save(model: BridgeTower, folder: Path) -> None:
    """Writes a folder of this package, which appears as a whole or not at all."""
    convert(checkpoint_of(model), folder, "bridgetower")


def push(
    model: BridgeTower, repo_id: str, *, private: bool | None, token: str | None, **facts: Unpack[CardFacts]
) -> str:
    """Uploads what `save` writes to a repository of the hub, and returns the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        save(model, folder)
        write_card(checkpoint_of(model), folder, repo_id, **facts)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Upload {repo_id}")
    return commit.commit_url
