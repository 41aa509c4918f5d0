"""Executors: where the work runs. An ordered map of jobs with a bound on what is in flight (:mod:`qconv.core.workers`).

A module's name is its executor's registry key; its ``EXECUTOR`` is called with a number of workers, None for its own
choice, the most that all maps together have in flight, and the devices that work borrows.

``threads`` are those of this process: a map over experts and matrices that looks ahead only as far as there are workers
and as memory was allowed, with results in order, so that neither sums nor bytes depend on which thread was faster.
Inside a worker every torch operation runs on one thread.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from qconv.errors import UsageError

if TYPE_CHECKING:
    from qconv.core.devices import Lending
    from qconv.core.workers import Workers

DEFAULT = "threads"


def executors() -> list[str]:
    """The names of all executors, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_executor(name: str) -> Callable[[int | None, float, Lending], Workers]:
    """The executor of that name.

    Raises:
        UsageError: no such executor.
    """
    if name not in executors():
        raise UsageError(f"--executor: there is no {name!r}.", hint=f"Choose one of {', '.join(executors())}.")
    found: Callable[[int | None, float, Lending], Workers] = importlib.import_module(f"{__name__}.{name}").EXECUTOR
    return found


__all__ = ["DEFAULT", "executors", "get_executor"]
