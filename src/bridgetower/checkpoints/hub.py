"""The hub: what its ids look like, and how a repository's files get here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

from bridgetower.checkpoints.tensors import WEIGHTS

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # the last are vocabularies of SentencePiece
_PICKLED = [WEIGHTS[2], "pytorch_model-*.bin"]


class HubOptions(TypedDict, total=False):
    """Options of `huggingface_hub.snapshot_download`, and the folder inside of the repository."""

    token: str | bool | None
    subfolder: str | None
    cache_dir: str | Path | None
    local_files_only: bool


def parse_hub_id(source: str) -> tuple[str, str | None, str | None] | None:
    """Returns the repository, the file and the revision of `owner/name`, `owner/name/FILE.ckpt`, each with `@revision`.

    None is for what looks like a path. Whether something local has that name is for the caller to look at first.
    """
    name, _, revision = source.partition("@")
    parts, is_file = name.split("/", 2), name.endswith(".ckpt")
    if source.startswith((".", "~")) or not all(parts) or len(parts) != 2 + is_file:
        return None
    return "/".join(parts[:2]), parts[2] if is_file else None, revision or None


def is_downloaded(source: str) -> bool:
    """Whether a repository's files are on this machine; `source` is a hub id, perhaps with `@revision`."""
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


def download_ckpt(
    repo: str, revision: str | None = None, file: str | None = None, **hub: Unpack[HubOptions]
) -> tuple[Path, str, str]:
    """Fetches a `.ckpt` file, or the only one; returns its path, its name in the repository, and the commit."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    inside, options = hub.pop("subfolder", None), dict[str, Any](hub)
    if file is None:
        with _explained(repo):
            try:
                if options.get("local_files_only"):
                    raise OfflineModeIsEnabled
                names = HfApi(token=options.get("token")).list_repo_files(repo, revision=revision)
            except OfflineModeIsEnabled:
                root = Path(snapshot_download(repo, revision=revision, **options | {"local_files_only": True}))
                names = [path.relative_to(root).as_posix() for path in root.rglob("*.ckpt")]
        found = sorted(
            name for name in names if name.endswith(".ckpt") and name.startswith(f"{inside}/" if inside else "")
        )
        if not found:
            raise FileNotFoundError(f"{repo} has neither a config.json nor a .ckpt; expected a repository of a model")
        if len(found) > 1:
            raise ValueError(f"{repo} has several checkpoints: {', '.join(found)}; name one, as in {repo}/{found[0]}")
        file = found[0]
    elif inside:
        file = f"{inside}/{file}"
    with _explained(repo):
        path = Path(hf_hub_download(repo, file, revision=revision, **options))
    return path, file, path.parents[file.count("/")].name
