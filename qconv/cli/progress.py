"""Progress of long work: a bar with the time left on a terminal, plain lines in a log, nothing beside JSON."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from qconv.cli.console import duration, say, stderr
from qconv.cli.signals import Interrupts

_LINE_SECONDS = 10.0
"""Least time between two lines about the same thing."""
_REMEMBERED_STEPS = 8
_INSTANT = 0.05
"""A step this much shorter than the longest one was already done by an earlier run and says nothing of the rest."""


class Reporter(Protocol):
    """Told what goes on."""

    def progress(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` are done and ``what`` is being done."""

    def log(self, sentence: str) -> None:
        """Something to know, once."""


class TimeLeft:
    """Extrapolates from the last few steps, whatever their unit."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED_STEPS)
        self._last: tuple[float, int, int] | None = None

    def update(self, now: float, done: int, total: int) -> None:
        """Note how far the work is; starting over with another total forgets what was."""
        if self._last is not None:
            then, before, same = self._last
            if total != same or done < before:
                self._steps.clear()
            elif done > before:
                self._steps.append((now - then, done - before))
            else:
                return
        self._last = (now, done, total)

    def seconds(self, now: float) -> float | None:
        """Seconds until all is done, or None while nothing is known."""
        if self._last is None or not self._steps:
            return None
        slowest = max(seconds / count for seconds, count in self._steps)
        steps = [(seconds, count) for seconds, count in self._steps if seconds / count >= _INSTANT * slowest]
        pace = sum(seconds for seconds, _ in steps) / sum(count for _, count in steps)
        then, done, total = self._last
        return max(0.0, pace * (total - done) - (now - then))


@contextlib.contextmanager
def reporting(*, quiet: bool) -> Iterator[Reporter]:
    """A reporter for the current command, on stderr; ``quiet`` where stdout is JSON and nothing else is to be seen."""
    interrupts = click.get_current_context().find_object(Interrupts) or Interrupts()
    console = stderr()
    if quiet:
        yield _Quiet(interrupts)
    elif console.is_terminal:
        left = TimeLeft()
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _Elapsed(),
            _Left(left),
            console=console,
            refresh_per_second=4,
            expand=True,
            transient=True,
        )
        with bar:
            yield _Bar(interrupts, bar, left)
    else:
        yield _Lines(interrupts)


class _Quiet:
    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def progress(self, what: str, done: int, total: int) -> None:
        self._interrupts.check()

    def log(self, sentence: str) -> None:
        self._interrupts.check()


class _Lines:
    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._console = stderr()
        self._left = TimeLeft()
        self._start = time.monotonic()
        self._what: str | None = None
        self._printed = 0.0

    def progress(self, what: str, done: int, total: int) -> None:
        self._interrupts.check()
        now = time.monotonic()
        self._left.update(now, done, total)
        if what == self._what and now - self._printed < _LINE_SECONDS:
            return
        self._what, self._printed = what, now
        left = self._left.seconds(now)
        ending = "" if left is None or done >= total else f", {duration(left)} left"
        percent = 100 * done // total if total else 100
        self._line(f"{what}: {percent} % done{ending}")

    def log(self, sentence: str) -> None:
        self._interrupts.check()
        self._line(sentence)

    def _line(self, text: str) -> None:
        say(self._console, f"[{duration(time.monotonic() - self._start)}] {text}")


class _Bar:
    def __init__(self, interrupts: Interrupts, bar: Progress, left: TimeLeft) -> None:
        self._interrupts = interrupts
        self._bar = bar
        self._left = left
        self._task: TaskID | None = None

    def progress(self, what: str, done: int, total: int) -> None:
        self._interrupts.check()
        self._left.update(time.monotonic(), done, total)
        if self._task is None:
            self._task = self._bar.add_task(what)
        self._bar.update(self._task, description=what, completed=done, total=total)

    def log(self, sentence: str) -> None:
        self._interrupts.check()
        say(self._bar.console, sentence)


class _Elapsed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(duration(task.elapsed or 0.0), style="progress.elapsed")


class _Left(ProgressColumn):
    def __init__(self, left: TimeLeft) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        seconds = self._left.seconds(time.monotonic())
        return Text("-:--:--" if seconds is None else f"{duration(seconds)} left", style="progress.remaining")
