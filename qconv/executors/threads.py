"""Threads over experts and matrices instead of threads within an operation.

Inside a worker every torch operation runs on one thread. Small operations scale that way where a team of OpenMP threads
would wait for its slowest member at each of thousands of barriers, and a sum never depends on how many threads there
are: the same recipe gives the same bytes on any number of cores.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

from qconv.core.devices import CPU, Lending
from qconv.core.machine import available_memory, processors
from qconv.core.workers import AT_ONCE

Item = TypeVar("Item")
Result = TypeVar("Result")

HELD = 256 * 2**20
"""Bytes that a worker may hold that checks or passes on what others have made."""


def default_workers() -> int:
    """The processors that this process may use, as far as memory holds what each worker has in hand."""
    left = available_memory()
    return processors() if left is None else max(1, min(processors(), left // HELD))


@contextlib.contextmanager
def single_threaded_operations() -> Iterator[None]:
    """Within the context, torch operations of this process use one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Allowance:
    """How much may be in use at once, by all threads together. One that wants more than that gets it alone."""

    def __init__(self, total: float) -> None:
        self._total = total
        self._used = 0
        self._waiting = 0
        self._changed = threading.Condition()

    def take(self, amount: int, *, wait: bool) -> bool:
        """Take an amount; whether it was taken, which is certain after waiting for it."""
        with self._changed:
            if not wait and amount and (self._waiting or not self._fits(amount)):
                return False  # who waits holds nothing, and comes first
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._fits(amount))
            finally:
                self._waiting -= 1
            self._used += amount
            return True

    def give_back(self, amount: int) -> None:
        """Return what was taken."""
        with self._changed:
            self._used -= amount
            self._changed.notify_all()

    def _fits(self, amount: int) -> bool:
        return not amount or not self._used or self._used + amount <= self._total


class Threads:
    """A pool of threads with an ordered map that looks ahead only as far as there are workers.

    Use as a context manager.
    """

    def __init__(
        self,
        count: int | None = None,
        allowance: float = math.inf,
        lending: Lending | None = None,
    ) -> None:
        """Start with ``count`` threads, by default :func:`default_workers`, and enough to keep devices at work.

        Args:
            count: Number of threads.
            allowance: The most that all maps together have in flight, in the unit of their items' sizes.
            lending: The devices that calibration computes on; by default the processor.
        """
        self.count = default_workers() if count is None else count
        self.lending = Lending() if lending is None else lending
        if self.lending.home != CPU:
            self.count = max(self.count, AT_ONCE * len(self.lending.devices))
        self._allowance = Allowance(allowance)
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="qconv")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(single_threaded_operations())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stack.close()

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], sizes: Iterable[int] | None = None
    ) -> Generator[Result, None, None]:
        """``function`` of each item, in order, computed without gradients; the first error is raised in its turn.

        At most ``count`` items are in flight beyond the one being consumed, so memory stays bounded.

        Args:
            function: Called in a worker's thread.
            items: Each is asked for when it can be started.
            sizes: Each item's size, known before it is asked for. An item counts against the allowance until the
                next result is asked for after its own, or the map is closed: whoever may leave a sized map early must
                close it. The items must not be the results of another sized map of the same pool, which would wait
                for itself.
        """

        def without_gradients(item: Item) -> Result:
            with torch.no_grad():
                return function(item)

        pending: deque[tuple[Future[Result], int]] = deque()
        rest = iter(items)
        try:
            for size in itertools.repeat(0) if sizes is None else sizes:
                # What waits holds nothing itself: whoever holds something can always go on.
                while not self._allowance.take(size, wait=not pending):
                    yield from self._consumed(pending)
                try:
                    pending.append((self._pool.submit(without_gradients, next(rest)), size))
                except StopIteration:
                    self._allowance.give_back(size)
                    break
                if len(pending) > self.count:
                    yield from self._consumed(pending)
            while pending:
                yield from self._consumed(pending)
        finally:
            for future, size in pending:
                future.cancel()
                self._allowance.give_back(size)

    def _consumed(self, pending: deque[tuple[Future[Result], int]]) -> Generator[Result, None, None]:
        """The first result; its size is given back when the next one is asked for."""
        future, size = pending.popleft()
        try:
            yield future.result()
        finally:
            self._allowance.give_back(size)


EXECUTOR = Threads
