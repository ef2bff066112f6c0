"""Atomic, durable writes: a reader sees the old content or the new one, never a part."""

import errno
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Control characters but tab and line feed, and what reverses or hides text: marks of direction, breaks of lines.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)

_MARK = ".partial-"  # in the name of every temporary folder
_LARGEST_JSON = 2**28  # bytes; the largest vocabularies of tokenizers have a tenth
_LONGEST_MESSAGE = 4000  # characters
# Errors of a full disk, a quota, and a limit on the size of files.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# Folders in the cache, and the settings that put them elsewhere.
_CACHES = {"features": "feature_cache", "evaluations": "work"}
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_NAME = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
# In bytes, between two slashes: no file system has longer names.
_LONGEST_NAME = 1020


class NotWrittenError(OSError):
    """A file or folder could not be written, for lack of a right or, as far as is known, of room."""

    def __init__(self, path: Path, reason: str, number: int | None) -> None:
        advice = "make room on the disk"
        if number in _NO_RIGHT:
            advice = "choose a folder that you may write to"
            # Of the cache, name what decides where it is.
            cache = cache_folder().absolute()
            if path.absolute().is_relative_to(cache):
                folders = path.absolute().relative_to(cache).parts[:1]
                setting = _CACHES.get("".join(folders), "cache")
                advice += f" by {setting}=FOLDER or XDG_CACHE_HOME"
        elif number in _NO_NAME:
            advice = "choose another name"
        super().__init__(f"{short_name(path)} could not be written ({reason}); {advice}")
        self.path = path
        self.reason = reason
        self.errno = number

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason, self.errno)


@contextmanager
def writing(
    path: Path, failures: tuple[type[Exception], ...] = (), numbers: tuple[int, ...] = NO_ROOM
) -> Iterator[None]:
    """Names what could not be written, which the system's error does not, or names a temporary folder."""
    try:
        yield
    except NotWrittenError as error:
        raise NotWrittenError(path, error.reason, error.errno) from error
    except failures as error:
        raise NotWrittenError(path, str(error).partition("\n")[0], None) from error
    except OSError as error:
        if error.errno not in numbers:
            raise
        raise NotWrittenError(path, os.strerror(error.errno), error.errno) from error


@contextmanager
def replacing(path: Path, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yields a temporary path on the disk of `path`, which is synced and renamed to `path` on success.

    It lies in a temporary folder beside `path`, where libraries may have temporary files of their own. On any error, a
    full disk included, that folder is removed and `path` stays as it was. Only a killed process leaves it behind; see
    `remove_leftovers`.
    """
    path = _local(path)
    # Such as /dev/null and /dev/stdout.
    is_special = path.exists() and not path.is_file() and not path.is_dir()
    if is_special or (path.is_symlink() and path.readlink().is_relative_to("/proc")):
        raise FileExistsError(
            f"{path} is a device, a pipe or an open file; give the name of another file"
        )
    with _beside(path, failures) as temporary:
        # Some libraries make private files. The umask is read off a new file: asking for it would change it meanwhile.
        temporary.touch(mode=0o666)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        temporary.unlink()
        yield temporary
        _sync(temporary)
        temporary.chmod(mode)
        temporary.replace(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which is renamed to `path` on success and removed on any error."""
    # A folder is not renamed to a link.
    path = _local(path).resolve()
    require_empty(path)
    remove_leftovers(path.parent, path.name)
    if path.is_mount():
        raise FileExistsError(
            f"{path} is a mount point, which cannot be replaced; give the name of a folder in it"
        )
    with _beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        # Another process may have written it meanwhile.
        require_empty(path)
        temporary.replace(path)


def cache_folder() -> Path:
    """Returns the folder for what can be made again: in `XDG_CACHE_HOME`, or in `.cache` of the home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bridgetower"


def require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; choose another name or remove it first")


def check_path(path: str | os.PathLike[str]) -> None:
    """Raises a ValueError if no file can have a path."""
    name = os.fspath(path)
    if "\0" in name:
        raise ValueError(f"{short_name(repr(name))} has a zero character; give another path")
    try:
        longest = max((len(os.fsencode(segment)) for segment in Path(name).parts), default=0)
    except UnicodeEncodeError as error:
        raise ValueError(f"{short_name(repr(name))} is not UTF-8; give another path") from error
    if longest > _LONGEST_NAME:
        raise ValueError(
            f"{short_name(name)} has more than {_LONGEST_NAME} bytes between slashes; give another path"
        )


def _local(path: str | os.PathLike[str]) -> Path:
    """Returns a path that is to be written, unless it is a URL or none that a file can have."""
    check_path(path)
    if re.match(r"[a-z][a-z0-9+.-]+:(/|$)", os.fspath(path)):
        raise ValueError(f"{path} is a URL; give a path on this machine")
    return Path(path)


def short_name(path: object) -> str:
    """Returns a path as errors quote it: of one that is too long for a file, the beginning."""
    name = str(path)
    return name if len(name) <= _LONGEST_NAME else f"{name[:60]}…"


def sha256_of(path: Path) -> str:
    import hashlib  # takes 10 ms of the start of every command

    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def escaped(text: str) -> str:
    r"""Returns text that can be written as UTF-8: `\udcff` stands for a byte of a file name that is not."""
    return text.encode(errors="backslashreplace").decode()


def visible(text: str) -> str:
    r"""Returns text for a terminal or a log: `\u001b` stands for the escape character, likewise all that is unseen."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", escaped(text))


def one_line(text: str) -> str:
    r"""Returns what `visible` returns, in one line: `\n` stands for a line feed."""
    return visible(text).replace("\n", "\\n")


def shortened(message: str) -> str:
    """Cuts the middle out of a long message, as the advice is at its end."""
    half = _LONGEST_MESSAGE // 2
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:half]} … {message[-half:]}"


def unfit_name(name: str) -> str | None:
    """Returns what is wrong with the name of a file that cannot be stored, else None."""
    if not name:
        return "it has no name"
    if "\0" in name:
        return f"the name {name!r} has a zero character, which no file's name has"
    return None if escaped(name) == name else f"the name {name!r} is not UTF-8; rename the file"


def json_text(content: object, *, indent: int | None = None) -> str:
    """Returns JSON that can be written as UTF-8: a file name that is not comes back whole when it is read."""
    try:
        return visible(json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False))
    except ValueError as error:
        raise FloatingPointError(
            f"a result is NaN or infinite, which JSON cannot hold ({error})"
        ) from error


def write_json(path: Path, content: object) -> None:
    write_text(path, json_text(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    return json_object(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """Reads a file of settings or names, which is refused if it would fill the memory."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; check the path")
    size = path.stat().st_size
    if size > _LARGEST_JSON:
        raise ValueError(f"{path} has {size} bytes; expected at most {_LARGEST_JSON}")
    return path.read_bytes()


def json_object(text: str | bytes, origin: object) -> dict[str, Any]:
    content = parse_json(text, origin)
    if not isinstance(content, dict):
        raise ValueError(f"{origin} holds a {type(content).__name__}; expected a JSON object")
    return content


def parse_json(content: str | bytes, where: object, advice: str = "copy it again") -> Any:
    try:
        return json.loads(content)
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{where} is not valid JSON ({error}); {advice}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deep to be read; {advice}") from error


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dictionaries under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted name, old and new value of all in `now` that differ from `before`, which may lack some."""
    for name in now:
        if isinstance(now[name], dict) and isinstance(before.get(name), dict):
            yield from differences(before[name], now[name], f"{prefix}{name}.")
        elif now[name] != before.get(name):
            yield prefix + name, before.get(name), now[name]


def require_parent(path: Path) -> None:
    """Checks that the folder of a file that is to be written is there, before what is in it is computed."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{path} cannot be written: {path.parent} is no folder; make it, or choose another"
        )
    remove_leftovers(path.parent, path.name)


def require_space(folder: Path, needed: int, contents: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{contents} take {needed / 2**30:.1f} GiB, but the disk of {folder} has {free / 2**30:.1f} GiB left; make "
            "room or choose a folder elsewhere"
        )


def intended_name(path: Path) -> str:
    """Returns the name of a file, or the one that was to be written if it is a temporary folder of `replacing`."""
    name, mark, _ = path.name.partition(_MARK)
    return name.removeprefix(".") if mark and name.startswith(".") else path.name


def remove_folder(path: Path) -> None:
    """Removes a folder with its content. A process that is killed meanwhile leaves nothing at `path`."""
    with _beside(path) as temporary:
        path.replace(temporary)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what a process left in `folder` that was killed in `replacing`, `new_folder` or `remove_folder`."""
    for path in folder.glob(f".{'*' if name is None else escape(name)}{_MARK}*"):
        with ExitStack() as stack, suppress(OSError):
            if not path.is_dir():
                path.unlink()
                continue
            fcntl.flock(_opened(path, stack), fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds `folder` for this process. The operating system releases it when the process ends in any way."""
    if fcntl is None:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    folder = _local(folder)
    path = folder / ".lock"
    with ExitStack() as stack:
        # Repeat this if the folder is removed meanwhile.
        while True:
            if folder.is_symlink() and not folder.exists():
                raise FileNotFoundError(
                    f"{folder} is a link to {folder.readlink()}, which is not there; make that folder"
                )
            with writing(folder, numbers=_NO_RIGHT + _NO_NAME):
                folder.mkdir(parents=True, exist_ok=True)
            with writing(folder, numbers=_NO_RIGHT), suppress(FileNotFoundError):
                file = stack.enter_context(path.open("a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in _NO_LOCKS:
                        reason = f"{folder} cannot be locked ({os.strerror(error.errno)}): its file system has no flock"
                        advice = (
                            "mount it with locks (Lustre: -o flock), or choose a folder elsewhere"
                        )
                        raise OSError(error.errno, f"{reason}; {advice}") from error
                    if error.errno != errno.EWOULDBLOCK:
                        raise
                    if not wait:
                        busy = f"another process works in {folder}; wait for it or stop it first"
                        raise FileExistsError(busy) from error
                    logger.info("another process works in %s; waiting for it", folder)
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        # Processes that were forked meanwhile have the lock too.
        stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
        yield


@contextmanager
def _beside(path: Path, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yields the path of that name in a temporary folder beside `path`, to be renamed to `path` in the end."""
    with writing(path, failures):
        with writing(path, numbers=_NO_RIGHT + _NO_NAME):
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}", dir=path.parent))
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            with suppress(OSError, AttributeError):  # a disk or a system without locks
                fcntl.flock(_opened(folder, stack), fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder / path.name
            _sync(path.parent)


def _sync(path: Path) -> None:
    # Windows cannot open a folder.
    if os.name == "nt" and path.is_dir():
        return
    with ExitStack() as stack:
        os.fsync(_opened(path, stack))


def _opened(path: Path, stack: ExitStack) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    return descriptor
