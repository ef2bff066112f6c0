"""Fairness between clients: their shares of a limit, and the order in which their work is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from heapq import heappop, heappush
from itertools import count
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

CLIENT: ContextVar[Hashable] = ContextVar("client", default=None)
"""The client whose request is served."""

_Job = TypeVar("_Job")


class Shares:
    """A limit that clients share. Each may hold as much as is left free, so that others always find room."""

    def __init__(self, total: float) -> None:
        self.total = total
        self._held: dict[Hashable, float] = {}

    @property
    def held(self) -> float:
        return sum(self._held.values())

    def held_by(self, client: Hashable) -> float:
        return self._held.get(client, 0)

    def fits(self, client: Hashable, amount: float) -> bool:
        """Tells whether a client, with so much more, would hold no more than is then left free."""
        return self.held_by(client) + amount <= self.total - self.held - amount

    def add(self, client: Hashable, amount: float) -> None:
        """Counts an amount that a client takes, or gives back if it is negative."""
        held = self.held_by(client) + amount
        if held:
            self._held[client] = held
        else:
            self._held.pop(client, None)

    @contextmanager
    def holding(self, client: Hashable, amount: float) -> Iterator[None]:
        self.add(client, amount)
        try:
            yield
        finally:
            self.add(client, -amount)


class _Flow:
    """A client among clients, or a request among those of its client."""

    def __init__(self) -> None:
        self.work = 0.0  # done for it, counted from the virtual time at which it came
        self.turn = 0  # number of its last turn


_AnyFlow = TypeVar("_AnyFlow", bound=_Flow)


class _Backlog(Generic[_AnyFlow]):
    """Flows that wait, and the virtual time: the work of one that had its share since the queue was made."""

    def __init__(self) -> None:
        self.flows: dict[_AnyFlow, None] = {}
        # By work, turn and age; an entry whose work or turn is no longer that of its flow does not count.
        self._heap: list[tuple[float, int, int, _AnyFlow]] = []
        self._entries = count()
        self._virtual_time = 0.0
        self._turns = 0

    def join(self, flow: _AnyFlow) -> None:
        flow.work = max(flow.work, self._virtual_time)
        self.flows[flow] = None
        self._push(flow)

    def leave(self, flow: _AnyFlow) -> None:
        del self.flows[flow]
        if not self.flows:
            self._heap.clear()

    def first(self) -> _AnyFlow:
        """Returns the flow with the least work, of several the one that had no turn for longest."""
        while True:
            work, turn, _, flow = self._heap[0]
            if flow in self.flows and (work, turn) == (flow.work, flow.turn):
                return flow
            heappop(self._heap)

    def take(self) -> _AnyFlow:
        """Gives the first flow its turn."""
        flow = self.first()
        heappop(self._heap)
        self._turns += 1
        flow.turn = self._turns
        self._push(flow)
        self._virtual_time = max(self._virtual_time, flow.work)
        return flow

    def charge(self, flow: _AnyFlow, cost: float) -> None:
        """Counts work for a flow.

        The virtual time goes on, else newcomers, one after the other, would be first.
        """
        num_others = len(self.flows) - (flow in self.flows)
        flow.work += cost
        if flow in self.flows:
            self._push(flow)
        self._virtual_time += cost / (1 + num_others)

    def _push(self, flow: _AnyFlow) -> None:
        heappush(self._heap, (flow.work, flow.turn, next(self._entries), flow))


class _Client(_Flow):
    def __init__(self, name: Hashable) -> None:
        super().__init__()
        self.name = name
        self.requests: _Backlog[RequestJobs[Any]] = _Backlog()


class RequestJobs(_Flow, Generic[_Job]):
    """Jobs of one request that wait."""

    def __init__(self, client: _Client) -> None:
        super().__init__()
        self.client = client
        self.waiting: deque[_Job] = deque()
        self.last_cost = 0.0  # where it is known only when a job is done


class FairQueue(Generic[_Job]):
    """Jobs in the order of weighted fair queueing by cost, over clients and over the requests of each client."""

    def __init__(self) -> None:
        # As long as they have requests.
        self._clients: WeakValueDictionary[Hashable, _Client] = WeakValueDictionary()
        self._backlog: _Backlog[_Client] = _Backlog()

    def __bool__(self) -> bool:
        return bool(self._backlog.flows)

    def request(self) -> RequestJobs[_Job]:
        """Returns an empty queue for the jobs of this request."""
        name = CLIENT.get()
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client(name)
        return RequestJobs(client)

    def add(self, request: RequestJobs[_Job], job: _Job) -> None:
        client = request.client
        if not client.requests.flows:
            self._backlog.join(client)
        if not request.waiting:
            client.requests.join(request)
        request.waiting.append(job)

    def next_client(self) -> Hashable:
        """Returns the client whose job is the next one."""
        return self._backlog.first().name

    def take(self) -> tuple[RequestJobs[_Job], _Job]:
        """Removes the next job of the client, and of its request, with the least work so far."""
        client = self._backlog.take()
        request = client.requests.take()
        job = request.waiting.popleft()
        if not request.waiting:
            self._leave(request)
        return request, job

    def charge(self, request: RequestJobs[_Job], cost: float) -> None:
        request.client.requests.charge(request, cost)
        self._backlog.charge(request.client, cost)

    def drop(self, request: RequestJobs[_Job]) -> list[_Job]:
        """Removes and returns the waiting jobs of a request."""
        dropped = list(request.waiting)
        request.waiting.clear()
        if dropped:
            self._leave(request)
        return dropped

    def jobs(self) -> Iterator[_Job]:
        for client in self._backlog.flows:
            for request in client.requests.flows:
                yield from request.waiting

    def _leave(self, request: RequestJobs[_Job]) -> None:
        requests = request.client.requests
        requests.leave(request)
        if not requests.flows:
            self._backlog.leave(request.client)
