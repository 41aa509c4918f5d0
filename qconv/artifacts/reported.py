"""The report that a build carries, ``qconv-report.json``, read with suspicion: what its readers take from it is there.

Whoever has the folder may have changed the file; a reader that believed it would end in a traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qconv.boundary.printable import name_of
from qconv.checkpoint.extended_rope import ExtendedRope, with_extended_rope
from qconv.checkpoint.reader import read_json
from qconv.core.settings import MATCHED
from qconv.errors import CheckpointError, UsageError
from qconv.folders.state import REPORT_NAME

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    """Values by name; others than those that are read may be there."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Search(_Part):
    kept_rtn: bool


class _Expert(_Part):
    module: str
    tokens: Count
    shrinkage: Number
    loss: Number
    rtn_loss: Number


class _Compensation(_Part):
    rows_kept_rtn: Count = 0


class _Layer(_Part):
    layer: Count
    snr_db: dict[str, Number | None]
    searches: dict[str, _Search]
    experts: list[_Expert]
    compensations: dict[str, _Compensation]


class _Coverage(_Part):
    experts: Count
    least: Count
    median: Count
    most: Count
    without_tokens: Count


class _ImatrixCoverage(_Coverage):
    weights: Count
    covered: Count
    mostly_shared: Count


class _Verbatim(_Part):
    part: str
    tensors: Count
    nbytes: Count
    dequantized: Count


class _Finding(_Part):
    what: str


class _Engine(_Part):
    engine: str
    version: str
    verdict: str
    findings: list[_Finding]


class _Recipe(_Part):
    method: str | list[str]


class _Report(_Part):
    qconv: str
    source: str
    format: str
    fingerprints: dict[str, str]


class _BuildReport(_Report):
    recipe: _Recipe
    bits_per_weight: Number
    quantized_bits_per_weight: Number
    parameters: Count
    coverage: _Coverage | None
    degenerate: list[dict[str, str]]
    verbatim: list[_Verbatim] = []
    engines: list[_Engine] = []
    layers: list[_Layer]


class _Tensor(_Part):
    type: str
    snr_db: Number | None


class _Imatrix(_Part):
    datasets: list[str]
    file: str | None
    coverage: _ImatrixCoverage


class _GgufReport(_Report):
    recipe: dict[str, Any]
    bits_per_weight: Number
    parameters: Count
    files: Annotated[list[str], Field(min_length=1)]
    tensors: dict[str, _Tensor]
    imatrix: _Imatrix | None
    engines: list[_Engine] = []


class _ImatrixReport(_Report):
    datasets: list[str]
    coverage: _ImatrixCoverage


class _SensitivityReport(_Report):
    tokens: Count
    text: str


_OTHERS: dict[str, type[_Report]] = {
    "imatrix": _ImatrixReport,
    "sensitivity": _SensitivityReport,
}


def has_report(folder: Path) -> bool:
    """Whether a folder holds a report, which makes it a build of qconv's."""
    return (folder / REPORT_NAME).is_file()


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a build, an importance matrix, a sensitivity or a GGUF build.

    Raises:
        CheckpointError: it is missing, cannot be read, or lacks something; names it.
    """
    values = read_json(folder / REPORT_NAME)
    kind = str(values.get("format"))
    model = _GgufReport if kind.startswith("gguf:") else _OTHERS.get(kind, _BuildReport)
    try:
        model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{folder / REPORT_NAME}: damaged: {name_of(where)}: {first['msg'].lower()}.",
            hint="Download the build again, or make it again with --restart.",
        ) from error
    return values


def with_reported_rope(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config.json that a build of a source should have, given the rope that its report's recipe asked for.

    Args:
        config: The source's; one that has that very scaling already stays as it is.
        folder: The build's, or that of its GGUF files.

    Raises:
        CheckpointError: the report is damaged, or asks for what the source cannot have.
    """
    if not has_report(folder):
        return dict(config)
    recipe = read_report(folder).get("recipe")
    asked = recipe.get("rope") if isinstance(recipe, dict) else None
    try:
        wanted = None if asked is None else ExtendedRope.parse(str(asked))
        if wanted is None or wanted.is_stated(config):
            return dict(config)
        return with_extended_rope(config, str(wanted))
    except (ValueError, UsageError) as error:
        raise CheckpointError(
            f"{folder / REPORT_NAME}: recipe.rope does not fit the source: {error}",
            hint="The report is damaged, or the build is of another source.",
        ) from error


def says_matched(report: Mapping[str, Any]) -> bool:
    """Whether a report's recipe is one of matched calibration."""
    recipe = report.get("recipe")
    calibration = recipe.get("calibration") if isinstance(recipe, dict) else None
    return isinstance(calibration, dict) and calibration.get("propagate") == MATCHED
