"""The hub: what its ids look like, and how a repository's files get here."""

from __future__ import annotations

from pathlib import Path

from bridgetower.checkpoints.tensors import WEIGHTS

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # the last are vocabularies of SentencePiece


def looks_like_hub_id(source: str) -> bool:
    """Tells `owner/name` or `owner/name@revision` from a path.

    Whether something local has that name is for the caller to look at first.
    """
    owner, _, name = source.partition("@")[0].partition("/")
    looks_like_path = source.startswith((".", "~")) or source.endswith(".ckpt")
    return bool(owner and name) and "/" not in name and not looks_like_path


def is_downloaded(source: str) -> bool:
    """Whether a repository's files are on this machine; `source` is a hub id, perhaps with `@revision`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, _, revision = source.partition("@")
    try:
        snapshot_download(repo, revision=revision or None, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    return True


def download(repo: str, revision: str | None = None) -> tuple[Path, str]:
    """Fetches a repository's small files and one kind of weights; returns the folder and its commit.

    Raises:
        FileNotFoundError: There is no such repository or revision, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES))
        if not any((folder / name).exists() for name in WEIGHTS[:2]):
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*_FILES, WEIGHTS[2]]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{repo} is no local path and could not be fetched from the hub ({type(error).__name__}); "
            "check the name, or the network, or pass a local folder"
        ) from error
    return folder, folder.name
