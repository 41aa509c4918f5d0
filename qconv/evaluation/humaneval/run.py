"""A HumanEval run: prompts completed in batches, answers judged beside that, all of it kept as it comes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path

from qconv.evaluation.engines.base import Completion, Engine, Prompt
from qconv.evaluation.humaneval.dataset import SHA256, Problem
from qconv.evaluation.humaneval.estimator import mean_pass_at_k
from qconv.evaluation.humaneval.prompts import Render, program_of, render_prompt
from qconv.evaluation.humaneval.samples import Journal, Sample, storable
from qconv.evaluation.humaneval.settings import HumanEvalSettings
from qconv.evaluation.sandbox.candidate import Backend
from qconv.evaluation.sandbox.pool import JudgePool
from qconv.evaluation.sandbox.proof import Proof, prove
from qconv.evaluation.sandbox.verdict import Status, Verdict

Progress = Callable[[str, int, int], None]
_PATIENCE = 0.5
"""Seconds between looks at the progress function while answers are judged: it is where an interruption takes effect."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    Attributes:
        samples: Every sample, by problem and number.
        prompts: sha256 of each problem's prompt as rendered.
        proof: What the sandbox was tried with beforehand; None if no answer was left to judge.
    """

    samples: tuple[Sample, ...]
    prompts: Mapping[str, str]
    proof: Proof | None

    def counts(self) -> dict[str, tuple[int, int]]:
        """Of each problem how many samples were judged, and how many of them passed; only problems with any judged."""
        judged = Counter(sample.task_id for sample in self.samples if sample.judged)
        passed = Counter(sample.task_id for sample in self.samples if sample.status is Status.PASS)
        return {name: (judged[name], passed[name]) for name in self.prompts if judged[name]}

    def pass_at(self, k: int) -> float | None:
        """pass@k over the problems with at least k judged samples; None if there are none."""
        return mean_pass_at_k([count for count in self.counts().values() if count[0] >= k], k)

    def statuses(self) -> dict[Status, int]:
        """How many samples ended how."""
        found = Counter(sample.status for sample in self.samples)
        return {status: found[status] for status in Status if found[status]}

    def unjudged(self) -> tuple[str, ...]:
        """Problems with a sample that could not be judged: what is said of them is not final."""
        names = {sample.task_id for sample in self.samples if not sample.judged}
        return tuple(name for name in self.prompts if name in names)

    def prompts_sha256(self) -> str:
        """sha256 over all prompts."""
        return hashlib.sha256(json.dumps(dict(self.prompts)).encode()).hexdigest()


def run(
    engine: Engine,
    problems: Sequence[Problem],
    settings: HumanEvalSettings,
    folder: Path,
    *,
    backend: Backend,
    seed: int,
    render: Render | None = None,
    progress: Progress = lambda *_: None,
) -> Outcome:
    """Complete and judge; interrupted or killed, the same call continues with what ``folder`` holds.

    Args:
        engine: What completes.
        problems: Which problems.
        settings: How.
        folder: Where the journal is kept.
        backend: What makes sandboxes.
        seed: For sampling.
        render: Renders chats, for chat prompts.
        progress: Told (what, done, total).

    Raises:
        SandboxError: the sandbox failed its proof; no answer was judged.
        EngineError: the engine failed.
        StaleJournalError: ``folder`` holds the beginning of another run.
        OutputError: the journal cannot be written.
    """
    prompts = {problem.task_id: render_prompt(problem, settings.prompt, render) for problem in problems}
    hashes = {name: hashlib.sha256(prompt.text.encode()).hexdigest() for name, prompt in prompts.items()}
    with Journal(folder, _key(engine, settings, seed, hashes)) as journal:
        wanted = [(problem.task_id, sample) for problem in problems for sample in range(settings.samples)]
        proof = None
        if any(key not in journal.samples for key in wanted):
            solutions = [problem.solution() for problem in problems]
            proof = prove(backend, solutions, settings.limits(), progress)
            with JudgePool(backend) as pool:
                _complete(engine, problems, prompts, settings, seed, journal, pool, progress)
        return Outcome(tuple(journal.samples[key] for key in wanted), hashes, proof)


def _complete(
    engine: Engine,
    problems: Sequence[Problem],
    prompts: Mapping[str, Prompt],
    settings: HumanEvalSettings,
    seed: int,
    journal: Journal,
    pool: JudgePool,
    progress: Progress,
) -> None:
    # In tokens, so that a bar moves while a batch is decoded.
    total, sampling = len(problems) * settings.samples * settings.max_tokens, settings.sampling(seed)
    known, reached = set(journal.samples), 0
    waiting: dict[Future[Verdict], tuple[Problem, Completion]] = {}

    def collect(seconds: float | None) -> None:
        ended, _ = wait(waiting, seconds, FIRST_COMPLETED)
        for future in ended:
            problem, completion = waiting.pop(future)
            journal.add(_sample(problem, completion, future.result()))
        step(0.0)

    def step(share: float) -> None:
        nonlocal reached
        answered = len(journal.samples) + len(waiting)
        decoding = share * min(engine.rows, total / settings.max_tokens - answered)
        # The answers of a batch are handed over one by one after it.
        reached = max(reached, int((answered + decoding) * settings.max_tokens))
        progress("HumanEval", reached, total)

    for group in _groups(problems, prompts, settings.samples, engine.rows):
        # A group is completed whole or not at all: its batches, and with them its numbers, stay as they were.
        if all((problem.task_id, sample) in known for problem in group for sample in range(settings.samples)):
            continue
        for completion in engine.complete([prompts[problem.task_id] for problem in group], sampling, step):
            problem = group[completion.prompt]
            if (problem.task_id, completion.sample) not in known:
                program = program_of(problem, settings.prompt, completion.text)
                waiting[pool.submit(problem.check(), program, settings.limits())] = (problem, completion)
            collect(0.0)
    while waiting:
        collect(_PATIENCE)


def _groups(
    problems: Sequence[Problem], prompts: Mapping[str, Prompt], samples: int, rows: int
) -> Iterator[list[Problem]]:
    """Problems with prompts of like length, the least number whose samples fill whole batches."""
    ordered = sorted(problems, key=lambda problem: len(prompts[problem.task_id].text))
    size = rows // gcd(rows, samples)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _sample(problem: Problem, completion: Completion, verdict: Verdict) -> Sample:
    return Sample(
        task_id=problem.task_id,
        sample=completion.sample,
        text=storable(completion.text),
        tokens=tuple(completion.tokens),
        finish=completion.finish,
        status=verdict.status,
        reason=verdict.reason,
    )


def _key(engine: Engine, settings: HumanEvalSettings, seed: int, prompts: Mapping[str, str]) -> dict[str, str]:
    """What decides a sample and its status."""

    def digest(value: object) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    return {
        "data set": SHA256,
        "prompts": digest(dict(prompts)),
        "sampling": settings.sampling(seed).digest(),
        "limits": digest(asdict(settings.limits())),
        "engine": digest(dict(engine.identity)),
    }
