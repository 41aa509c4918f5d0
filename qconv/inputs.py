"""What a run belongs to: fingerprints of everything that its bytes depend on.

A run is continued only with the same ones, and a finished build is taken for the one that was asked for only if they
are its own.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

import torch

from qconv import __version__, arithmetic
from qconv.calibration.corpus import TokenSet
from qconv.manifest import PROCESSOR
from qconv.source import Source

ARITHMETIC = "arithmetic"


def fingerprints(
    source: Source, recipe: str, tokens: TokenSet | None, files: Sequence[str] = (), *, adds_up: bool
) -> dict[str, str]:
    """What a run belongs to.

    Args:
        source: The model.
        recipe: The digest of what was asked for.
        tokens: What it is calibrated on; None for no calibration.
        files: Digests of other files that the bytes depend on.
        adds_up: Whether anything besides calibration depends on the order in which torch adds up.
    """
    versions = {"qconv": __version__, "torch": torch.__version__, "machine": platform.machine()}
    data = list(files)
    if tokens is not None:
        versions["transformers"] = version("transformers")
        data.append(tokens.digest)
    found = {
        "weights": source.checkpoint.fingerprint(),
        "recipe": recipe,
        "calibration data": "+".join(data) or "none",
        "versions": " ".join(f"{name}={number}" for name, number in sorted(versions.items())),
    }
    if tokens is not None or adds_up:
        found |= {ARITHMETIC: f"cpu={arithmetic.digest()}", PROCESSOR: arithmetic.processor()}
    return found


def lasting(found: dict[str, str]) -> dict[str, str]:
    """Of a run's fingerprints those that a build's report keeps: the same on every processor of the same arithmetic."""
    return {key: value for key, value in found.items() if key != PROCESSOR}
