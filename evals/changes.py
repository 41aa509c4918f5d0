"""Work in a process of its own that ends before its n-th change to the file system, or after a while, by SIGKILL.

Python announces what it is about to do to files by audit events; what it announces not (bytes written and synced) is
caught where it is called. A fork shares the modules that are loaded already, so a run costs its work and no import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_CALLS = ("write", "fsync", "posix_fallocate", "ftruncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_POLL = 0.002


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        killed: Whether by SIGKILL.
        code: Its exit code if not.
        seconds: After how long.
        changes: The changes that it made, or was about to make; 0 where a kill from outside left that unknown.
    """

    killed: bool
    code: int
    seconds: float
    changes: int


def run(
    work: Callable[[], object], folder: Path, log: Path, *, before: int | None = None, after: float | None = None
) -> Ended:
    """Do something in a forked process and wait for its end.

    Args:
        work: What to do; a SystemExit gives the exit code.
        folder: Only changes to what lies in it are counted.
        log: What the process prints is appended to it.
        before: The change, counted from 1, that the process does not live to make.
        after: Seconds after which it is killed.
    """
    started = time.monotonic()
    reading, writing = os.pipe()
    sys.stdout.flush()  # or the fork would print it once more
    sys.stderr.flush()
    with warnings.catch_warnings():
        # From Python 3.12 on a fork beside other threads warns; none of them holds a lock that the work needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if not process:
        os.close(reading)
        _child(work, folder, log, before, writing)
    os.close(writing)
    with contextlib.suppress(OSError):  # whoever is first, the child or this
        os.setpgid(process, process)
    status = None
    while status is None:
        found, code = os.waitpid(process, os.WNOHANG)
        if found:
            status = code
        elif after is not None and time.monotonic() - started >= after:
            os.killpg(process, signal.SIGKILL)
            after = None
        else:
            time.sleep(_POLL)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    code = 0 if killed else os.waitstatus_to_exitcode(status)
    return Ended(killed, code, time.monotonic() - started, int(said or b"0"))


def _child(work: Callable[[], object], folder: Path, log: Path, before: int | None, told: int) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        count = _count_changes(folder.resolve(), before, told)
        try:
            work()
            code = 0
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(told, str(count()).encode())
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _count_changes(folder: Path, before: int | None, told: int) -> Callable[[], int]:
    """Count this process's changes from now on, and kill it before one of them; gives what reads the count."""
    lock, made = Lock(), 0

    def count(path: object) -> None:
        nonlocal made
        if not _within(path, folder):
            return
        with lock:
            made += 1
            if made == before:
                real_write(told, str(made).encode())
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = any(one in mode for one in "wax+") if isinstance(mode, str) else bool(flags & _WRITING)
            if writes:
                count(path)
        elif event in _EVENTS:
            count(arguments[0])

    real_write = os.write
    sys.addaudithook(audit)
    for name in _CALLS:
        _announce(name, count)
    return lambda: made


def _announce(name: str, count: Callable[[object], None]) -> None:
    """Count calls of a function of os that takes a file descriptor first."""
    real = getattr(os, name)

    def counted(descriptor: int, *rest: Any) -> Any:
        count(descriptor)
        return real(descriptor, *rest)

    setattr(os, name, counted)


def _within(path: object, folder: Path) -> bool:
    """Whether a path or a descriptor leads into a folder."""
    try:
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]  # what is no path is a TypeError
    except (OSError, TypeError):
        return False
    return Path(name).is_relative_to(folder)
