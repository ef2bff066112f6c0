"""Files at URLs, read through fsspec: over HTTP, in object stores, on the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a file of a data set is read again after an error, at most; each pause is drawn."""

SILENCE = "BRIDGETOWER_URL_TIMEOUT"
"""Environment variable: seconds after which a host that says nothing is given up; default: 30."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:(//|:)", re.IGNORECASE)
_GLOB = re.compile(r"[*?\[]")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_PATTERN = re.compile(rf"{_GLOB.pattern}|{_RANGE.pattern}")
_PART = 2**20
_PIECE = 2**24  # bytes of a file that are read in one request
_LONGEST = 2**29  # bytes of the file of an image
_IMAGE_TRIES = 4  # after the first
_PERMANENT = range(400, 500)  # answers of servers that are the same when they are asked again
_PASSING = (408, 425, 429)  # but these
# What stores raise beside OSError; only of packages that are in use.
_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
)


def is_url(place: object) -> bool:
    """Whether a place is a URL such as https://…, s3://… or hf://…, and not a local path."""
    return _SCHEME.match(str(place)) is not None


def file_name(url: str) -> str:
    """Returns the last part of a URL's path, without what follows a question mark."""
    return url.partition("?")[0].rstrip("/").rpartition("/")[2]


def expanded(url: str) -> list[str]:
    """Returns the URLs that one with a range of numbers, such as shard-{000..099}.tar, or with a `*` stands for.

    Raises:
        OSError: The store cannot be listed, or has none.
    """
    if found := _RANGE.search(url):
        first, last = found.groups()
        numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
        return [one for number in numbers for one in expanded(url[: found.start()] + number + url[found.end() :])]
    if not _GLOB.search(url.partition("?")[0]):
        return [url]
    with _reading(url):
        system, path = _system(url)
        names = sorted(map(str, system.glob(path)))
    if not names:
        raise FileNotFoundError(f"nothing matches {url}")
    return [_url_of(url, system, name) for name in names]


def files_below(url: str) -> list[str]:
    """Returns the URLs of all files in a folder of a store and in those below, in order.

    Raises:
        OSError: The store cannot be listed.
    """
    with _reading(url):
        system, path = _system(url)
        return [_url_of(url, system, name) for name in sorted(map(str, system.find(path)))]


def name_below(url: str, source: str) -> str:
    """Returns the path of a file from the folder of its source on, or from the last folder before a range or a `*`.

    Raises:
        OSError: The package of the store is not installed.
    """
    folder = source if (fixed := _PATTERN.split(source)[0]) == source else fixed.rpartition("/")[0]
    with _reading(source):
        _, path = _system(url.partition("?")[0])
        _, start = _system(folder)
    return os.path.relpath(path, start)


def read_url(url: str, piece: tuple[int, int] | None = None) -> bytes:
    """Returns the file of an image, or a piece of a longer file.

    It is tried again a few times, unless its host cannot be reached or says nothing: among many links many are dead.

    Args:
        url: Of the file.
        piece: Where it starts, and its length in bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is longer than an image, or its server does not give pieces.
    """

    def read(system: Any, path: str) -> bytes:
        if piece is not None:
            start, size = piece
            part: bytes = system.cat_file(path, start=start, end=start + size)
            if len(part) != size:
                raise ValueError(f"{url} gives {len(part)} bytes where {size} were asked for; copy it to a disk")
            return part
        with system.open(path, "rb", **_streaming(url)) as file:
            return bytes(file.read(_LONGEST + 1))

    content = _retried(url, read, PAUSES[:_IMAGE_TRIES], lambda error: is_permanent(error) or _is_silent(error))
    if len(content) > _LONGEST:
        raise ValueError(f"{url} has more than {_LONGEST} bytes; expected the file of one image")
    return content


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """Copies a file to a temporary folder, which is removed in the end.

    Raises:
        OSError: It cannot be read, or the disk has no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="bridgetower-") as folder:
        path = Path(folder) / file_name(url)
        fetch(url, path)
        yield path


def file_facts(url: str) -> tuple[int | None, str]:
    """Returns the size of a file in bytes, None if its server does not tell, and what changes when it is written anew.

    Raises:
        OSError: It cannot be read.
    """
    info = _retried(url, lambda system, path: system.info(path))
    marks = {name.lower(): info[name] for name in info if name.lower() in ("etag", "mtime", "last-modified", "sha256")}
    size = info.get("size")
    return size, " ".join(map(str, (size, *(marks[name] for name in sorted(marks)))))


def fetch(url: str, path: Path, most: int | None = None) -> None:
    """Copies a file, in pieces that are each tried again after an error, see `PAUSES`.

    A file whose server does not tell its size is read at once, and not again.

    Args:
        url: Of the file.
        path: Of the copy.
        most: Bytes that it may have; None: any number.

    Raises:
        OSError: It cannot be read, or the disk has no room for it.
        ValueError: It has more bytes.
    """
    size, _ = file_facts(url)
    if most is not None and size is not None and size > most:
        raise ValueError(f"{url} has {size} bytes; expected at most {most}")
    with path.open("wb") as file:
        if size is None:
            with _reading(url):
                system, place = _system(url)
                with system.open(place, "rb", **_streaming(url)) as source:
                    while part := source.read(_PART):
                        file.write(part)
                        if most is not None and file.tell() > most:
                            raise ValueError(f"{url} has more than {most} bytes; expected at most as many")
            return
        while (start := file.tell()) < size:
            file.write(_retried(url, partial(_piece, url, start, min(start + _PIECE, size), size)))


def read_file(url: str) -> bytes:
    """Returns a small file, such as the description of a data set; it is tried again after an error, see `PAUSES`.

    Raises:
        OSError: It cannot be read.
    """
    return _retried(url, lambda system, path: bytes(system.cat_file(path)))


def _piece(url: str, start: int, end: int, size: int, system: Any, path: str) -> bytes:
    content: bytes = system.cat_file(path, start=start, end=end)
    if start == 0 and len(content) == size:  # the server gives whole files only
        return content
    _check_piece(url, content, end - start)
    return content


def _check_piece(url: str, content: bytes, size: int) -> None:
    if len(content) < size:
        raise ConnectionError(f"{len(content)} bytes came where {size} were asked for")
    if len(content) > size:
        raise ValueError(f"{url} gives {len(content)} bytes where {size} were asked for; copy it to a disk")


def _retried(
    url: str,
    read: Callable[[Any, str], T],
    pauses: Sequence[float] | None = None,
    gives_up: Callable[[OSError], bool] | None = None,
) -> T:
    """Reads from the store of a URL, again after errors that may pass.

    Args:
        url: Of the file.
        read: Called with the store and the path in it.
        pauses: See `PAUSES`, which None stands for.
        gives_up: Whether an error is final; None: see `is_permanent`.

    Raises:
        OSError: It cannot be read; the URL is named.
    """
    waits = iter(PAUSES if pauses is None else pauses)
    while True:
        try:
            with _reading(url):
                return read(*_system(url))
        except OSError as error:
            pause = next(waits, None)
            if pause is None or (gives_up or is_permanent)(error):
                raise
            seconds = pause * random.uniform(0.5, 1.0)
            logger.warning("%s; trying again in %.1f s", error, seconds)
            time.sleep(seconds)


def is_permanent(error: OSError) -> bool:
    """Whether a file, or the store of a URL, will say the same again."""
    status = getattr(error.__cause__, "status", None)
    refused = isinstance(error.__cause__, PermissionError)
    missing = isinstance(error, FileNotFoundError)
    return missing or refused or (status in _PERMANENT and status not in _PASSING)


def _is_silent(error: OSError) -> bool:
    """Whether a host cannot be reached, or does not answer."""
    aiohttp = sys.modules.get("aiohttp")
    is_unreachable = aiohttp is not None and isinstance(error.__cause__, aiohttp.ClientConnectorError)
    return is_unreachable or isinstance(error.__cause__, TimeoutError)


def _system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if url.lower().startswith("http"):
        import aiohttp

        try:
            silence = float(os.environ.get(SILENCE, "30"))
        except ValueError as error:
            raise ValueError(f"{SILENCE} is {os.environ[SILENCE]!r}; expected seconds, such as 30") from error
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=silence, sock_read=silence)}
    system, path = url_to_fs(url, **options)
    return system, path


def _streaming(url: str) -> dict[str, int]:
    # Over HTTP a file is read in one request; its length, which a request of its own would tell, is not needed.
    return {"block_size": 0, "size": 1} if url.lower().startswith("http") else {}


def _url_of(url: str, system: Any, name: str) -> str:
    return name if is_url(name) else str(system.unstrip_protocol(name))


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Turns the errors of stores into OSError that names the URL.

    Raises:
        OSError: It cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file at {url}") from error
    except ImportError as error:
        raise FileNotFoundError(f"{url} cannot be read: {error}; install that package") from error
    except _store_errors() as error:
        reason = str(error) or type(error).__name__
        raise OSError(f"{url} cannot be read ({reason})") from error


def _store_errors() -> tuple[type[Exception], ...]:
    loaded = [(sys.modules[module], name) for module, name in _ERRORS if module in sys.modules]
    return OSError, RuntimeError, *(getattr(module, name) for module, name in loaded if hasattr(module, name))
