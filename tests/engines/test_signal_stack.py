"""Signals are handled after models of OpenVINO went, in whatever order."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from bridgetower.engines.runners import SignalStack, kept_signal_stack, signal_stack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems lay the structure out in another way")

SIZE = 64 * 1024

USE = """
import faulthandler, os, signal, sys
from pathlib import Path
from bridgetower.engines.runners import OpenVinoRunner

faulthandler.enable()
runners = [OpenVinoRunner(Path(sys.argv[1])) for _ in range(2)]
for runner in runners:
    runner._compile("image")
del runner, runners[0]
del runners[0]
signal.signal(signal.SIGTERM, lambda number, frame: print("handled", number))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_stack_that_was_installed_meanwhile_is_not_left() -> None:
    before, memory = signal_stack(), mmap.mmap(-1, SIZE)
    other = SignalStack(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0, SIZE)
    with kept_signal_stack():
        ctypes.CDLL(None).sigaltstack(ctypes.byref(other), None)
        assert signal_stack().address == other.address != before.address
    after = signal_stack()
    assert (after.address, after.flags, after.size) == (before.address, before.flags, before.size)


def test_signals_after_openvino(bridges: Path) -> None:
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", USE, str(bridges)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled 15\n"), done.stderr
