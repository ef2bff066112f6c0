"""Files at URLs and on this machine, opened and listed in one way: retries, deadlines and errors are here."""

from __future__ import annotations

import io
import logging
import math
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile

from bridgetower.files import check_path, unfit_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEADLINE = float(
    os.environ.get("BRIDGETOWER_FETCH_TIMEOUT", "60")
)  # seconds that one request may take
LARGEST = (
    2**29
)  # bytes of a file that is read whole: an image, or a file of a server that gives no ranges


COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Limits how long a URL is tried; what goes on to arrive may take any time.

    Attributes:
        pauses: Most seconds before each further request; each is drawn between half of that and that.
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
_BUFFER = 2**22  # bytes that are asked for at once
_PASSING = (408, 425, 429)  # answers from 400 to 499 that may be others when they are asked again


@dataclass(frozen=True)
class ListedFile:
    """A file of a source, or a folder that cannot be listed."""

    location: str  # path or URL
    name: str  # from the folder of the source on, with `/` between its parts
    version: str = ""  # what changes when the file does, as far as a listing tells
    problem: str = ""  # why it cannot be read


def is_url(location: object) -> bool:
    return _SCHEME.match(str(location)) is not None


def suffix_of(location: str) -> str:
    """Returns the ending of a path or URL in lower case; of a compressed file both, such as .csv.gz."""
    name = location.partition("?")[0] if is_url(location) else location
    endings = [ending.lower() for ending in Path(name).suffixes]
    is_compressed = endings[-1:] and endings[-1] in COMPRESSION_SUFFIXES
    return "".join(endings[-2:] if is_compressed else endings[-1:])


def read_location(
    location: str,
    piece: tuple[int, int] | None = None,
    *,
    most: int = LARGEST,
    patience: Patience = PATIENT,
) -> bytes:
    """Returns a file, or the piece of it that starts at a byte and has a length."""
    if piece and piece[1] > most:
        raise ValueError(f"{location} has a part of {piece[1]} bytes; expected at most {most}")
    if is_url(location):
        return (
            _piece(location, *piece, patience=patience)
            if piece
            else _whole(location, most, patience)
        )
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
    """Returns the location and the content of a file of a prepared set; advice says what to give if there is none."""
    location = f"{str(folder).rstrip('/')}/{name}"
    try:
        return location, read_location(location, most=2**28)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no {name} in {folder}; give {advice}") from error


def open_location(location: str) -> BinaryIO:
    """Opens a file to be read in any order; of one at a URL pieces are asked for, each again after an error."""
    if not is_url(location):
        return open_regular(location)
    size, partial = (_info(location).get(name) for name in ("size", "partial"))
    return (
        io.BytesIO(_whole(location, LARGEST))
        if size is None or partial is False
        else _Ranges(location, size)
    )


def open_regular(location: str | Path) -> BinaryIO:
    """Opens a regular file, without waiting for the writer of a pipe."""
    check_path(location)
    file = os.fdopen(os.open(location, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{location} is no regular file")
    return file


def version_of(location: str) -> str:
    """Returns what changes when a file is written again: size and time, or what its server tells."""
    if not is_url(location):
        status = Path(location).stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    return _version(_info(location))


def list_files(source: str) -> Iterator[ListedFile]:
    """Yields all files of a folder and those below it in order of their names, hidden ones left out."""
    if numbers := _NUMBERS.search(source):
        first, last = numbers.groups()
        for number in range(int(first), int(last) + 1):
            yield from list_files(
                f"{source[: numbers.start()]}{number:0{len(first)}}{source[numbers.end() :]}"
            )
        return
    if not is_url(source):
        if Path(source).is_dir():
            yield from _listed_below(source, "", [])
        else:
            yield ListedFile(source, Path(source).name, version_of(source))
        return
    fixed = source
    if "*" in source:
        found = retried(source, lambda system, path: system.glob(path, detail=True))
        if not found:
            raise FileNotFoundError(f"nothing matches {source}")
        fixed = source.partition("*")[0].rpartition("/")[0]
    elif Path(source.partition("?")[0]).suffix and source.lower().startswith(
        "http"
    ):  # no listing over HTTP
        yield ListedFile(source, source.partition("?")[0].rpartition("/")[2])
        return
    else:
        found = retried(source, lambda system, path: system.find(path, detail=True))
    system, start = _system(fixed)
    for path in sorted(found):
        name = (
            os.path.relpath(path, start)
            if path.rstrip("/") != start.rstrip("/")
            else path.rpartition("/")[2]
        )
        is_hidden = any(part.startswith(".") and part != ".." for part in name.split("/"))
        if found[path].get("type") != "directory" and not is_hidden:
            yield ListedFile(
                path if is_url(path) else system.unstrip_protocol(path), name, _version(found[path])
            )


def _listed_below(folder: str, prefix: str, parents: list[tuple[int, int]]) -> Iterator[ListedFile]:
    try:
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in parents:  # a link to a folder around it
            return
        parents = [*parents, (status.st_dev, status.st_ino)]
        with os.scandir(folder) as found:
            entries = sorted(
                (entry for entry in found if not entry.name.startswith(".")),
                key=lambda one: one.name,
            )
    except OSError as error:
        yield ListedFile(folder, prefix.rstrip("/") or ".", problem=f"{error.strerror or error}")
        return
    for entry in entries:
        name = prefix + entry.name
        try:
            if entry.is_dir():
                yield from _listed_below(entry.path, f"{name}/", parents)
                continue
            kind = entry.stat()
            problem = unfit_name(name) if stat.S_ISREG(kind.st_mode) else "it is no regular file"
            yield ListedFile(entry.path, name, f"{kind.st_size} {kind.st_mtime_ns}", problem or "")
        except OSError as error:
            yield ListedFile(entry.path, name, problem=f"{error.strerror or error}")


class _Ranges(AbstractBufferedFile):  # type: ignore[misc]
    """A file at a URL, of which ranges are read; where its server gives none after all, the whole is kept."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__(*_system(url), block_size=_BUFFER, size=size)
        self._url, self._content = url, b""

    def _fetch_range(self, start: int, end: int) -> bytes:
        if not self._content:
            part = _piece(self._url, start, end - start, whole=self.size)
            if len(part) <= end - start:
                return part
            self._content = part
        return self._content[start:end]


def _whole(url: str, most: int, patience: Patience = PATIENT) -> bytes:
    # Over HTTP in one request; the length, which a request of its own would tell, is not needed.
    streaming = {"block_size": 0, "size": 1} if url.lower().startswith("http") else {}

    def read(system: Any, path: str) -> bytes:
        with system.open(path, "rb", **streaming) as file:
            content = bytearray()
            while len(content) <= most and (part := file.read(_BUFFER)):
                content += part
        return bytes(content)

    content = retried(url, read, patience)
    if len(content) > most:
        raise ValueError(f"{url} has more than {most} bytes")
    return content


def _piece(
    url: str, start: int, size: int, *, whole: int = 0, patience: Patience = PATIENT
) -> bytes:
    """Returns a range of a file; all of it, of the size `whole`, where its server gives no ranges."""

    def read(system: Any, path: str) -> bytes:
        content = bytes(system.cat_file(path, start=start, end=start + size, **_deadline(system)))
        if len(content) < size:
            raise ConnectionError(f"{len(content)} bytes came where {size} were asked for")
        return content

    content = retried(url, read, patience)
    if len(content) > size and len(content) != whole:
        raise ValueError(
            f"{url} gives {len(content)} bytes where {size} were asked for; copy it to a disk"
        )
    return content


def retried(url: str, read: Callable[[Any, str], T], patience: Patience = PATIENT) -> T:
    """Reads from the store of a URL, again after errors that may pass; in the end an OSError names the URL."""
    pauses, end = iter(patience.pauses), time.monotonic() + patience.trying
    while True:
        try:
            return read(*_system(url, patience))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no file at {url}") from error
        except ImportError as error:
            raise FileNotFoundError(
                f"{url} cannot be read: {error}; install that package"
            ) from error
        except ValueError:  # what the caller gave is wrong
            raise
        except Exception as error:
            status = getattr(error, "status", None)
            is_final = isinstance(status, int) and 300 <= status < 500 and status not in _PASSING
            is_over = is_final or isinstance(error, PermissionError) or time.monotonic() > end
            pause = None if is_over else next(pauses, None)
            reason = (str(error) or type(error).__name__).partition("\n")[0][:300]
            if pause is None:
                raise OSError(f"{url} cannot be read ({reason})") from error
            pause *= random.uniform(0.5, 1.0)
            logger.warning("%s cannot be read (%s); trying again in %.1f s", url, reason, pause)
            time.sleep(pause)


def _system(url: str, patience: Patience = PATIENT) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if url.lower().startswith("http"):
        import aiohttp

        limits = aiohttp.ClientTimeout(
            total=None, connect=patience.connecting, sock_read=patience.silence
        )
        options = {"client_kwargs": {"timeout": limits}}
    system, path = url_to_fs(url, **options)
    return system, path


def _deadline(system: Any) -> dict[str, float]:
    return {"timeout": DEADLINE} if getattr(system, "async_impl", False) else {}


def _info(url: str) -> dict[str, Any]:
    return retried(url, lambda system, path: system.info(path, **_deadline(system)))


def _version(info: dict[str, Any]) -> str:
    marks = {
        name.lower(): info[name]
        for name in info
        if name.lower() in ("etag", "mtime", "last-modified", "sha256")
    }
    return " ".join(map(str, (info.get("size"), *(marks[name] for name in sorted(marks)))))
