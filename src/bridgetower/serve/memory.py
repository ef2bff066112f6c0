"""Memory of a process with many threads; imported before torch."""

from __future__ import annotations

import ctypes
import platform

_ARENA_MAX = -8  # its number in malloc.h
_ARENAS = 2


def limit_arenas() -> None:
    """Limits glibc to two memory pools for all threads; other libraries are left as they are.

    By default each thread gets a pool, up to eight for each core, and none returns its free memory to the others. glibc
    reads the limit when it creates the pools, so call this before any thread starts.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_ARENA_MAX, _ARENAS)
