"""Ends a process at a chosen moment of its work, however fast the machine is."""

import fnmatch
import os
import signal
import sys
from pathlib import Path

FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def before(event, number, act):
    """Acts in this process right before the event happens for the given time, counted from 1."""
    left = number

    def hook(name, arguments):
        nonlocal left
        if left > 0 and event(name, arguments):
            left -= 1
            if left == 0:
                act()

    sys.addaudithook(hook)


def end(process):
    """Waits for the end; returns the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def renamed(pattern):
    """The event that a file is renamed to a path that matches."""
    return lambda name, arguments: (
        name == "os.rename" and fnmatch.fnmatch(os.fsdecode(arguments[1]), pattern)
    )


def within(folder, events=FILE_EVENTS):
    """The event that something in a folder is opened, renamed, made or removed."""

    def happens(name, arguments):
        path = arguments[0] if name in events else None
        return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)

    return happens


def send(number):
    os.kill(os.getpid(), number)


def wait_for(number, file):
    """Makes a file, and waits until the signal arrives here."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    os.set_blocking(reading, True)
    signal.set_wakeup_fd(writing)
    Path(file).touch()
    assert os.read(reading, 1) == bytes([number])


def main(when, number, name, target, *arguments):
    from bridgetower import cli

    sent = signal.Signals[name]
    before(
        renamed(when),
        int(number),
        lambda: send(sent) if target == "self" else wait_for(sent, target),
    )
    cli.main(arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
