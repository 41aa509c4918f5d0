"""Progress of long work: a bar with the time left on a terminal, plain lines in a log, nothing beside JSON."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol

import click
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from qconv.boundary.printable import printable
from qconv.cli.console import duration, say, stderr
from qconv.cli.signals import Interrupts

_LINE_SECONDS = 10.0
"""Least time between two lines about the same thing."""
_NARROW = 60
"""Columns below which a terminal has no room for the elapsed time."""
_LEAST_STEPS = 8
_LEAST_SECONDS = 30.0
_LEAST_SHARE = 0.005
"""Share of the work that must be measured: a layer's searches come before its first module, however small that is."""
_INSTANT = 0.002
"""A step of less than these seconds was done by an earlier run and says nothing of the pace."""


class Reporter(Protocol):
    """Told what goes on."""

    def progress(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` are done and ``what`` is being done."""

    def log(self, sentence: str) -> None:
        """Something to know, once."""


class TimeLeft:
    """Extrapolates from the latest steps: at least the last eight, and the last half minute."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque()
        self._seconds = 0.0
        self._last: tuple[float, int, int] | None = None

    def update(self, now: float, done: int, total: int) -> None:
        """Note how far the work is; going back or another total starts anew."""
        last, self._last = self._last, (now, done, total)
        if last is None:
            return
        then, before, same = last
        if total != same or done < before:
            self._steps.clear()
            self._seconds = 0.0
        elif done == before:
            self._last = last
        elif now - then >= _INSTANT:
            self._steps.append((now - then, done - before))
            self._seconds += now - then
        while len(self._steps) > _LEAST_STEPS and self._seconds - self._steps[0][0] > _LEAST_SECONDS:
            self._seconds -= self._steps.popleft()[0]

    def seconds(self, now: float) -> float | None:
        """Seconds until all is done, or None before a second and a share of the work were measured."""
        if self._last is None or self._seconds < 1.0:
            return None
        then, done, total = self._last
        steps = sum(count for _, count in self._steps)
        if steps < total * _LEAST_SHARE:
            return None
        pace = self._seconds / steps
        return max(0.0, pace * (total - done) - (now - then))


@contextlib.contextmanager
def reporting(*, quiet: bool, remedy: str | None = None) -> Iterator[Reporter]:
    """A reporter for the current command, on stderr.

    Args:
        quiet: Nothing is to be seen but what the command itself prints: for JSON.
        remedy: What to do after an interruption.
    """
    interrupts = click.get_current_context().find_object(Interrupts) or Interrupts()
    interrupts.remedy = remedy
    console = stderr()
    if quiet:
        yield _Quiet(interrupts)
    elif console.is_terminal:
        left = TimeLeft()
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f} %"),
            *([] if console.width < _NARROW else [_Elapsed()]),
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
        shown = printable(what)
        if self._task is None:
            self._task = self._bar.add_task(shown, total=total)
        self._bar.update(self._task, description=shown, completed=done, total=total)

    def log(self, sentence: str) -> None:
        self._interrupts.check()
        say(self._bar.console, sentence)


class _Elapsed(ProgressColumn):
    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return Text(duration(task.elapsed or 0.0), style="progress.elapsed")


class _Left(ProgressColumn):
    def __init__(self, left: TimeLeft) -> None:
        super().__init__(Column(no_wrap=True))
        self._left = left

    def render(self, task: Task) -> Text:
        seconds = self._left.seconds(time.monotonic())
        return Text("-:--:--" if seconds is None else f"{duration(seconds)} left", style="progress.remaining")
