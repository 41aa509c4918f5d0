"""The task ``humaneval``: pass@k of a build, and problem by problem what it lost and gained against its reference."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from qconv.chat.templates import ChatTemplates
from qconv.checkpoint.tokenizer import rendered_bos
from qconv.evaluation.engines.base import Prompt, RefusingEngine
from qconv.evaluation.humaneval.dataset import SHA256, Problem, load_problems
from qconv.evaluation.humaneval.flips import flips
from qconv.evaluation.humaneval.prompts import Message, Render, render_prompt
from qconv.evaluation.humaneval.run import Outcome, run
from qconv.evaluation.humaneval.samples import Sample
from qconv.evaluation.humaneval.settings import HumanEvalSettings
from qconv.evaluation.kept_files import store_json
from qconv.evaluation.record import Item, Metric, Task
from qconv.evaluation.sandbox.backends import find_backend
from qconv.evaluation.sandbox.candidate import Backend
from qconv.evaluation.statistics import ratio_interval, wilson
from qconv.evaluation.tasks import Bench, Subject
from qconv.runtime.tokenizer import load_tokenizer

SETTINGS = HumanEvalSettings
JUDGING = 2
"""Raised when answers may be judged otherwise than before: a build is not compared with verdicts of older rules."""


def measure(settings: HumanEvalSettings, bench: Bench) -> Task:
    """Let the build answer, and the reference unless its answers are known.

    Raises:
        NoSandboxError: nothing here can confine model-written code.
        MissingPackageError: the problems are not installed.
        IncapableEngineError: an engine cannot generate.
        SandboxError: the sandbox failed its proof.
        EngineError: an engine failed.
    """
    start = time.monotonic()
    backend, problems = find_backend(), load_problems()[: settings.problems]
    render = _renderer(bench.tokenizer_folder()) if settings.prompt == "chat" else None
    known = None
    if bench.reference is not None:
        known = _reference(settings, bench, bench.reference, problems, backend, render)
        bench.reference.close()  # one model at a time in memory
    bench.log(f"{settings.name}: {len(problems)} problems, {settings.samples} answers each")
    outcome = run(
        bench.build.engine,
        problems,
        settings,
        bench.work,
        backend=backend,
        seed=bench.seed,
        render=render,
        progress=bench.progress,
    )
    metrics = _metrics(settings, outcome)
    details: dict[str, JsonValue] = {
        "data_set": SHA256,
        "statuses": {str(status): count for status, count in outcome.statuses().items()},
        "unjudged": list(outcome.unjudged()),
        "generation": _generation(settings, bench),
    }
    if known is not None:
        metrics |= {f"reference.{name}": metric for name, metric in _metrics(settings, known).items()}
        changed = flips(known.counts(), outcome.counts())
        details |= {"lost": list(changed.lost), "gained": list(changed.gained)}
    prompts = {problem.task_id: render_prompt(problem, settings.prompt, render).text for problem in problems}
    answers = {"answers": store_json(bench.folder, _answers(prompts, outcome, known))}
    return Task(
        name=settings.name,
        kind=settings.kind,
        inputs_sha256=outcome.prompts_sha256(),
        source=f"HumanEval, {settings.prompt} prompts, {settings.samples} answers each, {_chosen(settings, bench)}",
        unit="problem",
        settings=json.loads(settings.model_dump_json()),
        metrics=metrics,
        items=_items(outcome),
        reference_items=() if known is None else _items(known),
        files=answers,
        details=details,
        engine=dict(bench.build.engine.identity),
        seconds=round(time.monotonic() - start, 3),
    )


def _generation(settings: HumanEvalSettings, bench: Bench) -> JsonValue:
    """The settings that decided the build's answers, and those that its server refused to be told."""
    engine = bench.build.engine
    found: dict[str, JsonValue] = json.loads(json.dumps(settings.sampling(bench.seed).settings()))
    if isinstance(engine, RefusingEngine):
        found["refused"] = list(engine.refused)
        if engine.refused:
            listed = ", ".join(engine.refused)
            bench.log(f"{settings.name}: the server refuses {listed}: whatever it has for them is applied")
    return found


def _chosen(settings: HumanEvalSettings, bench: Bench) -> str:
    """How tokens were chosen, for people."""
    sampled = f"sampled at temperature {settings.temperature:g}, top_p {settings.top_p:g}"
    chosen = sampled if settings.temperature > 0.0 else "greedy"
    engine = bench.build.engine
    refused = engine.refused if isinstance(engine, RefusingEngine) else ()
    return f"{chosen} but for {', '.join(refused)}, which the server refuses to be told" if refused else chosen


def _reference(
    settings: HumanEvalSettings,
    bench: Bench,
    subject: Subject,
    problems: Sequence[Problem],
    backend: Backend,
    render: Render | None,
) -> Outcome:
    """The reference's answers: in the cache, by everything that decides them."""
    key: dict[str, JsonValue] = {
        "artifact": subject.artifact.sha256,
        "settings": json.loads(settings.model_dump_json(exclude={"name", "k"})),
        "prompts": [
            hashlib.sha256(render_prompt(problem, settings.prompt, render).text.encode()).hexdigest()
            for problem in problems
        ],
        "data set": SHA256,
        "judging": JUDGING,
        "engine": dict(subject.engine.identity),
        "seed": bench.seed,
    }
    entry = bench.cache.entry("humaneval", key)
    bench.log(f"{settings.name}: the reference's answers")
    with entry.held():
        return run(
            subject.engine,
            problems,
            settings,
            entry.path,
            backend=backend,
            seed=bench.seed,
            render=render,
            progress=bench.progress,
        )


def _renderer(model_dir: Path) -> Render:
    """The reference's chat template, rendering each chat once."""
    tokenizer = load_tokenizer(model_dir)
    chats, known = ChatTemplates(tokenizer, model_dir), dict[str, Prompt]()

    def render(messages: Sequence[Message]) -> Prompt:
        key = json.dumps(messages)
        if key not in known:
            text = chats.render(messages, answer=True)
            known[key] = Prompt(text, True, tuple(messages), rendered_bos(tokenizer, text))
        return known[key]

    return render


def _metrics(settings: HumanEvalSettings, outcome: Outcome) -> dict[str, Metric]:
    """pass@k: with Wilson's interval where each problem has one answer, else resampled over problems."""
    counts = list(outcome.counts().values())
    found = {}
    for k in settings.k:
        value = outcome.pass_at(k)
        low, high = None, None
        if value is not None and k == 1 and counts:
            passed = np.array([one / total for total, one in counts], dtype=np.float64)
            if settings.samples == 1:
                interval = wilson(float(passed.sum()), len(passed))
            else:
                interval = ratio_interval(passed, np.ones(len(passed)))
            low, high = interval.low, interval.high
        found[f"pass@{k}"] = Metric(value=value, low=low, high=high, unit="share", better="higher", units=len(counts))
    return found


def _items(outcome: Outcome) -> tuple[Item, ...]:
    """Judged problems alone: what could not be judged says nothing of the model."""
    return tuple(
        Item(name=name, values={"samples": float(total), "passed": float(passed)})
        for name, (total, passed) in outcome.counts().items()
    )


def _answers(prompts: dict[str, str], outcome: Outcome, known: Outcome | None) -> list[JsonValue]:
    """The first answer to every problem, the build's and the reference's."""
    theirs = {} if known is None else {one.task_id: one for one in known.samples if one.sample == 0}
    rows: list[JsonValue] = []
    for one in outcome.samples:
        if one.sample == 0:
            other = theirs.get(one.task_id)
            row: dict[str, JsonValue] = {"problem": one.task_id, "prompt": prompts[one.task_id], "build": _side(one)}
            rows.append(row if other is None else {**row, "reference": _side(other)})
    return rows


def _side(sample: Sample) -> JsonValue:
    return {
        "status": str(sample.status),
        "reason": sample.reason,
        "text": sample.text,
        "tokens": list(sample.tokens),
        "finish": sample.finish,
    }
