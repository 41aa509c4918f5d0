"""Several candidates at once, beside other work."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from qconv.evaluation.sandbox.candidate import Backend, Running
from qconv.evaluation.sandbox.judge import Check, judge
from qconv.evaluation.sandbox.limits import Limits
from qconv.evaluation.sandbox.verdict import Verdict

WORKERS = 2


class JudgePool:
    """Threads that judge. A context manager; left by an exception, it ends running candidates, drops waiting ones."""

    def __init__(self, backend: Backend, workers: int = WORKERS) -> None:
        """Start no more than ``workers`` threads; a candidate dies with the thread that started it."""
        self._backend = backend
        self._running = Running()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="qconv-judge")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._running.end()
        self._threads.shutdown(wait=True)

    def submit(self, check: Check, program: str, limits: Limits) -> Future[Verdict]:
        """Judge when a thread is free."""
        return self._threads.submit(judge, self._backend, check, program, limits, self._running)
