"""The hub: what its ids look like, and how a repository's files get here."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

from bridgetower.arguments import Expected
from bridgetower.checkpoints.tensors import WEIGHTS
from bridgetower.files import short_name

# the last are vocabularies of SentencePiece
_FILES = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
]
_PICKLED = [WEIGHTS[2], "pytorch_model-*.bin"]
_WEB_ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)/?"
    r"(?:(?:tree|blob|resolve)/(?P<revision>[^/?#]+)/?(?P<file>[^?#]*\.ckpt)?)?(?:[?#].*)?"
)

Source = Annotated[
    str | Path,
    Expected("a hub id, a folder or an official .ckpt file", lambda source: source != ""),
]

logger = logging.getLogger(__name__)


class HubOptions(TypedDict, total=False):
    """Options of `huggingface_hub.snapshot_download`, and the folder inside of the repository."""

    token: str | bool | None
    subfolder: str | None
    cache_dir: str | Path | None
    local_files_only: bool


def parse_hub_id(source: str) -> tuple[str, str | None, str | None] | None:
    """Returns repository, file and revision of `owner/name`, `owner/name/FILE.ckpt` or an address; None of a path."""
    if address := _WEB_ADDRESS.fullmatch(source):
        return address["repo"], address["file"], address["revision"]
    name, _, revision = source.partition("@")
    parts, is_file = name.split("/", 2), name.endswith(".ckpt")
    if source.startswith((".", "~")) or not all(parts) or len(parts) != 2 + is_file:
        return None
    return "/".join(parts[:2]), parts[2] if is_file else None, revision or None


def is_downloaded(source: str) -> bool:
    repo, _, revision = parse_hub_id(source) or (source, None, None)
    try:
        _download(repo, revision, local_files_only=True)
    except FileNotFoundError:
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


def _download(
    repo: str, revision: str | None = None, subfolder: str | None = None, **options: Any
) -> Path:
    """Fetches a repository's small files and one kind of weights; returns its snapshot, whose name is the commit."""
    from huggingface_hub import snapshot_download

    inside = f"{subfolder}/" if subfolder else ""

    def fetch(patterns: list[str]) -> Path:
        wanted = [inside + pattern for pattern in patterns]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, **options))

    with _explained(repo):
        root = fetch(_FILES)
        folder = root / inside
        if (folder / "config.json").exists() and not any(
            (folder / name).exists() for name in WEIGHTS[:2]
        ):
            fetch([*_FILES, *_PICKLED])
    return root


def locate(
    source: str, expected: str, revision: str | None = None, **hub: Unpack[HubOptions]
) -> tuple[Path, str]:
    """Returns where a local path, or a model of the hub, or its named or only `.ckpt` is; its name has the commit."""
    if os.path.exists(source):  # noqa: PTH110 - of a name that is too long, pathlib raises OSError
        return Path(source), source
    if (found := parse_hub_id(source)) is None:
        raise FileNotFoundError(
            f"{short_name(source)} does not exist; expected {expected} or a hub id"
        )
    from huggingface_hub import HfApi, constants, hf_hub_download

    repo, file, named = found
    if named and revision is not None:
        raise ValueError(
            f"{source} names a revision, and revision is {revision!r}; leave one of them out"
        )
    revision, inside, options = named or revision, hub.pop("subfolder", None), dict[str, Any](hub)
    start = f"{inside}/" if inside else ""
    if file is None:
        root = _download(repo, revision, inside, **options)
        if any((root / start / name).exists() for name in ("config.json", "best/config.json")):
            return root / start, _pinned(source, revision, f"{repo}@{root.name}")
        if options.get("local_files_only") or constants.HF_HUB_OFFLINE:
            names = [path.relative_to(root).as_posix() for path in root.rglob("*.ckpt")]
        else:
            with _explained(repo):
                names = HfApi(token=options.get("token")).list_repo_files(repo, revision=revision)
        ckpts = sorted(name for name in names if name.endswith(".ckpt") and name.startswith(start))
        if not ckpts:
            raise FileNotFoundError(
                f"{repo} has neither a config.json nor a .ckpt; expected a repository of a model"
            )
        if len(ckpts) > 1:
            raise ValueError(
                f"{repo} has several checkpoints: {', '.join(ckpts)}; name one, as in {repo}/{ckpts[0]}"
            )
        file = ckpts[0].removeprefix(start)
    with _explained(repo):
        path = Path(hf_hub_download(repo, start + file, revision=revision, **options))
    commit = path.parents[(start + file).count("/")].name
    return path, _pinned(source, revision, f"{repo}/{start}{file}@{commit}")


def _pinned(source: str, revision: str | None, name: str) -> str:
    commit = name.rpartition("@")[2]
    if commit != revision:
        logger.warning("%s is at commit %s; pin it by its name %s", source, commit, name)
    return name
