"""The hub: what its ids look like, and how a repository's files get here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

from bridgetower.checkpoints.tensors import WEIGHTS

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # the last are vocabularies of SentencePiece
_PICKLED = [WEIGHTS[2], "pytorch_model-*.bin"]

logger = logging.getLogger(__name__)


class HubOptions(TypedDict, total=False):
    """Options of `huggingface_hub.snapshot_download`, and the folder inside of the repository."""

    token: str | bool | None
    subfolder: str | None
    cache_dir: str | Path | None
    local_files_only: bool


def parse_hub_id(source: str) -> tuple[str, str | None, str | None] | None:
    """Returns repository, file and revision of `owner/name` or `owner/name/FILE.ckpt`; None of a path."""
    name, _, revision = source.partition("@")
    parts, is_file = name.split("/", 2), name.endswith(".ckpt")
    if source.startswith((".", "~")) or not all(parts) or len(parts) != 2 + is_file:
        return None
    return "/".join(parts[:2]), parts[2] if is_file else None, revision or None


def is_downloaded(source: str) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, _, revision = parse_hub_id(source) or (source, None, None)
    try:
        snapshot_download(repo, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    return True


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{repo} is no local path and could not be fetched from the hub ({type(error).__name__}); check the name, "
            "the network, and your access (hf auth login, or HF_TOKEN), or pass a local folder"
        ) from error


def download(repo: str, revision: str | None = None, **hub: Unpack[HubOptions]) -> tuple[Path, str]:
    """Fetches a repository's small files and one kind of weights; returns the folder and the commit."""
    from huggingface_hub import snapshot_download

    inside, options = hub.pop("subfolder", None), dict[str, Any](hub)

    def fetch(patterns: list[str]) -> Path:
        wanted = [f"{inside}/{pattern}" for pattern in patterns] if inside else patterns
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, **options))

    with _explained(repo):
        root = fetch(_FILES)
        folder = root / (inside or "")
        if (folder / "config.json").exists() and not any((folder / name).exists() for name in WEIGHTS[:2]):
            fetch([*_FILES, *_PICKLED])
    return folder, root.name


def fetch(source: str, revision: str | None = None, **hub: Unpack[HubOptions]) -> tuple[Path, str]:
    """Fetches a model, or the named or only `.ckpt` of a repository; returns its place and its name with the commit."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    repo, file, named = parse_hub_id(source) or (source, None, None)
    if named and revision is not None:
        raise ValueError(f"{source} names a revision, and revision is {revision!r}; leave one of them out")
    wanted = named or revision
    if file is None:
        folder, commit = download(repo, wanted, **hub)
        if any((folder / name).exists() for name in ("config.json", "best/config.json")):
            return folder, _pinned(source, wanted, f"{repo}@{commit}")
    inside, options = hub.pop("subfolder", None), dict[str, Any](hub)
    start = f"{inside}/" if inside else ""
    if file is not None:
        file = start + file
    else:
        with _explained(repo):
            try:
                if options.get("local_files_only"):
                    raise OfflineModeIsEnabled
                names = HfApi(token=options.get("token")).list_repo_files(repo, revision=wanted)
            except OfflineModeIsEnabled:
                root = Path(snapshot_download(repo, revision=wanted, **options | {"local_files_only": True}))
                names = [path.relative_to(root).as_posix() for path in root.rglob("*.ckpt")]
        found = sorted(name for name in names if name.endswith(".ckpt") and name.startswith(start))
        if not found:
            raise FileNotFoundError(f"{repo} has neither a config.json nor a .ckpt; expected a repository of a model")
        if len(found) > 1:
            raise ValueError(f"{repo} has several checkpoints: {', '.join(found)}; name one, as in {repo}/{found[0]}")
        file = found[0]
    with _explained(repo):
        path = Path(hf_hub_download(repo, file, revision=wanted, **options))
    return path, _pinned(source, wanted, f"{repo}/{file}@{path.parents[file.count('/')].name}")


def _pinned(source: str, revision: str | None, name: str) -> str:
    commit = name.rpartition("@")[2]
    if commit != revision:
        logger.warning("%s is at commit %s; pin it by its name %s (or --revision)", source, commit, name)
    return name
