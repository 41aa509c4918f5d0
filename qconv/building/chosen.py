"""What a build whose grids were chosen for a size says of the choice: what it belongs to, and a part of its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qconv.boundary.printable import markdown_text
from qconv.building.inputs import RECIPE

ALLOCATION = "allocation"
"""The key of the choice in a report."""
_SENSITIVITY = "sensitivity"


@dataclass(frozen=True, slots=True)
class Chosen:
    """How a build's grids were chosen.

    Attributes:
        request: Digest of what was asked for: the size, what was excluded, and the recipe without the choice.
        sensitivity: Digest of the file by which it was chosen, or of the tokens on which that was measured.
        values: For the report: what was asked for and what is predicted.
    """

    request: str
    sensitivity: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def instead(self, fingerprints: Mapping[str, str]) -> dict[str, str]:
        """Fingerprints of a build that name the request, since its recipe is what comes of it."""
        return {**fingerprints, RECIPE: self.request, _SENSITIVITY: self.sensitivity}


def allocation_values(chosen: Chosen | None) -> dict[str, Any]:
    """What a report says of a choice; nothing where there was none."""
    return {} if chosen is None else {ALLOCATION: dict(chosen.values)}


def allocation_lines(report: Mapping[str, Any]) -> list[str]:
    """What a model card says of a choice; nothing where there was none."""
    values = report.get(ALLOCATION)
    if values is None:
        return []
    bits, size = values.get("target_bits"), values.get("target_size")
    wanted = f"{size:,} bytes" if bits is None else f"{bits:g} bits per weight"
    without = ", ".join(map(markdown_text, values["excluded_types"]))
    return [
        "## Choice",
        f"Grids were chosen for {wanted}{f', without {without}' if without else ''}, by "
        f"{markdown_text(values['sensitivity'])}; {predicted_words(values)}. The recipe below makes the same weights "
        "without the choice.",
    ]


def predicted_words(values: Mapping[str, Any]) -> str:
    """What is predicted of a choice, given its part of a report."""
    if "predicted_kld" in values:
        return f"predicted mean KL divergence {values['predicted_kld']:.3g} nats"
    return f"estimated relative error of the logits {values['predicted_relative_error']:.3g}"
