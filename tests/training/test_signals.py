"""Signals become a request to stop, and are given back afterwards."""

import os
import signal

import pytest

from bridgetower.training.loop import stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_that_is_announced(number: signal.Signals) -> None:
    before, names = signal.getsignal(number), []
    with stop_signals(names.append) as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert names == [number.name]
    assert signal.getsignal(number) is before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), stop_signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before
