"""What evaluation reads of a build's own report, ``qconv-report.json``; the rest of it is for people."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from qconv.boundary.reading import read_json
from qconv.checkpoint.hub import require_inside
from qconv.errors import ArtifactError, RecipeError
from qconv.evaluation.record import parse_as
from qconv.folders.state import REPORT_NAME
from qconv.planning.gguf_recipe import FORMAT as GGUF
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.planning.recipe import parse_recipe

_HINT = "Restore it, or make the build again."

Count = Annotated[int, Field(strict=True, ge=0)]


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Search(_Read):
    """A search for scales, and whether plain rounding was as good."""

    kept_rtn: bool = False


class Expert(_Read):
    """An expert, and the tokens that it was calibrated on."""

    module: str
    tokens: Count
    loss: float | None = None
    rtn_loss: float | None = None


class Compensation(_Read):
    """A linear that GPTQ rounded."""

    rows_kept_rtn: Count = 0


class LayerReport(_Read):
    """A layer."""

    snr_db: dict[str, float | None] = {}
    searches: dict[str, Search] = {}
    experts: tuple[Expert, ...] = ()
    compensations: dict[str, Compensation] = {}


class LayerBits(_Read):
    """Bits per weight of a layer's linears by role."""

    layer: Annotated[int, Field(ge=0, lt=1 << 31)]
    roles: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]]


class TensorReport(_Read):
    """A tensor of a GGUF file."""

    type: str | None = None
    snr_db: float | None = None


class Importance(_Read):
    """The importance matrix of a GGUF build."""

    coverage: JsonValue = None
    datasets: tuple[str, ...] = ()


class Finding(_Read):
    """Something that a rule has to say of an engine."""

    what: str
    remedy: str = ""


class EngineReport(_Read):
    """What an engine will make of the build, by rules."""

    engine: str
    version: str
    verdict: str
    findings: tuple[Finding, ...] = ()


class Choice(_Read):
    """What was predicted of a build whose grids were chosen."""

    predicted_kld: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None


class BuildReport(_Read):
    """A build's report: of GGUF its error is told by tensor, of the others by layer and module."""

    qconv: str | None = None
    source: str | None = None
    format: str | None = None
    scheme: str | None = None
    files: tuple[str, ...] = ()
    calibration_corpus: str | None = None
    parameters: Count | None = None
    engines: tuple[EngineReport, ...] = ()
    rounded_by: str | None = Field(default=None, alias="method")
    """Of GGUF, where a recipe may leave it open."""
    recipe: dict[str, Any] = {}
    bits_per_weight: float | None = None
    quantized_bits_per_weight: float | None = None
    coverage: JsonValue = None
    imatrix: Importance = Importance()
    degenerate: tuple[JsonValue, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    tensors: dict[str, TensorReport] = {}
    bits_by_layer: tuple[LayerBits, ...] = ()
    allocation: Choice = Choice()

    @property
    def method(self) -> str | None:
        """By which steps the build was made, as one word."""
        steps = self.recipe.get("method")
        return "+".join(map(str, steps)) if isinstance(steps, list) else None if steps is None else str(steps)

    def recipe_digest(self) -> str | None:
        """sha256 of the recipe; None where there is none. What another version wrote counts as it is written."""
        if not self.recipe:
            return None
        parse = parse_gguf_recipe if self.recipe.get("format") == GGUF else parse_recipe
        try:
            return parse(self.recipe, "recipe").digest()
        except RecipeError:
            return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()

    def fallbacks(self) -> dict[str, JsonValue]:
        """Coverage of the experts, and what was left to plain rounding."""
        searches = [search for layer in self.layers for search in layer.searches.values()]
        experts = [expert for layer in self.layers for expert in layer.experts]
        compared = [(one.loss, one.rtn_loss) for one in experts]
        return {
            "coverage": self.coverage,
            "degenerate": len(self.degenerate),
            "searches": len(searches),
            "searches_kept_rtn": sum(search.kept_rtn for search in searches),
            "mlps": len(experts),
            "mlps_worse_than_rtn": sum(a > b for a, b in compared if a is not None and b is not None),
            "rows_kept_rtn": sum(one.rows_kept_rtn for layer in self.layers for one in layer.compensations.values()),
        }


def read_report(folder: Path) -> BuildReport | None:
    """The report in a build's folder; None if there is none.

    Raises:
        ArtifactError: it is not what qconv writes, or a link out of the folder: a copy is kept with a run.
    """
    path = folder / REPORT_NAME
    if not path.exists():
        return None
    require_inside(folder, path)
    return parse_report(read_json(path, ArtifactError, hint=_HINT), str(path))


def parse_report(values: object, where: str) -> BuildReport:
    """A report from its values.

    Raises:
        ArtifactError: they are not what qconv writes; names the file and the key.
    """
    if not isinstance(values, dict):
        raise ArtifactError(f"{where}: is no report of qconv.", hint=_HINT)
    known = {key: value for key, value in values.items() if value is not None}  # what a build has none of is null
    return parse_as(BuildReport, known, f"{where}: is damaged", _HINT)
