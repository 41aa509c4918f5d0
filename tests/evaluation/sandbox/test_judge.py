"""Who decides, what a verdict says, and whose fault it is."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass, field

import pytest

from qconv.evaluation.sandbox import judge as judge_module
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.candidate import Candidate
from qconv.evaluation.sandbox.inside import hidden_folders
from qconv.evaluation.sandbox.judge import ATTEMPTS, Check, judge
from qconv.evaluation.sandbox.limits import Limits
from qconv.evaluation.sandbox.verdict import CandidateFailed, Status, Verdict

LIMITS = Limits(cpu_seconds=1, wall_seconds=6.0)
ECHO = "def echo(*values, **named): return [list(values), named]"


def check(body: str, entry_point: str = "f") -> Check:
    return Check(f"def check(candidate):\n    {body}\n", entry_point)


@dataclass(frozen=True, slots=True)
class Broken:
    """A sandbox that fails to start a number of times; then it works."""

    backend: Bubblewrap
    failures: int
    command: tuple[str, ...] = ("sh", "-c", "echo setting up uid map: Permission denied >&2; exit 1")
    starts: list[int] = field(default_factory=list)
    name: str = "broken"

    def start(self, limits: Limits, group: int) -> subprocess.Popen[bytes]:
        self.starts.append(1)
        if len(self.starts) > self.failures:
            return self.backend.start(limits, group)
        pipe = subprocess.PIPE
        command = list(self.command)
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, process_group=group)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "_PAUSE_SECONDS", 0.01)


def test_arguments_and_results_travel(backend: Bubblewrap) -> None:
    with Candidate(backend, LIMITS) as candidate:
        candidate.load(ECHO, "echo")
        assert candidate.call(1, (2.5, None), key={"a": {1, 2}}) == [[1, (2.5, None)], {"key": {"a": {1, 2}}}]
        assert candidate.call() == [[], {}]


def test_a_large_argument_travels(backend: Bubblewrap) -> None:
    # Larger than a pipe holds, so that sending has to wait for the other side.
    with Candidate(backend, LIMITS) as candidate:
        candidate.load("def f(x): return len(x)", "f")
        assert candidate.call("x" * 500_000) == 500_000


def test_state_is_kept_between_calls_and_not_between_candidates(backend: Bubblewrap) -> None:
    program = "calls = []\ndef f():\n    calls.append(1)\n    return len(calls)"
    for _ in range(2):
        with Candidate(backend, LIMITS) as candidate:
            candidate.load(program, "f")
            assert [candidate.call(), candidate.call()] == [1, 2]


def test_the_check_decides(backend: Bubblewrap) -> None:
    assert judge(backend, check("assert candidate(2) == 4"), "def f(x): return x * x", LIMITS) == Verdict(Status.PASS)
    wrong = judge(backend, check("assert candidate(3) == 4"), "def f(x): return x * x", LIMITS)
    assert wrong == Verdict(Status.FAIL, "a wrong result")


def test_the_check_never_enters_the_sandbox(backend: Bubblewrap) -> None:
    program = "import gc\ndef f(x): return any('s3' + x in str(thing) for thing in gc.get_objects())"
    assert judge(backend, check("assert candidate('cret') == (not 's3cret')"), program, LIMITS).status is Status.PASS


def test_a_check_that_swallows_the_failure_does_not_pass_it(backend: Bubblewrap) -> None:
    swallowing = Check(
        "def check(candidate):\n    try: candidate(1)\n    except Exception: pass\n"
        "    try: assert candidate(1) == 1\n    except Exception: pass\n",
        "f",
    )
    program = "calls = []\ndef f(x):\n    calls.append(1)\n    if len(calls) == 1: raise KeyError\n    return 1"
    verdict = judge(backend, swallowing, program, LIMITS)
    assert (verdict.status, verdict.reason) == (Status.FAIL, "KeyError: ")


def test_a_result_of_the_wrong_type_is_the_candidates_fault(backend: Bubblewrap) -> None:
    verdict = judge(backend, check("assert abs(candidate(1) - 1) < 1"), "def f(x): return 'one'", LIMITS)
    assert verdict == Verdict(Status.FAIL, "a result that the check cannot use: TypeError")


def test_a_failure_is_final(backend: Bubblewrap) -> None:
    with Candidate(backend, LIMITS) as candidate:
        candidate.load("def f(x): return 1 // x", "f")
        with pytest.raises(CandidateFailed, match="ZeroDivisionError"):
            candidate.call(0)
        with pytest.raises(CandidateFailed, match="ZeroDivisionError"):
            candidate.call(1)


def test_reasons_are_printable(backend: Bubblewrap) -> None:
    program = "def f(x): raise ValueError('\\x1b[2J\\x07 gone ' + 'x' * 10_000)"
    reason = judge(backend, check("candidate(1)"), program, LIMITS).reason
    assert reason.isprintable()
    assert reason.startswith("ValueError: ")
    assert len(reason) <= 300


def test_a_check_that_cannot_be_executed_is_not_the_candidates_fault(backend: Bubblewrap) -> None:
    verdict = judge(backend, Check("def check(", "f"), "def f(): pass", LIMITS)
    assert verdict.status is Status.INFRASTRUCTURE
    assert "SyntaxError" in verdict.reason


def test_a_sandbox_that_does_not_start_is_tried_again(backend: Bubblewrap) -> None:
    broken = Broken(backend, failures=ATTEMPTS - 1)
    assert judge(broken, check("assert candidate() == 1"), "def f(): return 1", LIMITS).status is Status.PASS
    assert len(broken.starts) == ATTEMPTS


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("sh", "-c", "echo setting up uid map: Permission denied >&2; exit 1"), "uid map: Permission denied"),
        (("sh", "-c", "echo '{}'; sleep 60"), "first words"),
        (("sh", "-c", "echo x; sleep 60"), "did not start"),
        (("sleep", "60"), "did not start"),
    ],
)
def test_a_sandbox_that_never_starts_says_why(backend: Bubblewrap, command: tuple[str, ...], reason: str) -> None:
    limits = Limits(start_seconds=0.3)
    verdict = judge(Broken(backend, 9, command), check("candidate()"), "def f(): return 1", limits)
    assert verdict.status is Status.INFRASTRUCTURE
    assert reason in verdict.reason


def test_a_backend_that_cannot_be_executed_says_why() -> None:
    verdict = judge(Bubblewrap("/nonexistent/bwrap"), check("candidate()"), "def f(): return 1", LIMITS)
    assert verdict.status is Status.INFRASTRUCTURE
    assert "No such file" in verdict.reason


def test_random_checks_draw_the_same_numbers_every_time(backend: Bubblewrap) -> None:
    drawing = Check(
        "def check(candidate):\n    import random\n    from random import randint\n"
        "    assert candidate(randint(0, 10**9), random.random(), random.Random(5).random()) == 0\n",
        "f",
    )
    program = "def f(*drawn): raise ValueError(drawn)"
    first, second = (judge(backend, drawing, program, LIMITS) for _ in range(2))
    assert first == second
    assert "ValueError: (" in first.reason


def test_strings_in_sets_have_one_order(backend: Bubblewrap) -> None:
    program = "def f(): return list({str(i) for i in range(50)})"
    orders = []
    for _ in range(2):
        with Candidate(backend, LIMITS) as candidate:
            candidate.load(program, "f")
            orders.append(candidate.call())
    assert orders[0] == orders[1]


def test_a_models_own_tests_do_not_run(backend: Bubblewrap) -> None:
    program = "def f(): return 1\nif __name__ == '__main__':\n    raise SystemExit(1)"
    assert judge(backend, check("assert candidate() == 1"), program, LIMITS).status is Status.PASS


def test_killing_everything_reaches_no_other_candidate(backend: Bubblewrap) -> None:
    killer = "import os\ndef f():\n    os.kill(-1, 9)\n    os.kill(1, 9)\n    os.kill(os.getppid(), 9)\n    os._exit(0)"
    with Candidate(backend, LIMITS) as other:
        other.load("def f(): return 1", "f")
        assert judge(backend, check("candidate()"), killer, LIMITS).status is Status.FAIL
        assert other.call() == 1


def test_candidates_run_beside_each_other(backend: Bubblewrap) -> None:
    verdicts: list[Verdict] = []
    body = check("assert candidate() == 1")
    program = "import time\ndef f():\n    time.sleep(1)\n    return 1"
    threads = [
        threading.Thread(target=lambda: verdicts.append(judge(backend, body, program, LIMITS))) for _ in range(4)
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.status for verdict in verdicts] == [Status.PASS] * 4
    assert time.monotonic() - began < 3.5  # one after the other would take 4


def test_processor_time_decides_and_not_the_clock(backend: Bubblewrap) -> None:
    verdict = judge(backend, check("candidate()"), "def f():\n    while True: pass", Limits(1, wall_seconds=60.0))
    assert verdict == Verdict(Status.TIMEOUT, "more than 1 s of processor time")
    slow = judge(backend, check("candidate()"), "import time\ndef f(): time.sleep(60)", Limits(1, wall_seconds=0.5))
    assert slow == Verdict(Status.TIMEOUT, "no answer within 0.5 s")


def test_installed_packages_are_hidden(backend: Bubblewrap) -> None:
    assert hidden_folders(), "an interpreter has a folder for packages, even if it is empty"
    with Candidate(backend, LIMITS) as candidate:
        candidate.load("import os\ndef f(folders): return [os.listdir(folder) for folder in folders]", "f")
        assert candidate.call(list(hidden_folders())) == [[] for _ in hidden_folders()]


def test_every_limit_is_in_force_and_final(backend: Bubblewrap) -> None:
    limits = Limits(cpu_seconds=3, memory=256 << 20)
    program = "import resource\ndef f(name): return resource.getrlimit(getattr(resource, name))"
    with Candidate(backend, limits) as candidate:
        candidate.load(program, "f")
        assert {name: candidate.call(name) for name in limits.resources()} == limits.resources()
    assert limits.resources()["RLIMIT_CPU"] == (3, 4)
    assert limits.resources()["RLIMIT_AS"] == (256 << 20, 256 << 20)
