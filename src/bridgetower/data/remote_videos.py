"""Videos at URLs: copies in a cache that processes share, each with its subtitles beside it."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from urllib.parse import urlsplit, urlunsplit

from bridgetower.data.moments import LARGEST_SUBTITLES, SUBTITLE_SUFFIXES
from bridgetower.data.remote import fetch, file_facts, file_name
from bridgetower.disk_cache import DiskCache
from bridgetower.files import cache_folder, locked, replacing

LARGEST = 2**34
"""Bytes of a video at a URL."""

LIMIT = 2**36
"""Bytes of the copies together, up to which those that no process uses are kept."""

_HELD = 2  # copies that a process holds
_REFUSED = (401, 403)  # what stores answer that do not tell whether there is a file

_held: OrderedDict[str, tuple[ExitStack, Path]] = OrderedDict()
_lock = Lock()


def copy_of(url: str) -> Path:
    """Returns a copy of a video, which stays as long as this process does not ask for `_HELD` others.

    Subtitles at the same URL but for their suffix (`talk.vtt`, `talk.srt`) are copied beside it.

    Raises:
        OSError: It cannot be read, or the disk has no room for it.
        ValueError: It is too large.
    """
    with _lock:
        if url not in _held:
            while len(_held) >= _HELD:
                _held.popitem(last=False)[1][0].close()
            stack = ExitStack()
            _held[url] = stack, _copied(url, stack)
        _held.move_to_end(url)
        return _held[url][1]


def _copied(url: str, stack: ExitStack) -> Path:
    """Copies a video unless it is there, and holds the copy until the stack is closed."""
    size, version = file_facts(url)
    if size is not None and size > LARGEST:
        raise ValueError(f"{url} has {size} bytes; expected a video of at most {LARGEST}")
    subtitles = _subtitles_at(url)
    content = {"video": url, "version": version, "subtitles": subtitles}
    cache = DiskCache(cache_folder() / "videos", LIMIT, "copies of videos")
    folder = cache.place(content)
    path = folder / f"video{Path(file_name(url)).suffix.lower()}"
    while True:
        stack.enter_context(locked(folder, shared=True, wait=True))
        if path.is_file():
            cache.note_use(folder)
            return path
        stack.close()
        with locked(folder, wait=True):
            if not path.is_file():
                cache.begin(folder, content, size or 0)
                if subtitles is not None:
                    _write(
                        subtitles["url"], path.with_suffix(Path(file_name(subtitles["url"])).suffix), LARGEST_SUBTITLES
                    )
                _write(url, path, LARGEST)  # last: it shows that all is there


def _write(url: str, path: Path, most: int) -> None:
    with replacing(path) as temporary:
        fetch(url, temporary, most=most)


def _subtitles_at(url: str) -> dict[str, str] | None:
    """Returns where the subtitles of a video are, and what changes when they do; None where there are none."""
    parts = urlsplit(url)
    for suffix in SUBTITLE_SUFFIXES:
        beside = urlunsplit(parts._replace(path=str(Path(parts.path).with_suffix(suffix))))
        try:
            return {"url": beside, "version": file_facts(beside)[1]}
        except FileNotFoundError:
            continue
        except OSError as error:
            if getattr(error.__cause__, "status", None) not in _REFUSED and not isinstance(
                error.__cause__, PermissionError
            ):
                raise
    return None
