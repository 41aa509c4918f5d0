"""What engines will make of a build, before it is there: the rules that need no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qconv.artifacts.build import with_both_spellings
from qconv.artifacts.source import Source
from qconv.artifacts.subject import subject_of, subject_of_folder
from qconv.checkpoint.extended_rope import with_extended_rope
from qconv.checkpoint.header import DTYPE_NAMES
from qconv.engines.readers import READERS
from qconv.engines.rule import Effect, Finding, Judgement, Verdict
from qconv.engines.subject import Deployment, Stored, Subject
from qconv.engines.table import judgements
from qconv.planning.plan import BuildPlan


def subject_of_plan(plan: BuildPlan, config: Mapping[str, Any], source: Path) -> Subject:
    """A build by its plan.

    Args:
        plan: The build's plan.
        config: The source's config.json.
        source: The folder that it is made from, whose small files it takes over.

    Raises:
        CheckpointError: one of them is malformed.
    """
    shards = {name: specs for unit in plan.units for name, specs in unit.shards}
    stored = {spec.name: Stored(DTYPE_NAMES[spec.dtype], spec.shape) for specs in shards.values() for spec in specs}
    section = plan.format.config(plan.grids(), plan.skipped)
    config = {**config, **(plan.format.keys(section) if section else {})}
    config = with_both_spellings(with_extended_rope(config, plan.recipe.rope))
    return replace(subject_of_folder(source, config, stored), files=frozenset(shards))


def judged(plan: BuildPlan, source: Source) -> list[Judgement]:
    """What each engine will make of a build, served by one device.

    Raises:
        CheckpointError: a small file of the source is malformed.
    """
    subject = subject_of_plan(plan, source.checkpoint.config, source.checkpoint.path)
    return judgements(subject, (), Deployment())


def judged_as_it_is(path: Path) -> list[Judgement]:
    """What each engine makes of a build that is there.

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    return judgements(subject_of(path), (), Deployment())


def sentences(found: Sequence[Judgement], format: str) -> list[str]:
    """What engines that docs/concepts/formats.md names for a format refuse of a build or compute wrongly."""
    readers = READERS.get(format, {})
    return [
        f"{one.engine.version} {finding.rule.what} ({finding.rule.known}; {_places(finding)}): {finding.rule.remedy}"
        for one in found
        if one.engine.version in readers
        for finding in one.findings
        if finding.rule.effect is not Effect.NOTICE
    ]


def _places(finding: Finding) -> str:
    """The first place of a finding, and how many there are."""
    return finding.where[0] if finding.count == 1 else f"{finding.count:,} times, first {finding.where[0]}"


def engine_values(found: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Judgements as values for JSON."""
    return [
        {
            "engine": one.engine.name,
            "version": one.engine.version,
            "verdict": one.verdict.value,
            "known": one.known,
            "findings": [
                {
                    "rule": finding.rule.key,
                    "effect": finding.rule.effect.value,
                    "what": finding.rule.what,
                    "where": list(finding.where),
                    "count": finding.count,
                    "remedy": finding.rule.remedy,
                    "known": finding.rule.known,
                    "source": finding.rule.source,
                }
                for finding in one.findings
            ],
        }
        for one in found
    ]


def fails(found: Sequence[Judgement], named: bool) -> bool:
    """Whether a check ends badly: something is WRONG, or a named engine refuses, or all of them do."""
    verdicts = [one.verdict for one in found]
    if Verdict.WRONG in verdicts:
        return True
    return Verdict.REFUSED in verdicts if named else all(one is Verdict.REFUSED for one in verdicts)


__all__ = ["Deployment", "engine_values", "fails", "judgements", "subject_of_plan"]
