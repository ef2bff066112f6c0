"""Threads that work for every request in turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Any, TypeVar

Turn = deque[tuple["Future[Any]", Callable[[], Any]]]
"""What one request still waits for."""

_Result = TypeVar("_Result")


class Turns:
    """Threads that do a piece of work of each request in turn, so that one with many does not hold up the others.

    Work in a library, such as decoding an image, cannot be ended. So the threads do not keep the process from ending.
    """

    def __init__(self, count: int, name: str) -> None:
        """Starts no thread yet.

        Args:
            count: Most threads.
            name: That they begin with.
        """
        self._count, self._name, self._started, self._closed = count, name, 0, False
        self._changed = Condition()
        self._waiting: deque[Turn] = deque()  # those with work, the one whose turn is next first

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Lends what the work of one request is given with; at the end of the block, what was not begun is dropped."""
        turn: Turn = deque()
        try:
            yield turn
        finally:
            with self._changed:
                if turn:
                    self._waiting.remove(turn)
                    turn.clear()

    async def run(self, turn: Turn, work: Callable[[], _Result]) -> _Result:
        """Returns what work returns, done in a thread; if it is cancelled before it begins, it is not done."""
        future: Future[_Result] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the threads are closed; do the work before")
            if not turn:
                self._waiting.append(turn)
            turn.append((future, work))
            self._changed.notify()
            if self._started < self._count:
                self._started += 1
                Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drops what was not begun, and waits for nothing."""
        with self._changed:
            self._closed = True
            for turn in self._waiting:
                for future, _ in turn:
                    future.cancel()
            self._changed.notify_all()

    def _work(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Does a piece of work, which is forgotten when it is done; False once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return False
            turn = self._waiting.popleft()
            future, work = turn.popleft()
            if turn:
                self._waiting.append(turn)
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - who waits is told
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001 - a panic in Rust, which only this work is to fail of
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
        return True
