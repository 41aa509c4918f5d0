"""What a build holds beside the model, against its report and, bit for bit, against the source."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.artifacts.verbatim import Verbatim, VerbatimPart, parts_of
from qconv.boundary.printable import name_of
from qconv.checkpoint.stream import same_bits
from qconv.core.workers import Workers
from qconv.verification.outcome import Verification


def check_listed(build: Build, verbatim: Iterable[Verbatim], result: Verification) -> None:
    """As many tensors as the report of a build says, and every one of them on the skip list."""
    held = {part.part: part for part in parts_of(verbatim)}
    said = {part.part: part for part in build.reported_verbatim()}
    for name in sorted(held.keys() | said.keys()):
        none = VerbatimPart(name, 0, 0, 0)
        ours, theirs = held.get(name, none), said.get(name, none)
        if (ours.tensors, ours.nbytes) != (theirs.tensors, theirs.nbytes):
            result.problems.append(f"the build's report says {theirs}; the build holds {ours}")
    for module in dict.fromkeys(module for one in verbatim for module in one.modules):
        if not build.format.is_skipped(module, build.skipped):
            result.problems.append(f"{name_of(module)} is not quantized but is not on the skip list")


def check_copies(build: Build, source: Source, result: Verification, workers: Workers) -> None:
    """Every tensor that the source holds beside the model, bit for bit; others' builds need not hold any."""
    if not source.verbatim or not build.format.holds_verbatim:
        return
    missing = [one for one in source.verbatim if one.name not in build.checkpoint.entries]
    there = [one for one in source.verbatim if one.name in build.checkpoint.entries]
    for part in parts_of(missing):
        said = f"{part} of the source are missing"
        (result.problems if build.is_ours else result.notices).append(said)
    compared = workers.map(partial(_difference, build, source), [one.name for one in there])
    problems = [problem for problem in compared if problem is not None]
    (result.problems if build.is_ours else result.notices).extend(problems)
    if there:
        result.checked.append(f"{', '.join(map(str, parts_of(there)))} bit for bit against the source")


def _difference(build: Build, source: Source, name: str) -> str | None:
    """How a tensor differs from the source's, or None."""
    ours, theirs = build.checkpoint.entry(name), source.checkpoint.entry(name)
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        found, wanted = (f"{one.dtype_name} {list(one.shape)}" for one in (ours, theirs))
        return f"{name_of(name)} is {found}, {wanted} in the source"
    pairs = zip(build.checkpoint.blocks(name), source.checkpoint.blocks(name), strict=True)
    return None if all(same_bits(one, other) for one, other in pairs) else f"{name_of(name)}: differs from the source"
