"""Atomic, durable writes: a reader sees the old content or the new one, never a part."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MARK = ".partial-"  # in the name of every temporary folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path on the disk of `path`; on success it is synced and renamed to `path`.

    It lies in a temporary folder beside `path`, where libraries may have temporary files of their own. On any error, a
    full disk included, that folder is removed and `path` stays as it was. Only a killed process leaves it behind; see
    `remove_leftovers`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}", dir=path.parent))
    temporary = folder / path.name
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it is renamed to `path`, on any error it is removed.

    Raises:
        FileExistsError: There is something at `path` that is not an empty folder.
    """
    path = Path(path)
    require_empty(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """Returns the folder for what can be made again: in `XDG_CACHE_HOME`, or in `.cache` of the home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bridgetower"


def require_empty(folder: Path) -> None:
    """Checks that nothing would be overwritten.

    Raises:
        FileExistsError: There is something at `folder` that is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; choose another name or remove it first")


def sha256_of(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Writes `content` to `path` atomically, as UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: object) -> None:
    """Writes `content` to `path` atomically, as indented JSON."""
    write_text(path, to_json(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a JSON object there")
    content = parse_json(path.read_bytes(), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def to_json(value: object, *, indent: int | None = None) -> str:
    """Returns a value as JSON.

    Raises:
        FloatingPointError: A number in it is NaN or infinite, which JSON does not have.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise FloatingPointError(f"a result is NaN or infinite, which JSON cannot hold ({error})") from error


def parse_json(content: str | bytes, where: object) -> Any:
    """Returns what stands in JSON.

    Raises:
        ValueError: It is no JSON, or nested too deep to be read; `where` says where.
    """
    try:
        return json.loads(content)
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{where} is not valid JSON ({error}); copy it again") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deep to be read; copy it again") from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of the values of `now` that differ from those of `before`, which may lack some."""
    for name in now:
        if isinstance(now[name], dict) and isinstance(before.get(name), dict):
            yield from differences(before[name], now[name], f"{prefix}{name}.")
        elif now[name] != before.get(name):
            yield prefix + name


def require_space(folder: Path, needed: int, what: str) -> None:
    """Makes sure that a folder's disk has room, before anything is written to it.

    Args:
        folder: An existing one.
        needed: Bytes.
        what: Takes them; named in the error.

    Raises:
        OSError: There is less.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{what} take {needed / 2**30:.1f} GiB, but the disk of {folder} has {free / 2**30:.1f} GiB left; make "
            "room or choose another folder"
        )


def intended_name(path: Path) -> str:
    """Returns the name of a file, or the one that was to be written if it is a temporary folder of `replacing`."""
    name, mark, _ = path.name.partition(_MARK)
    return name.removeprefix(".") if mark and name.startswith(".") else path.name


def remove_leftovers(folder: Path) -> None:
    """Removes what a process which was killed in `replacing` or `new_folder` left in `folder`."""
    for path in folder.glob(f".*{_MARK}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds `folder` for this process; the operating system lets go when the process ends, however it ends.

    Args:
        folder: Made if it is not there.
        wait: Until another process lets go of it.

    Raises:
        FileExistsError: Another process holds it, and `wait` is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:  # a lock that is there is not written to
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise FileExistsError(f"another process works in {folder}; wait for it or stop it first") from error
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
