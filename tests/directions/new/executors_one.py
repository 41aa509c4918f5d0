"""One after the other, in the thread that asks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch

from qconv.core.devices import Lending
from qconv.executors.threads import single_threaded_operations


class One:
    """See :class:`qconv.core.workers.Workers`."""

    def __init__(self, count: int | None, allowance: float, lending: Lending) -> None:
        self.count = 1
        self.lending = lending
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> One:
        self._stack.enter_context(single_threaded_operations())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def map(
        self, function: Callable[[Any], Any], items: Iterable[Any], sizes: Iterable[int] | None = None
    ) -> Generator[Any, None, None]:
        """In order."""
        for item in items:
            with torch.no_grad():
                result = function(item)
            yield result


EXECUTOR = One
