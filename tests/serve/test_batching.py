"""Batches, the order of weighted fair queueing, shares of the queue, and an end that finishes what was taken in."""

import asyncio
import contextlib
import threading
from contextlib import asynccontextmanager

import pytest

from bridgetower.serve.errors import ApiError
from bridgetower.serve.fairness import CLIENT
from bridgetower.serve.metrics import Metrics
from bridgetower.serve.queues import FETCHING, Scheduler, Work

pytestmark = pytest.mark.anyio


class Doubling:
    def __init__(self):
        self.batches = []
        self.gate = threading.Event()

    def __call__(self, numbers):
        self.batches.append(list(numbers))
        assert self.gate.wait(300)
        if -1 in numbers:
            raise ValueError("minus one")
        return [2 * number for number in numbers]

    async def seen(self):
        while not self.batches:
            await asyncio.sleep(0.001)


@asynccontextmanager
async def batching(*, closed=False, max_batch=4, queue=200, cost=1.0, **settings):
    """Lends a batcher of one lane that doubles numbers, and its queue. Both stop at the end."""
    doubling = Doubling()
    if not closed:
        doubling.gate.set()
    # batches take no time, so that nothing but their size bounds them
    clock = {
        "clock": lambda: 0.0,
        **settings,
    }
    batcher = Scheduler(
        doubling, lambda number: Work("all", cost), lanes={"all": max_batch}, queue=queue, **clock
    )
    yield doubling, batcher
    await batcher.close()


@contextlib.contextmanager
def of_client(name):
    token = CLIENT.set(name)
    try:
        yield
    finally:
        CLIENT.reset(token)


async def begun(batcher, *requests):
    """Submits requests that wait until the gate opens."""
    tasks = [asyncio.create_task(batcher.submit(numbers)) for numbers in requests]
    await asyncio.sleep(0)
    return tasks


async def test_requests_that_come_together_are_computed_together():
    async with batching(closed=True, max_batch=8) as (doubling, batcher):
        first = await begun(batcher, [1])
        await doubling.seen()
        later = await begun(batcher, *([number, number + 1] for number in (10, 20, 30)))
        doubling.gate.set()
        assert await asyncio.gather(*first, *later) == [[2], [20, 22], [40, 42], [60, 62]]
        assert [len(batch) for batch in doubling.batches] == [1, 6]


async def ordered(requests, *, seconds=0.0, max_batch=1):
    """Returns the batches of requests, each a client, a cost and names of items, that came together to a busy lane.

    Each batch takes `seconds` for each unit of its cost.
    """
    now = 0.0
    gate = threading.Event()
    batches = []
    costs = {name: cost for _, cost, names in requests for name in names}

    def compute(names):
        nonlocal now
        assert gate.wait(300)
        batches.append(" ".join(names))
        now += seconds * sum(costs.get(name, 1.0) for name in names)
        return names

    scheduler = Scheduler(
        compute,
        lambda name: Work("all", costs.get(name, 1.0)),
        lanes={"all": max_batch},
        queue=100,
        clock=lambda: now,
    )
    tasks = []
    for client, _, names in [("nobody", 1.0, ["busy"]), *requests]:
        with of_client(client):
            tasks.append(asyncio.create_task(scheduler.submit(names)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*tasks) == [["busy"], *(names for _, _, names in requests)]
    await scheduler.close()
    return batches[1:]


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        # Two requests of a client have together as much as one of another.
        (
            [("a", 1, ["a0", "a1"]), ("a", 1, ["A0", "A1"]), ("b", 1, ["b0", "b1"])],
            "a0 b0 A0 b1 a1 A1",
        ),
        # One that costs three times as much has a third of the turns.
        (
            [("a", 3, ["a0", "a1", "a2"]), ("b", 1, [f"b{n}" for n in range(7)])],
            "a0 b0 b1 b2 a1 b3 b4 b5 a2 b6",
        ),
        # Many requests of one client do not delay another's.
        ([*(("a", 1, [f"a{n}"]) for n in range(6)), ("b", 1, ["b0"])], "a0 b0 a1 a2 a3 a4 a5"),
    ],
)
async def test_clients_and_their_requests_have_equal_shares_of_the_cost(requests, expected):
    assert await ordered(requests) == expected.split()


async def test_a_newcomer_does_not_wait_for_what_others_have_queued_and_owes_nothing():
    """A client that comes later gets the next turn, and none for the time in which it asked for nothing."""
    doubling = Doubling()
    scheduler = Scheduler(doubling, lambda _: Work("all", 1.0), lanes={"all": 1}, queue=100)
    with of_client("a"):
        first = await begun(scheduler, list(range(20)))
    await doubling.seen()
    with of_client("b"):
        second = await begun(scheduler, [100, 101, 102])
    doubling.gate.set()
    await asyncio.gather(*first, *second)
    order = [number for (number,) in doubling.batches]
    assert order[1:7] in ([100, 1, 101, 2, 102, 3], [1, 100, 2, 101, 3, 102])
    await scheduler.close()


async def test_a_batch_ends_when_it_would_take_a_tenth_of_a_second():
    """At 100 units a second a batch has ten. One item may cost more."""
    requests = [("a", 4, [f"a{number}" for number in range(400)])]
    batches = await ordered(requests, seconds=0.01, max_batch=64)
    assert len(batches[-2].split()) == 3  # 4 and 8 are less than 10 units, 12 are not
    batches = await ordered(
        [("a", 40, [f"a{number}" for number in range(100)])], seconds=0.01, max_batch=64
    )
    assert batches[-1].split() == ["a99"]


async def test_clients_of_the_last_second_share_the_time_of_a_batch():
    """Whoever comes while a batch is computed waits for a third of it where three sent something."""
    requests = [("a", 1, [f"a{number}" for number in range(200)]), ("b", 1, ["b0", "b1"])]
    batches = await ordered(requests, seconds=0.01, max_batch=64)
    # Of 10 units at 100 a second, a third is reached with the fourth item of a client.
    assert batches[0].split() == ["a0", "b0", "a1", "b1", "a2", "a3"]
    assert batches[1].split() == ["a4", "a5", "a6", "a7"]
    # A second later the client is alone.
    assert len(batches[-2].split()) == 10


async def test_lanes_do_not_wait_for_each_other():
    gates = {"slow": threading.Event(), "fast": threading.Event()}
    gates["fast"].set()

    def compute(names):
        assert all(gates[name].wait(300) for name in names)
        return names

    lanes = dict.fromkeys(gates, 4)
    scheduler = Scheduler(compute, lambda name: Work(name, 1.0), lanes=lanes, queue=100)
    (slow,) = await begun(scheduler, ["slow"] * 8)
    (both,) = await begun(scheduler, ["slow", "fast", "slow"])
    assert await scheduler.submit(["fast"] * 9) == ["fast"] * 9
    gates["slow"].set()
    assert await asyncio.gather(slow, both) == [["slow"] * 8, ["slow", "fast", "slow"]]
    await scheduler.close()


def admitted(batcher, stack, client, cost, **settings):
    """Whether a request is admitted, until the stack ends."""
    with of_client(client):
        try:
            stack.enter_context(batcher.admission(cost, **settings))
        except ApiError:
            return False
        return True


async def test_a_client_holds_at_most_as_much_as_is_left():
    """Of 96 units: a request counts for 24 at most. Each client's sum is at most what then is free."""
    cases = [
        ("a", 1000, True),  # counts 24, 72 are left
        ("a", 24, True),  # 48, 48
        ("a", 1, False),  # it would be 49, 47
        ("b", 1, True),  # 1, 47
        ("b", 23.5, False),  # 24.5, 23.5
        ("b", 23, True),  # 24, 24
        ("c", 24, False),
        ("c", 12, True),
        ("c", 1, False),
        ("d", 6, True),
        ("e", 3.5, False),
        ("e", 3, True),
    ]
    async with batching(queue=96) as (_, batcher):
        with contextlib.ExitStack() as stack:
            admissions = [admitted(batcher, stack, client, cost) for client, cost, _ in cases]
            assert admissions == [expected for _, _, expected in cases]
            assert batcher.admitted == 48 + 24 + 12 + 6 + 3
        assert batcher.admitted == 0
        with batcher.admission(24), batcher.admission(24):
            with pytest.raises(ApiError, match="try again in 12 s") as caught, batcher.admission(1):
                pass
            # 48 units, 4 a second
            assert (caught.value.status, caught.value.headers) == (
                429,
                {"Retry-After": "12"},
            )


async def test_requests_that_fetch_take_no_room_of_others():
    async with batching(queue=4 * FETCHING) as (_, batcher):
        with contextlib.ExitStack() as stack:
            admissions = [
                admitted(batcher, stack, "a", 1, fetches=True) for _ in range(FETCHING // 2 + 1)
            ]
            assert admissions == [True] * (FETCHING // 2) + [False]
            assert admitted(batcher, stack, "b", 1, fetches=True)
            assert admitted(batcher, stack, "a", FETCHING)
            assert admitted(batcher, stack, "a", FETCHING)
            assert not admitted(batcher, stack, "a", 1)
        assert batcher.admitted == 0


async def test_what_a_client_no_longer_waits_for_is_not_computed():
    async with batching(closed=True, max_batch=2) as (doubling, batcher):
        first = await begun(batcher, [1, 2])
        await doubling.seen()
        cancelled, remaining = await begun(batcher, [100] * 50, [5])
        cancelled.cancel()
        await asyncio.sleep(0)
        doubling.gate.set()
        assert await asyncio.gather(*first, remaining) == [[2, 4], [10]]
        assert doubling.batches == [[1, 2], [5]]


async def test_closing_finishes_what_was_submitted():
    async with batching(closed=True, max_batch=2) as (doubling, batcher):
        tasks = await begun(batcher, *([number] * 5 for number in range(3)))
        await doubling.seen()
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        doubling.gate.set()
        assert await asyncio.gather(*tasks) == [[0] * 5, [2] * 5, [4] * 5]
        await closing
        assert not batcher.alive


async def test_items_and_batches_are_counted():
    metrics = Metrics()

    def figures():
        lines = [
            line.split()
            for line in metrics.text().decode().splitlines()
            if line.startswith("bridgetower_")
        ]
        return {name.removeprefix("bridgetower_"): float(value) for name, value in lines}

    seconds = iter(range(1000))
    async with batching(
        closed=True, max_batch=2, queue=10, cost=0.5, metrics=metrics, clock=lambda: next(seconds)
    ) as (
        doubling,
        batcher,
    ):
        with batcher.admission(2.5):
            tasks = await begun(batcher, [1] * 5, [2] * 5)
            await doubling.seen()
            counters = figures()
            assert (
                counters["cost_admitted"],
                counters["cost_queued"],
                counters["cost_computing"],
            ) == (
                2.5,
                4,
                1,
            )
            tasks[1].cancel()
            await asyncio.gather(tasks[1], return_exceptions=True)
            assert figures()["cost_queued"] == 2
            doubling.gate.set()
            assert await tasks[0] == [2] * 5
        assert await batcher.submit([]) == []
    counters = figures()
    assert [counters[f"cost_{name}"] for name in ("admitted", "queued", "computing")] == [0, 0, 0]
    assert counters["batch_items_sum"] == sum(map(len, doubling.batches))
    assert counters["batch_seconds_sum"] > 0
    # the first batch has items of both requests
    assert counters["queue_seconds_count"] == len(doubling.batches) + 1
    async with batching(max_batch=1, metrics=metrics) as (_, batcher):
        with pytest.raises(ValueError, match="minus one"):
            await batcher.submit([-1, 1, 1])
    assert figures()["cost_queued"] == 0


async def test_an_item_that_fails_fails_its_request_alone():
    async with batching(closed=True, max_batch=8) as (doubling, batcher):
        first = await begun(batcher, [1])
        await doubling.seen()
        later = await begun(batcher, [2, 3], [4, -1, 5, 6, 7, 8, 9], [5])
        doubling.gate.set()
        *results, failed = await asyncio.gather(
            *first, later[0], later[2], later[1], return_exceptions=True
        )
        assert results == [[2], [4, 6], [10]]
        assert isinstance(failed, ValueError)
        assert batcher.alive
        assert await batcher.submit([3]) == [6]


async def test_a_model_that_always_fails_is_not_alive_until_it_computes_again():
    async with batching() as (_, batcher):
        for alive in (True, True, False):
            with pytest.raises(ValueError, match="minus one"):
                await batcher.submit([-1, -1])
            assert batcher.alive == alive
        assert await batcher.submit([1]) == [2]
        assert batcher.alive
