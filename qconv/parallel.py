"""Threads over experts and matrices instead of threads within an operation.

Inside a worker every torch operation runs on one thread. Small operations scale that way where a team of OpenMP threads
would wait for its slowest member at each of thousands of barriers, and a sum never depends on how many threads there
are: the same recipe gives the same bytes on any number of cores.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_DEFAULT_WORKERS = 8
"""Each worker holds an expert's working set, so memory grows with their number."""


def default_workers() -> int:
    """The processors that this process may use, at most :data:`MOST_DEFAULT_WORKERS`."""
    return min(len(os.sched_getaffinity(0)), MOST_DEFAULT_WORKERS)


@contextlib.contextmanager
def single_threaded_operations() -> Iterator[None]:
    """Within the context, torch operations of this process use one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """A pool of threads with an ordered map that looks ahead only as far as there are workers.

    Use as a context manager.
    """

    def __init__(self, count: int | None = None) -> None:
        """Start with ``count`` threads, by default :func:`default_workers`."""
        self.count = default_workers() if count is None else count
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

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``function`` of each item, in order, computed without gradients; the first error is raised in its turn.

        At most ``count`` items are in flight beyond the one being consumed, so memory stays bounded.
        """

        def without_gradients(item: Item) -> Result:
            with torch.no_grad():
                return function(item)

        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(without_gradients, item))
                if len(pending) > self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
