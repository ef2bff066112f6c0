"""Makes the server that workers are forked from ignore SIGTERM and SIGHUP, which are for the run.

Launchers send them to all processes. Workers end with their server, and a run would lack the batch of its last step.
"""

from __future__ import annotations

import os
import signal
import sys

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def _set_all(handler: signal.Handlers) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


# The server imports this before it forks; in other processes nothing changes.
if "multiprocessing.forkserver" in sys.orig_argv[-1]:
    _set_all(signal.SIG_IGN)
    # A process that someone else starts from this server can be ended as usual.
    os.register_at_fork(after_in_child=lambda: _set_all(signal.SIG_DFL))
