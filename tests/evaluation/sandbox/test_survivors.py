"""However the parent ends, nothing of a candidate is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.candidate import Candidate
from qconv.evaluation.sandbox.limits import Limits

PARENT = """
import threading, time
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.judge import Check, judge
from qconv.evaluation.sandbox.limits import Limits

check = Check("def check(candidate): candidate()", "f")
programs = ["def f():\\n while True: pass", "import time\\ndef f(): time.sleep(600)"]
for program in programs:
    arguments = (Bubblewrap.find(), check, program, Limits(cpu_seconds=300, wall_seconds=600))
    threading.Thread(target=judge, args=arguments, daemon=True).start()
time.sleep(600)
"""


def parents() -> dict[int, int]:
    """The parent of every process that runs; a zombie that nobody has waited for does not run."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, parent = (entry / "stat").read_text().rpartition(") ")[2].split()[:2]
                if state != "Z":
                    found[int(entry.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    """The children of a process, theirs, and so on."""
    found, known = {pid}, parents()
    while more := {child for child, parent in known.items() if parent in found} - found:
        found |= more
    return found - {pid}


def survivors(family: set[int], seconds: float = 5.0) -> set[int]:
    """Those that run after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := family & parents().keys()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killing_the_parent_leaves_no_process(backend: Bubblewrap, number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT])
    try:
        # Two candidates of four processes each: the guard, bwrap outside, its init inside, the interpreter.
        deadline = time.monotonic() + 30
        family: set[int] = set()
        while len(family) < 8 and time.monotonic() < deadline:
            time.sleep(0.1)
            family = descendants(parent.pid)
        assert len(family) == 8
        time.sleep(0.3)  # the candidates are at work
        parent.send_signal(number)
        parent.wait(10)
        assert not survivors(family)
    finally:
        parent.kill()
        parent.wait()


def test_leaving_a_candidate_ends_all_its_processes(backend: Bubblewrap) -> None:
    others = descendants(os.getpid())  # of other tests: a resource tracker lives as long as the interpreter
    with Candidate(backend, Limits()) as candidate:
        candidate.load("def f(): return 1", "f")
        family = descendants(os.getpid()) - others
        assert len(family) >= 4
    assert not survivors(family)


DEAF = """
import subprocess, time
from qconv.evaluation.sandbox.guard import Guard

guard = Guard()
subprocess.Popen(["sh", "-c", "sleep 600 & wait"], process_group=guard.group)
print(flush=True)
time.sleep(600)
"""


def test_the_guard_ends_processes_that_do_not_notice_their_parents_death() -> None:
    # bwrap's child is such a process for some milliseconds: without the guard, a kill then leaves it for ever.
    parent = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    time.sleep(0.2)
    family = descendants(parent.pid)
    assert len(family) == 3  # the guard, the shell, its sleep
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert not survivors(family)


STARTING = """
import random, time
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.candidate import Candidate
from qconv.evaluation.sandbox.limits import Limits

print(flush=True)
while True:
    with Candidate(Bubblewrap.find(), Limits()):
        pass
"""


def test_killing_the_parent_while_a_sandbox_starts_leaves_no_process(backend: Bubblewrap) -> None:
    # Without the guard about one kill in twenty leaves something.
    for attempt in range(10):
        parent = subprocess.Popen([sys.executable, "-c", STARTING], stdout=subprocess.PIPE)
        assert parent.stdout is not None
        parent.stdout.readline()
        time.sleep(0.006 * attempt)
        parent.send_signal(signal.SIGSTOP)
        family = descendants(parent.pid)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert not survivors(family)
