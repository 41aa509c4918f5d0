"""``--target-size`` and ``--target-bits``: the best GGUF build of a size, as ``qconv plan`` shows and saves it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qconv.cli.console import bits, print_json, print_table, say, size, stdout
from qconv.errors import UsageError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from qconv.planning.gguf_recipe import GgufRecipe
    from qconv.sensitivity.allocating import Allocation

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``240GB``.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([kKMGT]?i?B)\s*", text)
    if found is None or found[2] not in _UNITS:
        raise UsageError(f"--target-size: {text!r} is no size.", hint=f"Write a number and one of {', '.join(_UNITS)}.")
    return int(float(found[1]) * _UNITS[found[2]])


def plan_target(
    model: str,
    recipe: GgufRecipe,
    *,
    target_size: str | None,
    target_bits: float | None,
    sensitivity: str | None,
    excluded: Sequence[str],
    save: Path | None,
    as_json: bool,
) -> None:
    """Choose types, show them, and save the recipe.

    Raises:
        UsageError: the options do not go together, or the size is too small.
        OutputError: the recipe cannot be saved.
    """
    if (target_size is None) == (target_bits is None):
        raise UsageError("--target-size and --target-bits: give one of them.")
    if sensitivity is None:
        raise UsageError(
            "--target-size, --target-bits: need --sensitivity, which says where bits count.",
            hint="Make it with qconv sensitivity MODEL -o OUT.",
        )
    from qconv.artifacts.source import Source
    from qconv.checkpoint.hub import resolve_model
    from qconv.checkpoint.writer import write_atomically
    from qconv.executors.threads import Threads
    from qconv.sensitivity.allocating import Target, allocate, read_sensitivity

    size_bytes = None if target_size is None else parse_size(target_size)
    statistics = read_sensitivity(Path(sensitivity))
    types = _types(excluded)
    with Threads() as workers:
        source = Source.open(resolve_model(model))
        found = allocate(source, statistics, recipe, Target(size_bytes, target_bits), types, workers)
    if save is not None:
        write_atomically(save, _yaml(found).encode())
    if as_json:
        print_json(_values(found))
    else:
        _print(found, save)


def _types(excluded: Sequence[str]) -> list[GGMLQuantizationType]:
    from qconv.sensitivity.errors import TYPES

    left = [one for one in TYPES if not any(fnmatch.fnmatchcase(one.name, pattern.upper()) for pattern in excluded)]
    for pattern in excluded:
        if not any(fnmatch.fnmatchcase(one.name, pattern.upper()) for one in TYPES):
            known = ", ".join(one.name for one in TYPES)
            raise UsageError(f"--exclude-type {pattern!r}: is none of {known}.")
    if not left:
        raise UsageError("--exclude-type: leaves no type to choose.")
    return left


def _values(found: Allocation) -> dict[str, Any]:
    return {
        "predicted_kld": found.predicted,
        "output_bytes": found.size,
        "bits_per_weight": found.bits,
        "types": {name: type.name for name, type in found.types.items()},
        "curve": [{"bits_per_weight": size, "predicted_kld": loss} for size, loss in found.curve],
        "recipe": found.recipe.model_dump(mode="json"),
    }


def _yaml(found: Allocation) -> str:
    said = f"# {found.bits:.3f} bits per weight, {found.size:,} bytes, predicted KL divergence {found.predicted:.3g}\n"
    return said + yaml.safe_dump(found.recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def _print(found: Allocation, save: Path | None) -> None:
    console = stdout()
    layers: dict[str, dict[str, str]] = {}
    roles: dict[str, None] = {}
    for name, type in found.types.items():
        parts = name.removesuffix(".weight").split(".")
        layer, role = (parts[1], parts[2]) if parts[0] == "blk" else ("", parts[0])
        if layer:
            roles[role] = None
        layers.setdefault(layer, {})[role] = type.name
    outside = layers.pop("", {})
    rows = [(layer, *(by_role.get(role, "") for role in roles)) for layer, by_role in layers.items()]
    print_table(console, ("layer", *roles), rows)
    say(console, "")
    for role, called in outside.items():
        say(console, f"{role:<13}{called}")
    say(console, "")
    print_table(console, ("bits", "predicted KLD"), [(bits(size), f"{loss:.3g}") for size, loss in found.curve])
    say(console, "")
    say(console, f"output       {size(found.size)}, {found.bits:.3f} bits per weight")
    say(console, f"predicted    mean KL divergence {found.predicted:.3g} (measured, it is one to three times as much)")
    if save is not None:
        say(console, f"recipe       {save}")
