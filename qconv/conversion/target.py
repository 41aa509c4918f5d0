"""A build that is written from another one, code by code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from qconv.artifacts.source import Source
from qconv.building.inputs import fingerprints
from qconv.building.output import Outcome
from qconv.building.report import Report
from qconv.building.safetensors_target import SafetensorsTarget, SafetensorsWriter
from qconv.building.target import Means
from qconv.calibration.corpus import TokenSet
from qconv.calibration.layer import Finished
from qconv.conversion.dense import DTYPES
from qconv.conversion.exact import in_grid
from qconv.conversion.weights import CodedWeights
from qconv.core.architecture import CacheScales, Linear
from qconv.core.qtensor import QTensor
from qconv.core.settings import CalibrationSettings
from qconv.errors import VerificationError
from qconv.folders.part import Part
from qconv.planning.plan import Item
from qconv.planning.schemes import LinearScheme

CONVERTED = "converted"
"""Of a report: what a build was converted from, and which linears were rounded again."""
KEPT = ("source", "calibration_corpus", "coverage", "degenerate", "allocation")
"""What a report keeps of the one before."""
_OF_LAYERS = ("searches", "experts", "compensations")


@dataclasses.dataclass(frozen=True, slots=True)
class ConvertedTarget(SafetensorsTarget):
    """See :class:`qconv.building.target.Target`; ``again`` are the linears that are rounded again, each with why."""

    again: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def calibration(self) -> CalibrationSettings | None:
        """Layers are not looked at."""
        return None

    @property
    def calibrates(self) -> bool:
        """Nothing is rounded by what is seen."""
        return False

    def fingerprints(self, tokens: TokenSet | None) -> dict[str, str]:
        """What the build belongs to: the one that it is converted from, and what is asked for."""
        asked = f"{self.plan.format.name} {self.plan.recipe.digest()} again={len(self.again)}"
        return fingerprints(self.source, asked, None, adds_up=False, companions="copied")

    def check(self, means: Means) -> None:
        """Was done before."""

    def looks_again(self, committed: Collection[str]) -> bool:
        """Never."""
        return False

    def begin(
        self,
        part: Part,
        tokens: TokenSet | None,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> ConvertedWriter:
        """Go to work."""
        return ConvertedWriter(self, part, tokens, belongs, means, show)


class ConvertedWriter(SafetensorsWriter):
    """See :class:`qconv.building.target.Writer`."""

    def __init__(self, target: ConvertedTarget, *given: Any) -> None:
        """See :meth:`ConvertedTarget.begin`."""
        super().__init__(target, *given)
        self.again = target.again

    def _rounded(self, item: Item) -> Finished:
        """A module; the scales of a cache are those of the other build."""
        if not isinstance(item.module, CacheScales):
            return super()._rounded(item)
        values = _weights(self.source).cache_scales(item.module.name)
        pairs = zip(item.specs, values, strict=True)
        return Finished(
            item.module, None, tuple((spec.name, [one.to(spec.dtype).view(spec.shape)]) for spec, one in pairs)
        )

    def _round(self, linear: Linear, scheme: LinearScheme) -> QTensor:
        """The weight as the other build holds it, on the new grid; one that this cannot hold is rounded again."""
        if linear.name in self.again:
            return super()._round(linear, scheme)
        found = in_grid(_weights(self.source).qtensor(linear.weight), scheme.grid)
        if isinstance(found, str):
            raise VerificationError(f"{linear.name}: {found}, though it was found to fit.", hint="The build changed.")
        return found

    def finish(self) -> Outcome:
        """Complete the folder, if every weight that was not rounded again is the same number by number."""
        for record in self.part.units.values():
            for name, snr in record["snr_db"].items():
                if snr is not None and name not in self.again:
                    raise VerificationError(
                        f"{name}: dequantizes to other numbers than before ({snr:.1f} dB).",
                        hint="This is a bug; the build that it was converted from is whole.",
                    )
        return super().finish()

    def _report(self, corpus: str | None, units: Mapping[str, Mapping[str, Any]]) -> Report:
        """The report, with what the one before said of how the weights were chosen."""
        report = super()._report(corpus, units)
        before = _weights(self.source)
        said = before.report()
        values = dict(report.values)
        for key in KEPT:
            if key in said:
                values[key] = said[key]
        if said.get("recipe"):
            values["recipe"] = {**said["recipe"], "format": values["format"]}
        layers = {one.get("layer"): one for one in said.get("layers", ())}
        for one in values["layers"]:
            was = layers.get(one["layer"], {})
            one |= {key: was[key] for key in _OF_LAYERS if key in was}
            one["snr_db"] = {name: was.get("snr_db", {}).get(name, snr) for name, snr in one["snr_db"].items()}
        values[CONVERTED] = converted_from(before, self.again)
        return Report(values)

    def _companions(self, report: Report) -> dict[str, bytes]:
        """What lies beside the shards, with the scales that were folded into the weights."""
        return {**super()._companions(report), **_weights(self.source).folded()}

    def _check_whole(self, units: Mapping[str, Mapping[str, Any]], sums: Mapping[str, str]) -> None:
        """As of any build; plain weights are opened as a source is."""
        if self.plan.format.name not in DTYPES:
            super()._check_whole(units, sums)
            return
        self._check_files(units, sums)
        Source.open(self.out)


def converted_from(before: CodedWeights, again: Mapping[str, str]) -> dict[str, Any]:
    """What a report says of the conversion.

    Args:
        before: What was converted.
        again: Linears that were rounded again, each with why.
    """
    return {"from": before.layout, "rounded_again": dict(again), "method_known": bool(before.report().get("recipe"))}


def _weights(source: Source) -> CodedWeights:
    assert isinstance(source.checkpoint, CodedWeights)
    return source.checkpoint
