"""Signals as a request to stop that is honoured at the next good moment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SECONDS = 5.0
"""Within which signals are one request: launchers send theirs to the group, and then to each process again."""


class Stop:
    """Whether the run has to stop, and which signal asked first."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.signal: signal.Signals | None = None
        self._announce, self._since = announce, 0.0

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal and announces its name; one that comes later ends the process at once."""
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            self._announce(self.signal.name)
        elif time.monotonic() - self._since > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def stop_signals(announce: Callable[[str], None] = lambda name: None) -> Iterator[Stop]:
    """Turns SIGINT, SIGTERM and SIGHUP into a request; afterwards they do what they did before.

    Outside the main thread, where Python takes no signals, none is awaited.
    """
    stop = Stop(announce)
    numbers = SIGNALS if current_thread() is main_thread() else ()
    # A signal that is ignored stays so, as SIGHUP is below nohup.
    previous = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
