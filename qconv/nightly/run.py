"""The nightly run: builds are made or taken as they are, measured from cheap to dear, judged, and remembered.

Every step is resumable by itself, and all of them lie in the folder of one night, so the same command continues a night
that was interrupted. A build that fails a suite is not measured on the dearer ones. What the time budget does not reach
is inconclusive, never passed.

A canary is a build that does not change. When its numbers do, the stack (engine, library, machine) has changed, and the
other builds' numbers of that night say less about their weights.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.pipeline import quantize
from qconv.checkpoint.writer import output_errors
from qconv.errors import ArtifactError, EngineError, OutputError, QconvError, StaleJournalError, UnmeasurableError
from qconv.evaluation.artifacts import locate
from qconv.evaluation.cache import Cache, default_folder
from qconv.evaluation.engines import is_endpoint
from qconv.evaluation.history import History, differences
from qconv.evaluation.record import EXIT_CODES, RUN_NAME, Outcome, Run, Verdict, read_run
from qconv.evaluation.run import Request, evaluate
from qconv.evaluation.run_folder import remove_left
from qconv.evaluation.standing import Standing
from qconv.folders.journal import locked
from qconv.nightly.nights import begin_night, remove_old
from qconv.nightly.settings import NightBuild, NightPlan, NightSuite
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.planning.recipe import Recipe

Progress = Callable[[str, int, int], None]
Log = Callable[[str], None]

_WORST: tuple[Outcome, ...] = ("corrupt", "regression", "inconclusive", "not gated", "pass")
"""From the worst to the best."""


@dataclass(slots=True)
class BuildNight:
    """What a night brought for one build.

    Attributes:
        name: The build's.
        runs: Its runs by suite, with their folders.
        problem: Why it could not be made or measured.
        unmeasured: Suites of which nothing can be measured here, with the reason.
        skipped: Suites that were not reached, with the reason.
        changes: What differs from the run before, for a canary whose numbers moved.
    """

    name: str
    runs: dict[str, tuple[Path, Run]] = field(default_factory=dict)
    problem: QconvError | None = None
    unmeasured: dict[str, UnmeasurableError] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    changes: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """The worst of its runs; inconclusive where something was not reached."""
        found: list[Outcome] = [run.verdict.outcome for _, run in self.runs.values()]
        if self.problem is not None:
            found.append("corrupt" if self.problem.exit_code == EXIT_CODES["corrupt"] else "inconclusive")
        if self.unmeasured or any("budget" in reason for reason in self.skipped.values()):
            found.append("inconclusive")
        return min(found, key=_WORST.index, default="inconclusive")


@dataclass(frozen=True, slots=True)
class Night:
    """A whole night."""

    folder: Path
    builds: tuple[BuildNight, ...]
    verdict: Verdict


def run_night(plan: NightPlan, date: str, *, progress: Progress, log: Log) -> Night:
    """Run one night, or continue it.

    Args:
        plan: What to do.
        date: Names the night: ``2026-01-31``.
        progress: Told what is at work, and how far.
        log: Told about steps, one sentence each.

    Raises:
        OutputError: another night is at work there, or the work folder or the history cannot be written.
        ArtifactError: the history is damaged.
    """
    with _held(plan.work), History.open(plan.history) as history:
        deadline = None if plan.budget_minutes is None else time.monotonic() + 60.0 * plan.budget_minutes
        at_work = _AtWork(plan, begin_night(plan.work, date), history, Standing(progress), progress, log)
        nights = [BuildNight(build.name) for build in plan.builds]
        made: dict[str, Path] = {}
        for build, night in zip(plan.builds, nights, strict=True):
            with _reported(night, log):
                made[build.name] = at_work.made(build)
        # Suite by suite over all builds, so that a short night has at least the cheap answers for every one.
        for suite in plan.suites:
            for build, night in zip(plan.builds, nights, strict=True):
                reason = _reason_to_skip(night, deadline)
                if reason is not None:
                    night.skipped[suite.name] = reason
                    log(f"{build.name}: {suite.name} skipped: {reason}")
                    continue
                with _reported(night, log):
                    try:
                        night.runs[suite.name] = at_work.measured(build, made[build.name], suite)
                    except UnmeasurableError as error:
                        night.unmeasured[suite.name] = error
                        log(f"{build.name}: {suite.name} not measured: {error}")
        for build, night in zip(plan.builds, nights, strict=True):
            if build.canary:
                night.changes = _moved(history, night)
        remove_old(plan.work, plan.keep_nights, date, log)
    return Night(at_work.folder, tuple(nights), _verdict(nights, plan))


@contextlib.contextmanager
def _held(work: Path) -> Iterator[None]:
    """The folder of the nights, made if absent, for this process alone.

    Raises:
        OutputError: it is a file, cannot be made, or another night is at work there.
    """
    if work.exists() and not work.is_dir():
        raise OutputError(f"{work}: is a file.", hint="Give a folder as work.")
    with output_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        yield


class _reported:
    """Keeps an error of ours for the build it belongs to; the night goes on with the others."""

    def __init__(self, night: BuildNight, log: Log) -> None:
        self.night = night
        self.log = log

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, QconvError):
            return False
        self.night.problem = error
        self.log(f"{self.night.name}: {error}")
        return True


@dataclass(frozen=True, slots=True)
class _AtWork:
    """What makes and measures the builds of one night.

    Attributes:
        plan: What is to be done.
        folder: The night's.
        history: Where its runs go.
        standing: Whether what an interrupted night measured still stands.
        progress: Told what is at work, and how far.
        log: Told about steps.
    """

    plan: NightPlan
    folder: Path
    history: History
    standing: Standing
    progress: Progress
    log: Log

    def made(self, build: NightBuild) -> Path:
        """The build's path, quantized now where it is made from a recipe; what other inputs began is made anew."""
        if build.recipe is None:
            assert build.build is not None
            return Path(build.build) if is_endpoint(self.plan.engine) else locate(build.build)
        model, out = locate(build.reference), self.folder / build.name / "build"
        with output_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        self.log(f"{build.name}: quantizing to {build.recipe.format}")
        try:
            self._quantize(model, out, build.recipe, restart=False)
        except StaleJournalError as error:
            self.log(f"{build.name}: quantizing anew: {error.message}")
            self._quantize(model, out, build.recipe, restart=True)
        return out

    def _quantize(self, model: Path, out: Path, recipe: Recipe | GgufRecipe, *, restart: bool) -> None:
        if isinstance(recipe, GgufRecipe):
            quantize_gguf(model, out, recipe, restart=restart, progress=self.progress, log=self.log)
        else:
            quantize(model, out, recipe, restart=restart, progress=self.progress, log=self.log)

    def measured(self, build: NightBuild, made: Path, suite: NightSuite) -> tuple[Path, Run]:
        """A build's run on a suite with its folder: what this night measured before, where it still stands."""
        out = self.folder / build.name / suite.folder
        before = self.history.baseline(build.name, suite.suite.digest())
        engine = () if self.plan.engine == "local" else ("--engine", self.plan.engine)
        request = Request(
            build=made,
            reference=locate(build.reference),
            suite=suite.suite,
            suite_name=suite.name,
            out=out,
            cache=Cache(default_folder()),
            engine=self.plan.engine,
            gates=suite.gates,
            baseline=None if before is None else before.run,
            command=(
                "qconv",
                "eval",
                "run",
                str(made),
                "--reference",
                build.reference,
                "--suite",
                suite.source,
                *engine,
            ),
        )
        try:
            run = self._stored(build, request) or self._evaluated(build, request)
            self.history.add(out, run, name=build.name)
        except ArtifactError as error:
            if not error.message.startswith(str(out)):
                raise
            raise ArtifactError(error.message, hint=f"Remove {out}: the same command measures it again.") from error
        self.log(f"{build.name}: {suite.name}: {run.verdict.sentence}")
        return out, run

    def _stored(self, build: NightBuild, request: Request) -> Run | None:
        """What this night measured before; None where nothing was, or it does not stand any more."""
        if not (request.out / RUN_NAME).exists():
            return None
        run = read_run(request.out)
        reason = self.standing.reason(run, request)
        if reason is not None:
            self.log(f"{build.name}: {request.suite_name} was measured already, but {reason}")
            return None
        remove_left(request.out)
        return run

    def _evaluated(self, build: NightBuild, request: Request) -> Run:
        """The build, measured now; what a run of other inputs left in its folder is discarded."""
        self.log(f"{build.name}: measuring on {request.suite_name}")
        restart = (request.out / RUN_NAME).exists()
        try:
            return evaluate(request, restart=restart, progress=self.progress, log=self.log)
        except StaleJournalError as error:
            self.log(f"{build.name}: measuring anew: {error.message}")
            return evaluate(request, restart=True, progress=self.progress, log=self.log)


def _reason_to_skip(night: BuildNight, deadline: float | None) -> str | None:
    if night.problem is not None:
        return "the build could not be made or measured"
    failed = [name for name, (_, run) in night.runs.items() if run.verdict.outcome in ("regression", "corrupt")]
    if failed:
        return f"it failed {failed[0]}"
    if deadline is not None and time.monotonic() > deadline:
        return "the time budget is spent"
    return None


def _moved(history: History, night: BuildNight) -> tuple[str, ...]:
    """What changed since the canary's run before, if its numbers moved though its weights did not."""
    found: list[str] = []
    for _, run in night.runs.values():
        earlier = history.before(run, night.name)
        before = None if earlier is None else earlier.run
        if before is None or before.build.sha256 != run.build.sha256 or _numbers(before, run) == _numbers(run, before):
            continue
        found += [one for one in differences(before, run) if one not in found] or ["nothing that is recorded"]
    return tuple(found)


def _numbers(run: Run, other: Run) -> Mapping[str, Mapping[str, float | None]]:
    """Of the tasks that the other run measured too."""
    return {
        task.name: {name: one.value for name, one in task.metrics.items()}
        for task in run.tasks
        if other.task(task.name) is not None
    }


def _verdict(nights: list[BuildNight], plan: NightPlan) -> Verdict:
    outcomes = {night.name: night.outcome for night in nights}
    worst = min(outcomes.values(), key=_WORST.index)
    named = ", ".join(name for name, outcome in outcomes.items() if outcome == worst)
    moved = [night for night in nights if night.changes]
    said = "no regression in any build" if worst == "pass" else f"{worst}: {named}"
    if moved:
        said += f"; the canary {moved[0].name} moved, so the stack has changed: {'; '.join(moved[0].changes)}"
    elif any(build.canary for build in plan.builds):
        said += "; the canary did not move"
    if left_out := dict.fromkeys(
        one.name for night in nights for _, run in night.runs.values() for one in run.unmeasured
    ):
        said += f"; not measured: {', '.join(left_out)}"
    return Verdict(outcome=worst, sentence=said)


def runs_of(night: Night) -> Iterator[tuple[Path, Run]]:
    """Every run of a night with its folder."""
    for build in night.builds:
        yield from build.runs.values()


def not_measured(night: Night) -> list[str]:
    """A sentence for each task that runs had to leave out, and why: once, however many builds it concerns."""
    builds: dict[tuple[str, str], list[str]] = {}
    for build in night.builds:
        for _, run in build.runs.values():
            for one in run.unmeasured:
                builds.setdefault((one.name, one.sentence), []).append(build.name)
    return [
        f"{task} was not measured ({', '.join(dict.fromkeys(names))}): {why}" for (task, why), names in builds.items()
    ]


def require_any_run(night: Night) -> None:
    """Check that there is something to report: a run, or that the time was too short for any.

    Raises:
        EngineError: no build could be made or measured; names every cause, and ends the process as they would, where
            they agree.
    """
    causes = {build.name: [*filter(None, (build.problem, *build.unmeasured.values()))] for build in night.builds}
    every = [cause for found in causes.values() for cause in found]
    if not every or any(build.runs for build in night.builds):
        return
    problems = "; ".join(f"{name}: {' '.join(map(str, found))}" for name, found in causes.items() if found)
    error = EngineError(f"nothing could be measured: {problems}")
    codes, corrupt = {cause.exit_code for cause in every}, EXIT_CODES["corrupt"]
    error.exit_code = corrupt if corrupt in codes else codes.pop() if len(codes) == 1 else EngineError.exit_code
    raise error
