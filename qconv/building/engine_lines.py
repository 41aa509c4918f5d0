"""What a model card says of engines, which load the build and what else is to be known, and of an extended context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qconv.boundary.printable import markdown_text
from qconv.checkpoint.extended_rope import ExtendedRope


def engine_lines(engines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paragraphs of a card, from the values of its report; none where a report has none."""
    if not engines:
        return []
    rows = [
        f"| {one['engine']} | {one['version']} | {one['verdict']} | "
        f"{markdown_text('; '.join(finding['what'] for finding in one['findings']))} |"
        for one in engines
    ]
    return [
        "## Engines",
        "By rules of which each has a source, without a run here; `qconv check .` names the sources and remedies.",
        "\n".join(("| engine | version | verdict | why |", "| --- | --- | --- | --- |", *rows)),
    ]


def rope_lines(recipe: Mapping[str, Any]) -> list[str]:
    """What a card says of a rope that was asked for; nothing where the source's was kept."""
    asked = recipe.get("rope")
    if asked is None:
        return []
    factor = ExtendedRope.parse(str(asked)).factor
    return [
        "## Context",
        f"Extended by YaRN with a factor of {factor:g}, which the source does not have (`rope: {asked}`). Engines use "
        "it for short texts too, where it costs quality: for those, a build without it is better.",
    ]
