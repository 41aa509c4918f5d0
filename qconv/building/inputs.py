"""What a run belongs to: fingerprints of everything that its bytes depend on.

A run is continued only with the same ones, and a finished build is taken for the one that was asked for only if they
are its own.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Literal
from urllib.parse import quote

import torch

from qconv import __version__
from qconv.artifacts.source import Source
from qconv.building import arithmetic
from qconv.calibration.corpus import TokenSet
from qconv.core.devices import name_of
from qconv.errors import ResourceError, UsageError
from qconv.folders.journal import COMPANIONS, PROCESSOR

ARITHMETIC = "arithmetic"
RECIPE = "recipe"
Companions = Literal["copied", "embedded", "left out"]


def fingerprints(
    source: Source,
    recipe: str,
    tokens: TokenSet | None,
    files: Sequence[str] = (),
    *,
    adds_up: bool,
    companions: Companions,
) -> dict[str, str]:
    """What a run belongs to.

    Args:
        source: The model.
        recipe: The digest of what was asked for.
        tokens: What it is calibrated on; None for no calibration.
        files: Digests of other files that the bytes depend on.
        adds_up: Whether anything besides calibration depends on the order in which torch adds up.
        companions: What becomes of the source's tokenizer, chat template and generation config.
    """
    versions = {"qconv": __version__, "torch": torch.__version__, "machine": platform.machine()}
    data = list(files)
    if tokens is not None:
        versions["transformers"] = version("transformers")
        data.append(tokens.digest)
    found = {
        "weights": source.checkpoint.fingerprint(),
        RECIPE: recipe,
        "calibration data": "+".join(data) or "none",
        "versions": " ".join(f"{name}={number}" for name, number in sorted(versions.items())),
    }
    if tokens is not None or adds_up:
        found |= {ARITHMETIC: f"cpu={arithmetic.digest()}", PROCESSOR: arithmetic.processor()}
    if companions == "copied":
        found[COMPANIONS] = _pairs(source.companion_digests())
    elif companions == "embedded":
        digests = source.companion_digests()
        kept = {name: digest for name, digest in digests.items() if not name.startswith("LICENSE")}
        found["embedded files"] = _pairs({"name": source.name} | kept)
    return found


def on_devices(found: Mapping[str, str], devices: Sequence[torch.device]) -> dict[str, str]:
    """The fingerprints of a run of which devices compute what is added up; the processor does the rest.

    Devices whose arithmetic is the processor's count for nothing: either may go on with what the other began.

    Raises:
        ResourceError: a device's memory is used up.
        UsageError: the devices' arithmetic differs, so that the bytes would depend on who did what.
    """
    if ARITHMETIC not in found or devices[0].type == "cpu":
        return dict(found)
    first, digests = devices[0], {}
    for device in devices:
        try:
            digest = digests[device] = arithmetic.digest(device)
        except torch.OutOfMemoryError as error:
            hint = "Does another process use it? Choose another device, or --devices cpu."
            raise ResourceError(f"--devices: {device} has no memory left.", hint=hint) from error
        if digest != digests[first]:
            raise UsageError(
                f"--devices: {first} ({name_of(first)}) and {device} ({name_of(device)}) compute other last bits.",
                hint="Choose devices of one model.",
            )
    own = f"cpu={digests[first]}"
    if found[ARITHMETIC] == own:
        return dict(found)
    said = f"{found[ARITHMETIC]} {first.type}={digests[first]}"
    return {**found, ARITHMETIC: said, PROCESSOR: f"{found[PROCESSOR]}; {name_of(first)}"}


def merged(belongs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What a run of several builds belongs to, given each one's fingerprints by its name; of one, that one's.

    What differs from build to build by its nature is named after it; of the rest the different values stand together.
    """
    if len(belongs) == 1:
        return dict(*belongs.values())
    found: dict[str, list[str]] = {}
    for name, one in belongs.items():
        for key, value in one.items():
            values = found.setdefault(f"{key} of {name}" if key == RECIPE else key, [])
            if value not in values:
                values.append(value)
    return {key: " ".join(values) for key, values in found.items()}


def _pairs(values: Mapping[str, str]) -> str:
    """``name=value`` pairs, the values cut to 16 characters; no character in them divides pairs."""
    return " ".join(f"{quote(name, safe='')}={quote(value[:16], safe='')}" for name, value in values.items())


def lasting(found: Mapping[str, str]) -> dict[str, str]:
    """Of a run's fingerprints those that a build's report keeps: the same on every processor of the same arithmetic."""
    return {key: value for key, value in found.items() if key != PROCESSOR}
