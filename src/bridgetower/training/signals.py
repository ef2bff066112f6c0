"""SIGTERM and SIGINT as a request to stop that is honoured at the next good moment."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether the run has to stop.

    Attributes:
        requested: True from the first signal on.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.requested, self._announce = False, announce

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal and announces its name."""
        self.requested = True
        self._announce(signal.Signals(number).name)


@contextmanager
def stop_signals(announce: Callable[[str], None] = lambda name: None) -> Iterator[Stop]:
    """Turns SIGINT and SIGTERM into a request; afterwards they do what they did before.

    Args:
        announce: Is called with the name of each signal.
    """
    stop = Stop(announce)
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
