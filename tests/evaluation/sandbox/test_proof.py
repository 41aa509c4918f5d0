"""A sandbox that lets one forgery through, or in which nothing works, is not used."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from qconv.errors import SandboxError
from qconv.evaluation.sandbox import forgeries, judge, proof
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.forgeries import FORGERIES
from qconv.evaluation.sandbox.forgery import CHECK
from qconv.evaluation.sandbox.judge import Check
from qconv.evaluation.sandbox.limits import Limits
from qconv.evaluation.sandbox.proof import Solution, prove

QUICK = tuple(item for item in FORGERIES if item.name in ("a child process", "a lazy result", "the user database read"))


@dataclass(frozen=True, slots=True)
class Leaky:
    """bubblewrap with the whole machine in view and no filter: escapes succeed there."""

    executable: str
    name: str = "leaky"

    def start(self, limits: Limits, group: int) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        options = ["--dev-bind", "/", "/", "--die-with-parent"]
        program = (
            "from qconv.evaluation.sandbox import guest\n"
            "guest._limit_files = guest._deny_calls = lambda _: None\n"
            "guest.main()"
        )
        guest = [sys.executable, "-c", program]
        command = [self.executable, *options, *guest]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, process_group=group)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forgery is tested by itself elsewhere."""
    monkeypatch.setattr(proof, "FORGERIES", QUICK)
    monkeypatch.setattr(judge, "_PAUSE_SECONDS", 0.01)


def test_a_good_sandbox_proves_itself(backend: Bubblewrap) -> None:
    seen: list[tuple[int, int]] = []
    solutions = [Solution("HumanEval/0", "def double(x): return x + x", CHECK)]
    made = prove(backend, solutions, Limits(), lambda _, done, total: seen.append((done, total)))
    assert (made.backend, made.forgeries, made.solutions) == (backend.name, 3, 1 + len(forgeries.HONEST))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))


def test_a_leaky_sandbox_is_found_out(backend: Bubblewrap) -> None:
    with pytest.raises(SandboxError, match=r"leaky failed its proof: the forgery '.*' ended with 'pass'") as caught:
        prove(Leaky(backend.executable), [], Limits())
    assert caught.value.exit_code == 6


def test_a_right_solution_that_fails_is_found_out(backend: Bubblewrap) -> None:
    solution = Solution("HumanEval/0", "def f(): return 1", Check("def check(candidate): assert candidate() == 2", "f"))
    with pytest.raises(SandboxError, match=r"HumanEval/0, which is right, ended with 'fail' \(a wrong result\)"):
        prove(backend, [solution], Limits())


def test_a_sandbox_that_does_not_start_is_found_out() -> None:
    with pytest.raises(SandboxError, match=r"bubblewrap does not work here: .*No such file") as caught:
        prove(Bubblewrap("/nonexistent/bwrap"), [], Limits())
    assert caught.value.exit_code == 6
