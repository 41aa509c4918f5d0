"""A safetensors build, verified."""

from __future__ import annotations

from pathlib import Path

from qconv.build import Build
from qconv.errors import CheckpointError
from qconv.parallel import Workers
from qconv.source import Source
from qconv.verification.checksums import check_sums
from qconv.verification.outcome import Progress, Verification
from qconv.verification.structure import check_structure
from qconv.verification.weights import check_scales, check_weights


def verify(path: Path, against: Path | None = None, progress: Progress | None = None) -> Verification:
    """Check a build; with ``against`` also weight by weight against its source.

    Raises:
        CheckpointError: the source (not the build) is damaged.
    """
    result = Verification()
    check_sums(path, result, progress)
    source = None if against is None else Source.open(against)
    try:
        build = Build.open(path)
        check_structure(build, result)
    except CheckpointError as error:
        result.problems.append(error.message)
    if result.problems:
        return result
    with Workers() as workers:
        if source is not None:
            check_weights(build, source, result, progress, workers)
        else:
            check_scales(build, result, progress, workers)
    return result
