"""Where the work runs, as those see it who have some: an ordered map with a bound on what is in flight."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from qconv.core.devices import Lending

AT_ONCE = 2
"""Threads that a device serves at once: one computes while the other brings its weights."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Protocol):
    """A context manager: within it, torch's operations use one thread each."""

    count: int
    """How many items are worked on at once."""

    lending: Lending
    """The devices that calibration computes on, which work borrows; given to the executor, which need only keep it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], sizes: Iterable[int] | None = None
    ) -> Generator[Result, None, None]:
        """``function`` of each item, in their order, computed without gradients; the first error is raised in its turn.

        At most ``count`` items are in flight beyond the one being consumed, so memory stays bounded.

        Args:
            function: Called by a worker.
            items: Each is asked for when it can be started.
            sizes: Each item's size, known before it is asked for. An item counts against the allowance until the
                next result is asked for after its own, or the map is closed: whoever may leave a sized map early must
                close it. The items must not be the results of another sized map of the same workers, which would wait
                for itself.
        """
