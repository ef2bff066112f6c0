"""Files at URLs, read through fsspec: over HTTP, in object stores, on the Hugging Face hub."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:(//|:)", re.IGNORECASE)
_GLOB = re.compile(r"[*?\[]")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_PART = 2**20
_LONGEST = 2**29  # bytes of the file of an image


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


def read_url(url: str, piece: tuple[int, int] | None = None) -> bytes:
    """Returns the file of an image, or a piece of a longer file.

    Args:
        url: Of the file.
        piece: Where it starts, and its length in bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is longer than an image, or its server does not give pieces.
    """
    with _reading(url):
        system, path = _system(url)
        if piece is not None:
            start, size = piece
            content: bytes = system.cat_file(path, start=start, end=start + size)
            if len(content) != size:
                raise ValueError(f"{url} gives {len(content)} bytes where {size} were asked for; copy it to a disk")
            return content
        with system.open(path, "rb", **_streaming(url)) as file:
            content = file.read(_LONGEST + 1)
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
        with _reading(url):
            system, place = _system(url)
            with system.open(place, "rb", **_streaming(url)) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, _PART)
        yield path


def _system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
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
    try:
        from aiohttp import ClientError
    except ImportError:
        return OSError, RuntimeError
    return OSError, RuntimeError, ClientError
