"""Threads that work for every request in turn, and do not keep the process from ending."""

import asyncio
import subprocess
import sys
import threading

import pytest

from bridgetower.serve.queues import Turns
from helpers.servers import wait_until

pytestmark = pytest.mark.anyio


async def run_in_turn(turns, *works):
    with turns.turn() as turn:
        return await asyncio.gather(*(turns.run(turn, work) for work in works))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({}, "a0 b0 c0 a1 c1 a2 a3 a4"),
        ({"c": 2.5}, "a0 b0 c0 a1 a2 c1 a3 a4"),
        ({"a": 9.0}, "a0 b0 c0 c1 a1 a2 a3 a4"),
    ],
)
async def test_every_request_has_the_same_time(seconds, expected):
    done = []
    gate = threading.Event()
    turns = Turns(1, "test", lambda: sum(seconds.get(name[0], 1.0) for name in done))
    first = asyncio.ensure_future(run_in_turn(turns, gate.wait))
    await asyncio.sleep(0)
    requests = [
        [f"{name}{number}" for number in range(count)]
        for name, count in (("a", 5), ("b", 1), ("c", 2))
    ]
    asking = [
        asyncio.ensure_future(run_in_turn(turns, *((lambda n=n: done.append(n)) for n in names)))
        for names in requests
    ]
    for _ in range(5):
        await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, *asking)
    assert done == expected.split()


async def test_newcomers_do_not_starve_those_who_wait():
    done = []
    counts = [0] * 4  # by each newcomer

    def all_newcomers_wait():
        return all(count == 20 or count > done.count(number) for number, count in enumerate(counts))

    def work(name):
        def do():
            wait_until(all_newcomers_wait)
            done.append(name)

        return do

    async def newcomer(turns, number):
        for _ in range(20):
            counts[number] += 1
            await run_in_turn(turns, work(number))

    turns = Turns(1, "test", lambda: float(len(done)))
    await asyncio.gather(
        run_in_turn(turns, *[work("old")] * 5), *(newcomer(turns, number) for number in range(4))
    )
    assert len(done) == 85
    assert max(number for number, name in enumerate(done) if name == "old") < 60


async def test_what_nobody_waits_for_is_not_done():
    done = []
    gate = threading.Event()
    turns = Turns(1, "test")
    first = asyncio.ensure_future(run_in_turn(turns, gate.wait))
    await asyncio.sleep(0)
    with turns.turn() as leaving:
        for number in range(3):
            waiting = asyncio.ensure_future(
                turns.run(leaving, lambda number=number: done.append(number))
            )
            await asyncio.sleep(0)
        waiting.cancel()
    last = asyncio.ensure_future(run_in_turn(turns, lambda: done.append(9)))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, last)
    assert done == [9]


async def test_nobody_waits_for_what_is_dropped():
    """Of several pieces one fails: the others are ended too, so that nothing is held for ever."""
    gate = threading.Event()

    def fail():
        raise MemoryError("a")

    before = asyncio.all_tasks()
    with pytest.raises(MemoryError):
        await run_in_turn(Turns(1, "test"), fail, gate.wait, int)
    assert len(asyncio.all_tasks() - before) == 2
    gate.set()
    _, pending = await asyncio.wait(asyncio.all_tasks() - before, timeout=10)
    assert not pending


class PanicException(BaseException):
    """What is no Exception."""


@pytest.mark.parametrize(
    ("error", "raised"), [(ValueError("a"), ValueError), (PanicException("a"), RuntimeError)]
)
async def test_errors_reach_who_waits_and_the_thread_goes_on(error, raised):
    def fail():
        raise error

    turns = Turns(1, "test")
    with pytest.raises(raised, match=r"a$"):
        await run_in_turn(turns, fail)
    assert await run_in_turn(turns, lambda: 3) == [3]
    turns.close()
    with pytest.raises(RuntimeError, match="closed"):
        await run_in_turn(turns, int)


def test_the_process_ends_beside_work_that_does_not():
    script = """
import asyncio, threading
from bridgetower.serve.queues import Turns

async def main():
    turns, begun = Turns(1, "test"), threading.Event()
    with turns.turn() as turn:
        jobs = [asyncio.ensure_future(turns.run(turn, lambda: begun.set() or threading.Event().wait())) for _ in "ab"]
        while not begun.is_set():
            await asyncio.sleep(0.01)
        turns.close()

asyncio.run(main())
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "ended\n"
