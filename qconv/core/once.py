"""What is made once and then shared by all threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class MadeOnce(Generic[Arguments, Result]):
    """A function whose result is made once for each of its arguments, however many threads ask first.

    ``functools.cache`` does not lock: of two threads that ask first each makes a result, and one of them keeps working
    with what the cache no longer holds. Use as a decorator; arguments are hashable.
    """

    def __init__(self, function: Callable[Arguments, Result]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._made: dict[object, Result] = {}
        self._lock = threading.RLock()  # one result may be made of another one of the same function

    def __call__(self, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        """The result, made now if it is not there."""
        key = (arguments, *sorted(named.items()))
        with self._lock:
            if key not in self._made:
                self._made[key] = self._function(*arguments, **named)
            return self._made[key]

    def clear(self) -> None:
        """Forget all results."""
        with self._lock:
            self._made.clear()
