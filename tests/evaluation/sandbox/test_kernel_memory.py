"""What takes kernel memory that neither limits on address space nor on bytes of files count: denied, or bounded."""

from __future__ import annotations

import errno
import os

import pytest

from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.candidate import Candidate
from qconv.evaluation.sandbox.limits import MOST_FILES, Limits
from qconv.evaluation.sandbox.seccomp import DENIED_COMMANDS, denied_calls

CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(number, *arguments):
    return ctypes.get_errno() if libc.syscall(number, *arguments) < 0 else 0
"""


def test_every_call_that_is_to_be_denied_is(backend: Bubblewrap) -> None:
    """Without arguments, so that most would do nothing; EPERM comes from the filter before anything is looked at."""
    with Candidate(backend, Limits()) as candidate:
        candidate.load(CALL, "f")
        found = {name: candidate.call(number, 0, 0, 0, 0, 0, 0) for name, number in denied_calls().items()}
        assert found == dict.fromkeys(denied_calls(), errno.EPERM)
        fcntl_number = {"x86_64": 72, "aarch64": 25}[os.uname().machine]
        commands = {name: candidate.call(fcntl_number, 2, value, 0) for name, value in DENIED_COMMANDS.items()}
        assert commands == dict.fromkeys(DENIED_COMMANDS, errno.EPERM)


@pytest.mark.parametrize(
    "make",
    [
        "open(name, 'w').close()",
        "os.mkdir(name)",
        "os.symlink('x' * 100, name)",
        "os.link('/tmp/first', name)",
        "os.mknod(name)",
    ],
)
def test_there_are_few_files_of_every_kind(backend: Bubblewrap, make: str) -> None:
    """Each kind alone took 0.4 to 0.9 GB in a candidate's four seconds of processor time."""
    program = f"""
import os
open('/tmp/first', 'w').close()
def f():
    made = 0
    while True:
        name = f'/tmp/{{made}}'
        try: {make}
        except OSError as error: return made, error.errno
        made += 1
"""
    with Candidate(backend, Limits()) as candidate:
        candidate.load(program, "f")
        made = candidate.call()
    assert made in [(count, errno.ENOSPC) for count in range(MOST_FILES)]


def test_a_folder_may_hold_files_and_they_may_go(backend: Bubblewrap) -> None:
    program = """
import os, tempfile
def f():
    for _ in range(1000):  # many times the number of files that there may be at once
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, 'x'), 'w+') as file:
                file.write('x' * 1000)
    return sorted(os.listdir('/tmp'))
"""
    with Candidate(backend, Limits()) as candidate:
        candidate.load(program, "f")
        assert candidate.call() == []
