"""Files on this machine and at URLs, opened and listed in one way, with retries, deadlines and errors."""

from __future__ import annotations

import io
import logging
import math
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile

from bridgetower.files import check_path, unfit_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds that a request may take.
DEADLINE = float(os.environ.get("BRIDGETOWER_FETCH_TIMEOUT", "60"))
# Bytes of a file that is read whole: an image, or a file of a server that gives no ranges.
LARGEST = 2**29
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Limits how long a URL is tried. A file that goes on to arrive may take any time.

    Attributes:
        pauses: Seconds before each further request, of which half to all is waited, at random.
        connecting: Seconds that finding and reaching a host may take.
        silence: Seconds without a byte.
        trying: Seconds from the first request on, after which no further one is made.
    """

    pauses: tuple[float, ...]
    connecting: float
    silence: float
    trying: float


PATIENT = Patience(
    pauses=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0), connecting=DEADLINE, silence=DEADLINE, trying=math.inf
)
"""For jobs: one host that is busy for half a minute is no reason to lose what a job has done."""
BRIEF = Patience(
    pauses=(0.25, 1.0), connecting=min(4.0, DEADLINE), silence=min(15.0, DEADLINE), trying=4.0
)
"""For somebody who waits for the answer."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:(//|:)", re.IGNORECASE)
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BUFFER = 2**22  # bytes of a request
# Answers from 400 to 499 after which another request may succeed.
_PASSING_STATUSES = (408, 425, 429)


@dataclass(frozen=True)
class ListedFile:
    """A file of a source, or a folder that cannot be listed.

    Attributes:
        location: Path or URL.
        name: Path from the folder of the source on, with `/` between folders.
        version: Changes when the file does, as far as a listing tells.
        problem: Why it cannot be read; empty if it can.
    """

    location: str
    name: str
    version: str = ""
    problem: str = ""


def is_url(location: object) -> bool:
    return _SCHEME.match(str(location)) is not None


def suffix_of(location: str) -> str:
    """Returns the ending of a path or URL in lower case, or both endings of a compressed file, such as .csv.gz."""
    name = location.partition("?")[0] if is_url(location) else location
    endings = [ending.lower() for ending in Path(name).suffixes]
    num_endings = 1
    if endings and endings[-1] in COMPRESSION_SUFFIXES:
        num_endings = 2
    return "".join(endings[-num_endings:])


def read_location(
    location: str,
    piece: tuple[int, int] | None = None,
    *,
    most: int = LARGEST,
    patience: Patience = PATIENT,
) -> bytes:
    """Returns a file, or a piece of it.

    Args:
        location: Path or URL.
        piece: First byte and number of bytes.
        most: Bytes that may be read.
        patience: How long a URL is tried.

    Raises:
        OSError: The file cannot be read.
        ValueError: It has more bytes than may be read, or fewer than the piece.
    """
    if piece and piece[1] > most:
        raise ValueError(f"{location} has a part of {piece[1]} bytes; expected at most {most}")
    if is_url(location):
        if piece:
            return _read_range(location, *piece, patience=patience)
        return _read_url(location, most, patience)
    with open_regular(location) as file:
        size = os.fstat(file.fileno()).st_size
        if piece is None and size > most:
            raise ValueError(f"{location} has {size} bytes; expected at most {most}")
        start, length = piece or (0, size)
        content = os.pread(file.fileno(), length, start)
    if len(content) < length:
        raise ValueError(f"{location} ends in the middle of what is read of it; copy it again")
    return content


def read_part_of_set(folder: object, name: str, advice: str) -> tuple[str, bytes]:
    """Returns the location and the content of a file of a prepared set. Where it is missing, the error has advice."""
    location = f"{str(folder).rstrip('/')}/{name}"
    try:
        return location, read_location(location, most=2**28)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no {name} in {folder}; give {advice}") from error


def open_location(location: str) -> BinaryIO:
    """Opens a file to be read in any order. Of a file at a URL, ranges are read."""
    if not is_url(location):
        return open_regular(location)
    info = _info_of_url(location)
    size = info.get("size")
    if size is None or info.get("partial") is False:
        return io.BytesIO(_read_url(location, LARGEST))
    return _RangeFile(location, size)


def open_regular(location: str | Path) -> BinaryIO:
    """Opens a regular file, without waiting for the writer of a pipe."""
    check_path(location)
    file = os.fdopen(os.open(location, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{location} is no regular file")
    return file


def version_of(location: str) -> str:
    """Returns a text that changes when a file does: size and time, or the marks of its server."""
    if is_url(location):
        return _version_in(_info_of_url(location))
    return _version_of_status(Path(location).stat())


def _version_of_status(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def list_files(source: str) -> Iterator[ListedFile]:
    """Yields the files of a source, in the order of their names and without hidden ones.

    Args:
        source: A file, a folder with folders below it, or the URL of one, perhaps with a `*` or with {000..099}.

    Raises:
        FileNotFoundError: There is no such source.
    """
    if numbers := _NUMBERS.search(source):
        first, last = numbers.groups()
        for number in range(int(first), int(last) + 1):
            digits = f"{number:0{len(first)}}"
            yield from list_files(source[: numbers.start()] + digits + source[numbers.end() :])
    elif is_url(source):
        yield from _list_url(source)
    elif Path(source).is_dir():
        yield from _list_folder(source, "", [])
    else:
        yield ListedFile(source, Path(source).name, version_of(source))


def _list_url(source: str) -> Iterator[ListedFile]:
    path_of_url = source.partition("?")[0]
    folder = source
    if "*" in source:
        infos = retried(source, lambda system, path: system.glob(path, detail=True))
        if not infos:
            raise FileNotFoundError(f"nothing matches {source}")
        folder = source.partition("*")[0].rpartition("/")[0]
    elif source.lower().startswith("http") and Path(path_of_url).suffix:
        # A file over HTTP, which lists none.
        yield ListedFile(source, path_of_url.rpartition("/")[2])
        return
    else:
        infos = retried(source, lambda system, path: system.find(path, detail=True))
    system, root = _system_of(folder)
    for path, info in sorted(infos.items()):
        is_root = path.rstrip("/") == root.rstrip("/")
        name = path.rpartition("/")[2] if is_root else os.path.relpath(path, root)
        levels = name.split("/")
        is_hidden = any(level.startswith(".") and level != ".." for level in levels)
        if info.get("type") != "directory" and not is_hidden:
            location = path if is_url(path) else system.unstrip_protocol(path)
            yield ListedFile(location, name, _version_in(info))


def _list_folder(
    folder: str, prefix: str, parents: Sequence[tuple[int, int]]
) -> Iterator[ListedFile]:
    try:
        status = Path(folder).stat()
        identity = (status.st_dev, status.st_ino)
        # A link may lead to a folder around it.
        if identity in parents:
            return
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        name = prefix.rstrip("/") or "."
        yield ListedFile(folder, name, problem=f"{error.strerror or error}")
        return
    for entry in sorted(visible, key=lambda entry: entry.name):
        name = prefix + entry.name
        try:
            if entry.is_dir():
                yield from _list_folder(entry.path, f"{name}/", [*parents, identity])
                continue
            status = entry.stat()
            is_regular = stat.S_ISREG(status.st_mode)
            problem = unfit_name(name) if is_regular else "it is no regular file"
            yield ListedFile(entry.path, name, _version_of_status(status), problem or "")
        except OSError as error:
            yield ListedFile(entry.path, name, problem=f"{error.strerror or error}")


class _RangeFile(AbstractBufferedFile):  # type: ignore[misc]
    """A file at a URL of which ranges are read. Where its server gives none after all, the whole is kept."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__(*_system_of(url), block_size=_BUFFER, size=size)
        self._url = url
        self._content = b""

    def _fetch_range(self, start: int, end: int) -> bytes:
        if not self._content:
            content = _read_range(self._url, start, end - start, file_size=self.size)
            if len(content) <= end - start:
                return content
            self._content = content
        return self._content[start:end]


def _read_url(url: str, most: int, patience: Patience = PATIENT) -> bytes:
    # Over HTTP in one request; the length, which a request of its own would tell, is not needed.
    streaming = {"block_size": 0, "size": 1} if url.lower().startswith("http") else {}

    def read(system: Any, path: str) -> bytes:
        with system.open(path, "rb", **streaming) as file:
            content = bytearray()
            while len(content) <= most and (received := file.read(_BUFFER)):
                content += received
        return bytes(content)

    content = retried(url, read, patience)
    if len(content) > most:
        raise ValueError(f"{url} has more than {most} bytes")
    return content


def _read_range(
    url: str, start: int, size: int, *, file_size: int = 0, patience: Patience = PATIENT
) -> bytes:
    """Returns a range of a file, or the file, if it has the given size and its server gives no ranges."""

    def read(system: Any, path: str) -> bytes:
        content = bytes(system.cat_file(path, start=start, end=start + size, **_timeout(system)))
        if len(content) < size:
            raise ConnectionError(f"{len(content)} bytes came where {size} were asked for")
        return content

    content = retried(url, read, patience)
    if len(content) not in (size, file_size):
        raise ValueError(
            f"{url} gives {len(content)} bytes where {size} were asked for; copy it to a disk"
        )
    return content


def retried(url: str, read: Callable[[Any, str], T], patience: Patience = PATIENT) -> T:
    """Reads from the store of a URL, again after errors that may pass.

    Args:
        url: Location, which errors name.
        read: Function of a file system of fsspec and a path in it.
        patience: How long it is tried.

    Raises:
        OSError: The URL cannot be read.
        ValueError: `read` refuses its input.
    """
    pauses = iter(patience.pauses)
    end = time.monotonic() + patience.trying
    while True:
        try:
            return read(*_system_of(url, patience))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no file at {url}") from error
        except ImportError as error:
            raise FileNotFoundError(
                f"{url} cannot be read: {error}; install that package"
            ) from error
        except ValueError:
            raise
        except Exception as error:
            status = getattr(error, "status", None)
            is_refused = isinstance(status, int) and 300 <= status < 500
            is_final = is_refused and status not in _PASSING_STATUSES
            is_denied = isinstance(error, PermissionError)
            is_over = is_final or is_denied or time.monotonic() > end
            pause = None if is_over else next(pauses, None)
            reason = (str(error) or type(error).__name__).partition("\n")[0][:300]
            if pause is None:
                raise OSError(f"{url} cannot be read ({reason})") from error
            pause *= random.uniform(0.5, 1.0)
            logger.warning("%s cannot be read (%s); trying again in %.1f s", url, reason, pause)
            time.sleep(pause)


def _system_of(url: str, patience: Patience = PATIENT) -> tuple[Any, str]:
    """Returns the file system of fsspec for a URL, and the path in it."""
    options: dict[str, Any] = {}
    if url.lower().startswith("http"):
        import aiohttp

        limits = aiohttp.ClientTimeout(
            total=None, connect=patience.connecting, sock_read=patience.silence
        )
        options = {"client_kwargs": {"timeout": limits}}
    system, path = url_to_fs(url, **options)
    return system, path


def _timeout(system: Any) -> dict[str, float]:
    return {"timeout": DEADLINE} if getattr(system, "async_impl", False) else {}


def _info_of_url(url: str) -> dict[str, Any]:
    return retried(url, lambda system, path: system.info(path, **_timeout(system)))


def _version_in(info: dict[str, Any]) -> str:
    """Returns the size and the marks of a version that a server tells, in the order of their names."""
    values = {name.lower(): value for name, value in info.items()}
    marks = [info.get("size")]
    for name in ("etag", "last-modified", "mtime", "sha256"):
        if name in values:
            marks.append(values[name])
    return " ".join(map(str, marks))
