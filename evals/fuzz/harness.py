"""Runs mutants, each in a process of its own forked from one that has imported everything.

A mutant is well met if the process ends by itself, soon, in little memory, with a documented exit code and without a
traceback. That covers being taken as good: a changed name or number may be as valid as the one before.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evals.fuzz.mutations import Mutation
from qconv.cli.main import qconv

SECONDS = 30.0
"""After which it counts as a hang. Of processor time, since the machine may be busy."""
MEMORY = 2 * 2**30
"""Bytes of resident memory."""
CODES = frozenset(range(7))
"""Documented exit codes."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parser, and how it is reached.

    Attributes:
        name: The parser's.
        prepare: Makes the sound input in a folder.
        file: What is damaged, relative to the folder.
        mutations: How.
        run: Reads it; as a command of qconv's would, errors included.
    """

    name: str
    prepare: Callable[[Path], None]
    file: str
    mutations: Sequence[Mutation]
    run: Callable[[Path], object]


@dataclass(slots=True)
class Score:
    """Of one target.

    Attributes:
        mutants: That ran.
        codes: How often each exit code came.
        slowest: Seconds of processor time.
        largest: Bytes of resident memory.
        faults: Sentences, each with the seed that makes it again.
    """

    mutants: int = 0
    codes: dict[int, int] = field(default_factory=dict)
    slowest: float = 0.0
    largest: int = 0
    faults: list[str] = field(default_factory=list)


def command(*arguments: str) -> Callable[[Path], object]:
    """A target's run: that command, in which ``{}`` is the folder."""
    return lambda folder: qconv.main([one.replace("{}", str(folder)) for one in arguments], prog_name="qconv")


def score(target: Target, mutants: int, seed: int, kept: Path) -> Score:
    """Run a target's mutants.

    Args:
        target: Which.
        mutants: How many.
        seed: Of the first; each has its own.
        kept: A folder where inputs that find a fault are kept.
    """
    result = Score()
    with tempfile.TemporaryDirectory(prefix="qconv-fuzz-") as name:
        sound = Path(name) / "sound"
        sound.mkdir()
        # In a process of its own as well: a fork of one whose OpenMP has started threads can hang.
        code, said, _, _ = _run(target.prepare, sound, SECONDS * 10)
        if code:
            result.faults.append(f"the sound input cannot be made: {said[-600:]}")
            return result
        data = (sound / target.file).read_bytes()
        with _copy(target, sound, data) as folder:
            code, said, _, _ = _run(target.run, folder, SECONDS)
        if code not in (0, 3, 4):  # judged, and found wanting
            result.faults.append(f"the sound input ends with {code}: {said[-300:]}")
        for number in range(seed, seed + mutants):
            with _copy(target, sound, damaged(target, data, number)) as folder:
                code, said, seconds, memory = _run(target.run, folder, SECONDS)
                result.mutants += 1
                result.codes[code] = result.codes.get(code, 0) + 1
                result.slowest, result.largest = max(result.slowest, seconds), max(result.largest, memory)
                fault = _fault(code, said, seconds, memory)
                if fault:
                    result.faults.append(f"seed {number}: {fault}")
                    kept.mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder / target.file, kept / f"{target.name.replace(' ', '-')}-{number}")
                    (kept / f"{target.name.replace(' ', '-')}-{number}.log").write_text(said)
    return result


def damaged(target: Target, data: bytes, seed: int) -> bytes:
    """A file's bytes after one or two mutations; the same seed does the same damage."""
    source = random.Random(f"{target.name} {seed}")
    with contextlib.suppress(ValueError, struct.error, RecursionError):  # damage to damage
        for _ in range(source.choice((1, 1, 1, 2))):
            data = source.choice(target.mutations)(source, data)
    return data


@contextlib.contextmanager
def _copy(target: Target, sound: Path, data: bytes) -> Iterator[Path]:
    """A copy of the sound folder in which the target's file holds other bytes."""
    folder = sound.parent / "mutant"
    shutil.copytree(sound, folder, symlinks=True)
    (folder / target.file).write_bytes(data)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _fault(code: int, said: str, seconds: float, memory: int) -> str | None:
    if "Traceback" in said:
        return f"a traceback: {' | '.join(line.strip() for line in said.strip().splitlines()[-5:])[-600:]}"
    if code < 0:
        return f"ended by {signal.Signals(-code).name} after {seconds:.0f} s"
    if code not in CODES:
        return f"exit code {code}: {said[-300:]}"
    if memory > MEMORY:
        return f"{memory / 2**30:.1f} GiB"
    return None


def _run(function: Callable[[Path], object], folder: Path, seconds: float) -> tuple[int, str, float, int]:
    """Exit code (minus a signal), what was printed, seconds of processor time, bytes of memory."""
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            _child(function, folder, printed.fileno(), int(seconds))
        deadline = time.monotonic() + 20 * seconds
        while True:
            ended, status, usage = os.wait4(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        printed.seek(0)
        said = printed.read(1 << 20).decode(errors="replace")
    return os.waitstatus_to_exitcode(status), said, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def _child(function: Callable[[Path], object], folder: Path, printed: int, seconds: int) -> None:
    """Run, and never return."""
    code = 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, errors="replace") for number in (1, 2))
    try:
        os.chdir(folder.parent)
        function(folder)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
