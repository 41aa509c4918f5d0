"""Shards on a bounded disk: fetched ahead of the work, and deleted to make room when the work has gone on.

Nobody tells the window what is at work: it sees which shards are opened, and knows in which steps (embeddings, layer by
layer, the rest) each is read. What is deleted too early is fetched again, so the order of work is a matter of time and
never of correctness. An opened file outlives its name, so a shard may go while its tensors are still mapped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PosixPath
from types import TracebackType
from typing import Any, BinaryIO, Self

from qconv.checkpoint.header import TensorEntry
from qconv.errors import CheckpointError, QconvError, UsageError

PARTIAL = ".partial"
OVERLAP = 1
"""Steps before the one at work whose shards are still read: a layer is checked while the next one is worked on."""

Bring = Callable[[str, threading.Event], bool]
"""Puts a shard, by name, at its place; False if the event stopped it."""


def least_budget(sizes: Mapping[str, int], steps: Sequence[Sequence[str]]) -> int:
    """The bytes of disk that the shards of one step and of the one before it take, at most.

    Args:
        sizes: Each shard's bytes.
        steps: The shards that each step reads, in the order of work.
    """
    near = (set().union(*steps[max(0, step - OVERLAP) : step + 1]) for step in range(len(steps)))
    return max((sum(sizes[name] for name in names) for names in near), default=0)


class ShardWindow:
    """The shards of a checkpoint on a bounded disk. Use as a context manager; threads share it."""

    def __init__(
        self,
        folder: Path,
        sizes: Mapping[str, int],
        steps: Sequence[Sequence[str]],
        budget: int,
        bring: Bring,
        log: Callable[[str], None],
    ) -> None:
        """Check the budget; nothing is fetched yet.

        Args:
            folder: Where shards lie. Those of an earlier run are used again.
            sizes: Each shard's bytes.
            steps: The shards that each step reads, in the order of work; every shard in one at least.
            budget: Bytes that the folder may take.
            bring: Fetches one.
            log: Told about each shard that comes and goes.

        Raises:
            UsageError: the budget is too small for a step; says what is needed.
        """
        least = least_budget(sizes, steps)
        if budget < least:
            raise UsageError(
                f"the shards that are needed at once take {least / 1e9:.3f} GB, more than the {budget / 1e9:.3f} GB of "
                "--disk-budget.",
                hint=f"Allow at least {-(-least // 10**6)}MB.",
            )
        self._folder, self._sizes, self._steps = folder, sizes, steps
        self._budget, self._bring, self._log = budget, bring, log
        self._order = list(dict.fromkeys(name for step in steps for name in step))
        self._steps_of = {name: [step for step, names in enumerate(steps) if name in names] for name in self._order}
        self._there: set[str] = set()
        self._coming: str | None = None
        self._wanted: list[str] = []
        self._failed: dict[str, QconvError] = {}
        self._step, self._forward, self._begun = 0, True, False
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shards", daemon=True)
        self.most_held = 0
        """The most bytes that lay in the folder at once."""

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        for file in self._folder.iterdir():
            if file.name in self._sizes and file.stat().st_size == self._sizes[file.name]:
                self._there.add(file.name)
            elif file.name in self._sizes:
                file.unlink()
        with self._changed:
            self._make_room(0, set())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()
        self._thread.join()

    def clear(self) -> None:
        """Fetch no more, and delete every shard: nobody will continue."""
        self._close()
        with self._changed:
            self._there.clear()
            for name in self._sizes:
                (self._folder / name).unlink(missing_ok=True)
                (self._folder / f"{name}{PARTIAL}").unlink(missing_ok=True)

    def open(self, name: str) -> BinaryIO:
        """A shard opened for reading, once it is there.

        Raises:
            CheckpointError: it cannot be had, or the window is closed.
            OutputError: the disk is full.
        """
        with self._changed:
            self._go_to(name)
            self._begun = True
            self._wanted.append(name)
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: name in self._there or name in self._failed or self._stopped.is_set())
                if name in self._there:
                    return (self._folder / name).open("rb")
                failed = self._failed.pop(name, None)
                raise failed or CheckpointError(f"{name}: asked for after the end.", hint="Run the command again.")
            finally:
                self._wanted.remove(name)
                self._changed.notify_all()

    def _go_to(self, name: str) -> None:
        """The step at work is the nearest one that reads the shard."""
        step = min(self._steps_of[name], key=lambda one: abs(one - self._step))
        if step != self._step:
            self._step, self._forward = step, step > self._step

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped.is_set() or self._choose() is not None)
                if self._stopped.is_set():
                    return
                name = self._coming = self._choose()
                assert name is not None
                self._make_room(self._sizes[name], self._keeps(name))
            failed: QconvError | None = None
            try:
                if not self._bring(name, self._stopped):
                    return
            except QconvError as error:
                failed = error
            except OSError as error:
                failed = CheckpointError(f"{name}: cannot be kept: {error.strerror}.", hint="Check the disk.")
            with self._changed:
                self._coming = None
                if failed is None:
                    self._there.add(name)
                    self._log(f"fetched {name}")
                else:
                    self._failed[name] = failed
                self._changed.notify_all()

    def _choose(self) -> str | None:
        """What to fetch next: what is waited for, else what comes next in the direction of the work, if it has room."""
        for name in (*self._wanted, *self._ahead()):
            if name in self._there or name in self._failed:
                continue
            goes = sum(self._sizes[one] for one in self._evictable(self._keeps(name)))
            if self._held() - goes + self._sizes[name] <= self._budget:
                return name
            return None
        return None

    def _ahead(self) -> list[str]:
        """The shards of the step at work and of those after it, in their order; none while no work has begun."""
        if not self._begun:
            return []
        steps = range(self._step, len(self._steps)) if self._forward else range(self._step, -1, -1)
        return list(dict.fromkeys(name for step in steps for name in self._steps[step]))

    def _keeps(self, name: str) -> set[str]:
        """What may not go for a shard: what is waited for, and for one that nobody waits for also what is near."""
        if name in self._wanted:
            return set(self._wanted)
        first = max(0, self._step - OVERLAP)
        last = min(self._steps_of[name], key=lambda one: abs(one - self._step))
        low, high = (first, last) if self._forward else (last, self._step + OVERLAP)
        return {one for step in self._steps[low : high + 1] for one in step} | set(self._wanted)

    def _evictable(self, kept: set[str]) -> list[str]:
        """Shards that may go: those that are read farthest from the step at work first, and behind it before ahead."""

        def nearness(name: str) -> tuple[int, bool]:
            nearest = min(self._steps_of[name], key=lambda one: abs(one - self._step))
            return -abs(nearest - self._step), (nearest > self._step) == self._forward

        return sorted(self._there - kept, key=nearness)

    def _make_room(self, size: int, kept: set[str]) -> None:
        going = self._evictable(kept)
        while self._held() + size > self._budget and going:
            name = going.pop(0)
            (self._folder / name).unlink()
            self._there.remove(name)
            self._log(f"deleted {name}")
        if size:
            for name in self._sizes.keys() - {self._coming}:
                (self._folder / f"{name}{PARTIAL}").unlink(missing_ok=True)
        self.most_held = max(self.most_held, self._held() + size)

    def _held(self) -> int:
        return sum(self._sizes[name] for name in self._there)


class Shard(PosixPath):
    """A shard's place in a window: opening it waits until it is there. Its ``seal`` stands for its bytes."""

    window: ShardWindow
    seal: str
    samples: Path
    """A sparse file of its size that holds its header and the pages that a fingerprint reads."""

    def open(self, *_: Any, **__: Any) -> Any:
        """For reading bytes, which is the only way.

        Raises:
            CheckpointError, OutputError: as :meth:`ShardWindow.open`.
        """
        return self.window.open(self.name)


class HubFolder(PosixPath):
    """The folder of a repository's small files; ``entries`` are the tensors of its shards, which the window brings."""

    window: ShardWindow
    entries: Mapping[str, TensorEntry]
