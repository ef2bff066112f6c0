"""Ids of the Hugging Face hub, and downloads of models from it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict, Unpack

from bridgetower.arguments import Expected
from bridgetower.checkpoints.tensors import PICKLED, SAFETENSORS
from bridgetower.files import short_name

# Files named *.model are vocabularies of SentencePiece.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_PICKLED = [PICKLED[0], "pytorch_model-*.bin"]
# Such as https://huggingface.co/owner/name/blob/main/FILE.ckpt?download=true.
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


class HubId(NamedTuple):
    """A repository of the hub, a file in it, and a branch, tag or commit."""

    repo: str
    file: str | None
    revision: str | None


def parse_hub_id(source: str) -> HubId | None:
    """Reads a hub id, `owner/name[@revision]` or `owner/name/FILE.ckpt[@revision]`, or a web address of the hub.

    None means that the source is a path.
    """
    if address := _WEB_ADDRESS.fullmatch(source):
        return HubId(**address.groupdict())
    name, _, revision = source.partition("@")
    owner, _, model = name.partition("/")
    file = None
    if name.endswith(".ckpt"):
        model, _, file = model.partition("/")
    if source.startswith((".", "~")) or not (owner and model) or "/" in model or file == "":
        return None
    return HubId(f"{owner}/{model}", file, revision or None)


def is_downloaded(source: str) -> bool:
    """Whether the cache of the hub has the folder of a hub id."""
    hub_id = parse_hub_id(source)
    if hub_id is None:
        return False
    try:
        _download(hub_id.repo, hub_id.revision, local_files_only=True)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turns errors of the hub into FileNotFoundError with advice."""
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
    """Downloads a repository's small files and one kind of weights, and returns the folder of the commit."""
    from huggingface_hub import snapshot_download

    start = f"{subfolder}/" if subfolder else ""

    def fetch(patterns: list[str]) -> Path:
        paths = [start + pattern for pattern in patterns]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=paths, **options))

    with _hub_errors(repo):
        root = fetch(_FILES)
        folder = root / start
        has_weights = any((folder / name).exists() for name in SAFETENSORS)
        if (folder / "config.json").exists() and not has_weights:
            fetch([*_FILES, *_PICKLED])
    return root


def locate(
    source: str, expected: str, revision: str | None = None, **hub: Unpack[HubOptions]
) -> tuple[Path, str]:
    """Returns a local path as it is, else downloads a model's folder or `.ckpt` from the hub.

    Args:
        source: A path or a hub id.
        expected: For the error, what else the source may be.
        revision: Branch, tag or commit of a hub id.
        **hub: See `HubOptions`.

    Returns:
        The path, and the source's name: the path itself, or a hub id with its commit.
    """
    # pathlib raises OSError of a name that is too long.
    if os.path.exists(source):  # noqa: PTH110
        return Path(source), source
    hub_id = parse_hub_id(source)
    if hub_id is None:
        raise FileNotFoundError(
            f"{short_name(source)} does not exist; expected {expected} or a hub id"
        )
    repo, file, id_revision = hub_id
    if id_revision and revision is not None:
        raise ValueError(
            f"{source} names a revision, and revision is {revision!r}; leave one of them out"
        )
    revision = id_revision or revision
    subfolder = hub.pop("subfolder", None)
    options = dict[str, Any](hub)
    start = f"{subfolder}/" if subfolder else ""

    # A repository without a named file has a config, perhaps in the folder of a run, or one .ckpt.
    if file is None:
        root = _download(repo, revision, subfolder, **options)
        folder = root / start
        if any((folder / name).exists() for name in ("config.json", "best/config.json")):
            name = f"{repo}@{root.name}"
            _warn_if_unpinned(source, revision, name)
            return folder, name
        file = _only_ckpt(repo, root, start, revision, options)

    from huggingface_hub import hf_hub_download

    with _hub_errors(repo):
        path = Path(hf_hub_download(repo, start + file, revision=revision, **options))
    # The path ends with the commit and the file: snapshots/COMMIT/folder/FILE.ckpt.
    commit = path.parents[(start + file).count("/")].name
    name = f"{repo}/{start}{file}@{commit}"
    _warn_if_unpinned(source, revision, name)
    return path, name


def _only_ckpt(
    repo: str, root: Path, start: str, revision: str | None, options: Mapping[str, Any]
) -> str:
    """Returns the name, after `start`, of the only `.ckpt` file of a repository."""
    from huggingface_hub import HfApi, constants

    if options.get("local_files_only") or constants.HF_HUB_OFFLINE:
        names = [path.relative_to(root).as_posix() for path in root.rglob("*.ckpt")]
    else:
        with _hub_errors(repo):
            names = HfApi(token=options.get("token")).list_repo_files(repo, revision=revision)
    files = sorted(name for name in names if name.endswith(".ckpt") and name.startswith(start))
    if not files:
        raise FileNotFoundError(
            f"{repo} has neither a config.json nor a .ckpt; expected a repository of a model"
        )
    if len(files) > 1:
        raise ValueError(
            f"{repo} has several checkpoints: {', '.join(files)}; name one, as in {repo}/{files[0]}"
        )
    return files[0].removeprefix(start)


def _warn_if_unpinned(source: str, revision: str | None, name: str) -> None:
    """Warns if the user has not named the commit with which `name` ends."""
    *_, commit = name.rpartition("@")
    if commit != revision:
        logger.warning("%s is at commit %s; pin it by its name %s", source, commit, name)
