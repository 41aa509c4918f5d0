"""A run: what is asked for, measured task by task, judged, and recorded. Interrupted, the same request continues."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qconv import __version__
from qconv.checkpoint.writer import output_errors
from qconv.errors import UnmeasurableError, UsageError
from qconv.evaluation import text_task, tokenizers
from qconv.evaluation.artifacts import check_integrity, endpoint, identify
from qconv.evaluation.cache import Cache, Entry
from qconv.evaluation.engines import is_endpoint, open_engine
from qconv.evaluation.engines.base import Engine
from qconv.evaluation.gates import BuildClass, GateFile, class_of, load_gates, rerun_merged, verdict
from qconv.evaluation.judging import judge
from qconv.evaluation.record import Artifact, Gate, Run, Task, Unmeasured, parse_task, write_run
from qconv.evaluation.reference import Kept
from qconv.evaluation.run_folder import begin, device_facts, enter, kept_report, run_key, versions
from qconv.evaluation.suites import Suite, TextSettings
from qconv.evaluation.tasks import Bench, Kind, Log, Progress, Subject, settings_of
from qconv.folders.journal import locked
from qconv.folders.ownership import WORK_FOLDER, own_folder, remove_claimed

TASK_NAME = "task.json"


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be evaluated.

    Attributes:
        build: A checkpoint, a build, or GGUF.
        reference: The unquantized checkpoint that it is measured against; None for nothing.
        suite: The suite.
        suite_name: What it is called.
        engine: What computes the build.
        device: On which torch device.
        out: The run's folder.
        cache: Where references' logits are kept.
        gates: What judges; None: the run is only measured.
        baseline: The run of the last accepted build; None for none.
        command: What reproduces the run, for the record.
    """

    build: Path
    reference: Path | None
    suite: Suite
    suite_name: str
    out: Path
    cache: Cache
    engine: str = "local"
    device: str = "cpu"
    gates: str | None = None
    baseline: Run | None = None
    command: tuple[str, ...] = ()


def evaluate(request: Request, *, restart: bool = False, progress: Progress, log: Log) -> Run:
    """Measure and judge a build; writes the record into ``request.out``. Tasks that cannot be measured are named there.

    Raises:
        UsageError: suite, gates, engine or corpus do not exist or do not fit.
        UnmeasurableError: no task of the suite can be measured here.
        StaleJournalError: ``out`` holds the beginning of another run.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        EngineError: an engine failed.
    """
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    kinds = settings_of(request.suite, request.suite_name)
    judges = None if request.gates is None else load_gates(request.gates)
    log(f"{request.build}: hashing")
    build = identified(request)
    build_class = None if judges is None else class_of(judges, build)
    reference = None if request.reference is None else identify(request.reference)
    with output_errors(request.out):
        request.out.mkdir(parents=True, exist_ok=True)
    with locked(request.out):
        enter(request.out, restart)
        work = request.out / WORK_FOLDER
        subjects = subjects_of(request, build, reference)
        if restart:
            _require_texts(kinds, _bench(request, *subjects, progress, log, work))
        begin(request.out, run_key(request.suite, build, reference, subjects[0].engine), restart)
        checked = judges is not None and build.kind != "endpoint"
        gates = [integrity_gate(build, reference, progress)] if checked else []
        tasks: list[Task] = []
        unmeasured: list[Unmeasured] = []
        if all(gate.status == "pass" for gate in gates):
            tasks, unmeasured = _all_measured(kinds, partial(_bench, request, *subjects, progress, log), work)
            if judges is not None and build_class is not None:
                found = judge(tasks, build_class, judges, request.baseline, unmeasured)
                found = _rerun(found, kinds, tasks, build_class, judges, request, subjects, progress, log)
                gates += found
        for subject in subjects:
            if subject is not None:
                subject.close()
        run = Run(
            qconv=__version__,
            started=started.isoformat(timespec="milliseconds"),
            seconds=round(time.monotonic() - clock, 3),
            command=request.command,
            build=build,
            reference=reference,
            build_report=kept_report(request.build, request.out),
            suite=request.suite_name,
            suite_sha256=request.suite.digest(),
            engine=dict(subjects[0].engine.identity),
            reference_engine={} if subjects[1] is None else dict(subjects[1].engine.identity),
            versions=versions(),
            device=device_facts(request.device),
            seed=request.suite.seed,
            tasks=tuple(tasks),
            unmeasured=tuple(unmeasured),
            gates=tuple(gates),
            gates_name=request.gates,
            gates_sha256=None if judges is None else judges.digest(),
            build_class=None if build_class is None else build_class.name,
            baseline=None if request.baseline is None else request.baseline.digest,
            verdict=verdict(gates, unmeasured),
        )
        write_run(request.out, run)
        remove_claimed(work)
    return run


def _require_texts(kinds: Sequence[tuple[Kind, object]], bench: Bench) -> None:
    """Check that the suite's texts can be read, before a run that is there is discarded.

    Raises:
        UsageError: one cannot.
    """
    for _, settings in kinds:
        if isinstance(settings, TextSettings):
            with contextlib.suppress(UnmeasurableError):  # then that task is not measured, which is no failure
                text_task.require_text(settings, bench)


def keep_reference(
    model: Path, suite: Suite, suite_name: str, cache: Cache, *, device: str, progress: Progress, log: Log
) -> list[Kept]:
    """Compute and keep what the text tasks of a suite need of a reference; a row for each.

    Raises:
        UsageError: the suite has no such task, or a corpus cannot be read.
        EngineError: the engine failed.
    """
    log(f"{model}: hashing")
    request = Request(model, model, suite, suite_name, Path(), cache, device=device)
    subjects = subjects_of(request, identify(model), identify(model))
    bench = _bench(request, *subjects, progress, log, Path())
    rows = [
        text_task.keep_reference(settings, bench)
        for kind, settings in settings_of(suite, suite_name)
        if isinstance(settings, TextSettings)
    ]
    if not rows:
        raise UsageError(f"suite {suite_name} has no task that needs a reference's logits.")
    return rows


def _all_measured(
    kinds: Sequence[tuple[Kind, Any]], bench_in: Callable[[Path], Bench], work: Path
) -> tuple[list[Task], list[Unmeasured]]:
    """Every task that can be measured here, and why the others cannot.

    Raises:
        UnmeasurableError: none of them can.
    """
    tasks: list[Task] = []
    problems: list[UnmeasurableError] = []
    unmeasured: list[Unmeasured] = []
    for kind, settings in kinds:
        bench = bench_in(work / f"task-{settings.name}")
        try:
            tasks.append(_measured(kind, settings, bench))
        except UnmeasurableError as error:
            bench.log(f"{settings.name}: not measured: {error}")
            problems.append(error)
            one = Unmeasured(name=settings.name, kind=settings.kind, reason=error.message, remedy=error.hint)
            unmeasured.append(one)
    if problems and not tasks:
        raise problems[0]
    return tasks, unmeasured


def _measured(kind: Kind, settings: object, bench: Bench) -> Task:
    """A task of this run, from its work folder if it was finished before an interruption."""

    def make() -> bytes:
        return kind.measure(settings, bench).model_dump_json().encode()

    own_folder(bench.work)
    entry = Entry(bench.work)
    return parse_task(entry.bytes_of(TASK_NAME, make), str(entry.path / TASK_NAME), f"Remove {entry.path / TASK_NAME}.")


def _rerun(
    found: tuple[Gate, ...],
    kinds: Sequence[tuple[Kind, Any]],
    tasks: list[Task],
    build_class: BuildClass,
    judges: GateFile,
    request: Request,
    subjects: tuple[Subject, Subject | None],
    progress: Progress,
    log: Log,
) -> tuple[Gate, ...]:
    """Measure once more, with the model loaded anew, what failed."""
    failed = {gate.task for gate in found if gate.status == "fail"}
    if not failed:
        return found
    log(f"failing gates are measured again: {', '.join(sorted(map(str, failed)))}")
    subjects[0].close()
    measuring = {settings.name: (kind, settings) for kind, settings in kinds}
    again = []
    for task in tasks:
        if task.name not in failed:
            again.append(task)
            continue
        work = request.out / WORK_FOLDER / f"again-{task.name}"
        again.append(_measured(*measuring[task.name], _bench(request, *subjects, progress, log, work)))
    return rerun_merged(found, judge(again, build_class, judges, request.baseline))


def _bench(
    request: Request, build: Subject, reference: Subject | None, progress: Progress, log: Log, work: Path
) -> Bench:
    return Bench(
        build=build,
        reference=reference,
        model_dir=request.reference or request.build,
        cache=request.cache,
        folder=request.out,
        work=work,
        seed=request.suite.seed,
        noise=request.suite.noise,
        progress=progress,
        log=log,
    )


def subjects_of(request: Request, build: Artifact, reference: Artifact | None) -> tuple[Subject, Subject | None]:
    """The build on the engine that was asked for; the reference on the local one, or streamed if the build is."""

    def opener(name: str, path: Path, dtype: str | None, rows: int | None, *, round_inputs: bool = False) -> Engine:
        return open_engine(
            name,
            path,
            dtype=dtype or _dtype(request),
            device=request.device,
            rows=rows or request.suite.engine.rows,
            round_inputs=round_inputs,
        )

    rounded = partial(opener, request.engine, request.build, None, None, round_inputs=True)
    made = Subject(
        request.build,
        build,
        partial(opener, request.engine, request.build),
        rounded if request.engine in ("local", "stream") and build.kind == "build" else None,
    )
    if reference is None or request.reference is None:
        return made, None
    return made, Subject(
        request.reference,
        reference,
        partial(opener, "stream" if request.engine == "stream" else "local", request.reference),
    )


def _dtype(request: Request) -> str:
    asked = request.suite.engine.dtype
    if asked != "auto":
        return asked
    return "float32" if torch.device(request.device).type == "cpu" else "bfloat16"


def identified(request: Request) -> Artifact:
    """The build by its files, or where they are not here, by the endpoint that serves them."""
    if is_endpoint(request.engine) and not request.build.exists():
        return endpoint(request.engine.partition(":")[2], str(request.build))
    return identify(request.build)


def integrity_gate(build: Artifact, reference: Artifact | None, progress: Progress) -> Gate:
    """Whether the build is what it claims; never measured a second time."""
    result = check_integrity(build, progress)
    if not result.problems and reference is not None:
        problem = tokenizers.difference(build, reference)
        result.problems += [] if problem is None else [problem]
    sentence = "; ".join(result.problems[:3]) if result.problems else "; ".join(result.checked)
    status = "fail" if result.problems else "pass"
    return Gate.model_validate(
        {
            "name": "integrity",
            "against": "integrity",
            "task": None,
            "metric": "problems",
            "status": status,
            "value": float(len(result.problems)),
            "limit": 0.0,
            "sentence": sentence,
        }
    )


def require_gatable(reference: object, gates: str | None) -> None:
    """Check that there is something to judge by.

    Raises:
        UsageError: gates without a reference.
    """
    if gates is not None and reference is None:
        raise UsageError("gates need a reference.", hint="Give --reference MODEL, or --no-gate to measure alone.")
