"""The nightly run: builds are made or taken as they are, measured from cheap to dear, judged, and remembered.

Every step is resumable by itself, and all of them lie in the folder of one night, so the same command continues a night
that was interrupted. A build that fails a suite is not measured on the dearer ones. What the time budget does not reach
is inconclusive, never passed.

A canary is a build that does not change. When its numbers do, the stack (engine, library, machine) has changed, and the
other builds' numbers of that night say less about their weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, model_validator

from qconv.errors import EngineError, QconvError, SandboxError, UnmeasurableError, UsageError
from qconv.evaluation.artifacts import locate
from qconv.evaluation.cache import Cache, default_folder
from qconv.evaluation.history import History, differences
from qconv.evaluation.record import EXIT_CODES, RUN_NAME, Outcome, Run, Verdict, read_run
from qconv.evaluation.run import Request, evaluate
from qconv.evaluation.suites import Section, Suite, load_suite, parse_settings
from qconv.gguf.recipe import FORMAT as GGUF
from qconv.gguf.recipe import parse_gguf_recipe
from qconv.gguf_pipeline import quantize_gguf
from qconv.nights import begin_night, remove_old
from qconv.pipeline import quantize
from qconv.recipe import parse_recipe, read_values

Progress = Callable[[str, int, int], None]
Log = Callable[[str], None]

_WORST: tuple[Outcome, ...] = ("corrupt", "regression", "inconclusive", "not gated", "pass")
"""From the worst to the best."""


class BuildSettings(Section):
    """One build that is followed from night to night."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    reference: str
    """The unquantized model: a folder or a Hub id."""
    recipe: str | dict[str, Any] | None = None
    """Quantize the reference by it: a packaged recipe's name, a file, ``gguf:TYPE``, or a recipe's keys themselves."""
    build: str | None = None
    """Take this build instead: a folder, a GGUF file or a Hub id."""
    canary: bool = False

    @model_validator(mode="after")
    def _made_in_one_way(self) -> Self:
        if (self.recipe is None) == (self.build is None):
            raise ValueError("give either a recipe or a build")
        return self


class NightlySettings(Section):
    """A nightly configuration. Paths are relative to the file."""

    work: Path
    """Where the nights lie, each in a folder of its own."""
    history: Path
    suites: Annotated[tuple[str, ...], Field(min_length=1)]
    """From cheap to dear."""
    budget_minutes: Annotated[float, Field(gt=0.0)] | None = None
    keep_nights: Annotated[int, Field(ge=1)] = 7
    """Older nights' folders are removed; the history keeps their runs."""
    engine: str = "local"
    builds: Annotated[tuple[BuildSettings, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [build.name for build in self.builds]
        if len(set(names)) != len(names):
            raise ValueError("every build needs a name of its own")
        return self


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


def load_nightly(path: Path) -> NightlySettings:
    """A configuration from a YAML file.

    Raises:
        UsageError: it cannot be read, or a key is wrong; names it.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: {reason}.", hint="Give a nightly configuration, as evals/nightly.yaml.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: is not YAML: {error}.") from error
    settings = parse_settings(NightlySettings, values, str(path))
    base = path.resolve().parent
    builds = tuple(one.model_copy(update=_placed(one, base)) for one in settings.builds)
    work, history = ((base / path).resolve() for path in (settings.work, settings.history))
    changed = {"work": work, "history": history, "builds": builds}
    return settings.model_copy(update=changed)


def run_night(settings: NightlySettings, date: str, *, progress: Progress, log: Log) -> Night:
    """Run one night, or continue it.

    Args:
        settings: What to do.
        date: Names the night: ``2026-01-31``.
        progress: Told what is at work, and how far.
        log: Told about steps, one sentence each.

    Raises:
        UsageError: a suite does not exist.
        OutputError: the work folder or the history cannot be written.
    """
    suites = {name: load_suite(name) for name in settings.suites}
    folder = begin_night(settings.work, date)
    deadline = None if settings.budget_minutes is None else time.monotonic() + 60.0 * settings.budget_minutes
    nights = [BuildNight(build.name) for build in settings.builds]
    with History.open(settings.history) as history:
        made: dict[str, Path] = {}
        for build, night in zip(settings.builds, nights, strict=True):
            with _reported(night, log):
                made[build.name] = _made(build, folder, progress, log)
        # Suite by suite over all builds, so that a short night has at least the cheap answers for every one.
        for name, suite in suites.items():
            for build, night in zip(settings.builds, nights, strict=True):
                reason = _reason_to_skip(night, deadline)
                if reason is not None:
                    night.skipped[name] = reason
                    log(f"{build.name}: {name} skipped: {reason}")
                    continue
                with _reported(night, log):
                    try:
                        _measure(settings, build, made[build.name], name, suite, folder, history, night, progress, log)
                    except UnmeasurableError as error:
                        night.unmeasured[name] = error
                        log(f"{build.name}: {name} not measured: {error}")
        for build, night in zip(settings.builds, nights, strict=True):
            if build.canary:
                night.changes = _moved(history, night)
    remove_old(settings.work, settings.keep_nights, date, log)
    return Night(folder, tuple(nights), _verdict(nights, settings))


def _placed(build: BuildSettings, base: Path) -> dict[str, str]:
    """Paths of a build relative to the configuration's folder, where they exist there."""
    values = {"reference": build.reference, "build": build.build}
    if isinstance(build.recipe, str):
        values["recipe"] = build.recipe
    return {key: str(base / one) for key, one in values.items() if one is not None and (base / one).exists()}


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


def _made(build: BuildSettings, folder: Path, progress: Progress, log: Log) -> Path:
    """The build's path, quantized now where it is made from a recipe."""
    if build.build is not None:
        return locate(build.build)
    model, out = locate(build.reference), folder / build.name / "build"
    out.parent.mkdir(parents=True, exist_ok=True)
    values, where = _recipe_values(build)
    log(f"{build.name}: quantizing to {values.get('format')}")
    if values.get("format") == GGUF:
        quantize_gguf(model, out, parse_gguf_recipe(values, where), progress=progress, log=log)
    else:
        quantize(model, out, parse_recipe(values), progress=progress, log=log)
    return out


def _recipe_values(build: BuildSettings) -> tuple[dict[str, Any], str]:
    if isinstance(build.recipe, dict):
        return dict(build.recipe), f"builds.{build.name}.recipe"
    assert build.recipe is not None
    if build.recipe.startswith(f"{GGUF}:"):
        return {"format": GGUF, "type": build.recipe.removeprefix(f"{GGUF}:")}, build.recipe
    return read_values(build.recipe)


def _reason_to_skip(night: BuildNight, deadline: float | None) -> str | None:
    if night.problem is not None:
        return "the build could not be made or measured"
    failed = [name for name, (_, run) in night.runs.items() if run.verdict.outcome in ("regression", "corrupt")]
    if failed:
        return f"it failed {failed[0]}"
    if deadline is not None and time.monotonic() > deadline:
        return "the time budget is spent"
    return None


def _measure(
    settings: NightlySettings,
    build: BuildSettings,
    made: Path,
    suite_name: str,
    suite: Suite,
    folder: Path,
    history: History,
    night: BuildNight,
    progress: Progress,
    log: Log,
) -> None:
    out = folder / build.name / f"run-{Path(suite_name).stem}"
    if (out / RUN_NAME).exists():
        run = read_run(out)
    else:
        before = history.baseline(build.name, suite.digest())
        request = Request(
            build=made,
            reference=locate(build.reference),
            suite=suite,
            suite_name=suite_name,
            out=out,
            cache=Cache(default_folder()),
            engine=settings.engine,
            gates=suite.gates,
            baseline=None if before is None else before.run,
            command=("qconv", "eval", "run", str(made), "--reference", build.reference, "--suite", suite_name),
        )
        log(f"{build.name}: measuring on {suite_name}")
        run = evaluate(request, progress=progress, log=log)
    history.add(out, run, name=build.name)
    night.runs[suite_name] = out, run
    log(f"{build.name}: {suite_name}: {run.verdict.sentence}")


def _moved(history: History, night: BuildNight) -> tuple[str, ...]:
    """What changed since the canary's run before, if its numbers moved though its weights did not."""
    found: list[str] = []
    for suite, (_, run) in night.runs.items():
        before = next(
            (one.run for one in history.runs(name=night.name, suite=suite) if one.run.started < run.started), None
        )
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


def _verdict(nights: list[BuildNight], settings: NightlySettings) -> Verdict:
    outcomes = {night.name: night.outcome for night in nights}
    worst = min(outcomes.values(), key=_WORST.index)
    named = ", ".join(name for name, outcome in outcomes.items() if outcome == worst)
    moved = [night for night in nights if night.changes]
    said = "no regression in any build" if worst == "pass" else f"{worst}: {named}"
    if moved:
        said += f"; the canary {moved[0].name} moved, so the stack has changed: {'; '.join(moved[0].changes)}"
    elif any(build.canary for build in settings.builds):
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
    """Check that there is something to report.

    Raises:
        SandboxError: no build could be measured for want of a sandbox that works.
        EngineError: no build could be measured.
    """
    if any(build.runs for build in night.builds):
        return
    causes = {build.name: [*filter(None, (build.problem, *build.unmeasured.values()))] for build in night.builds}
    every = [cause for found in causes.values() for cause in found]
    if every and all(isinstance(cause, SandboxError) for cause in every):
        raise every[0]
    problems = "; ".join(f"{name}: {' '.join(map(str, found))}" for name, found in causes.items())
    raise EngineError(f"nothing could be measured: {problems}")
