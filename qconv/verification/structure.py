"""Whether a build holds every tensor of its model, and says of each linear what is so."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qconv.artifacts.build import Build
from qconv.artifacts.verbatim import parts_of
from qconv.boundary.printable import name_of
from qconv.checkpoint.fp8 import ACTIVATION_LEAVES, is_cache_scale
from qconv.core.architecture import Linear
from qconv.verification.outcome import Verification
from qconv.verification.verbatim import check_listed

_ACTIVATIONS = (*ACTIVATION_LEAVES, "input_zero_point", "output_scale", "output_zero_point")
"""Leaf names of what other tools store of a linear's activations."""


def check_structure(build: Build, result: Verification) -> None:
    """Every tensor of the model once, of its shape, none besides; the skip list equal to what was skipped.

    What other tools' builds may hold too, and how they list what they skip, is no fault of theirs.
    """
    expected = dict(build.expected_tensors())
    entries = build.checkpoint.entries
    for name in expected.keys() - entries.keys():
        result.problems.append(f"tensor {name} is missing")
    unused = set() if build.is_ours else unused_tensors(build)
    verbatim = build.verbatim()
    beside = {one.name for one in verbatim}
    for name in entries.keys() - expected.keys() - unused - beside:
        result.problems.append(f"{entries[name].file.name}: tensor {name_of(name)} is not part of the model")
    for name in expected.keys() & entries.keys():
        if entries[name].shape != expected[name]:
            result.problems.append(f"tensor {name} is {list(entries[name].shape)}, not {list(expected[name])}")
    # Older tools' own files beside config.json have no such list.
    listed = build.format.lists_skipped
    if listed and build.is_ours and "quantization_config" in build.checkpoint.config:
        result.problems += _differences(build)
        check_listed(build, verbatim, result)
    elif listed:
        differences = list(_differences(build))
        if differences:
            more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
            result.notices.append(f"{differences[0]}{more}: readers differ in what they make of that")
    if unused:
        first = name_of(min(unused))
        result.notices.append(f"{len(unused)} tensors say nothing about weights and are not used, the first {first}")
    if verbatim and not build.is_ours:
        result.notices.append(f"{', '.join(map(str, parts_of(verbatim)))} beside the model are not looked at")
    result.problems.sort()
    result.checked.append(f"{len(expected)} tensors present once with their shapes, skip list of {len(build.skipped)}")


def unused_tensors(build: Build) -> set[str]:
    """Tensors that other tools store beside a model's own, and that nobody needs to compute with its weights.

    Scales of a quantized cache and of activations, biases of zeros for linears that have none (AutoGPTQ's), the order
    of groups that are in order, a tied head's copy.
    """
    linears = {linear.name: linear for linear in _linears(build)}
    found = set(build.architecture.ignorable() & build.checkpoint.entries.keys())
    for name in build.checkpoint.entries:
        module, _, leaf = name.rpartition(".")
        if is_cache_scale(name) or (module in linears and _is_unused(build, linears[module], leaf)):
            found.add(name)
    return found - {name for name, _ in build.expected_tensors()}


def _is_unused(build: Build, linear: Linear, leaf: str) -> bool:
    if leaf == "bias":
        return not linear.bias and _is_zero(build, f"{linear.name}.bias")
    return leaf in _ACTIVATIONS or (leaf in ("g_idx", "weight_g_idx") and not build.grid_of(linear).act_order)


def _linears(build: Build) -> Iterator[Linear]:
    for layer in build.architecture.layers:
        yield from layer.routers()
        yield from layer.linears()


def _is_zero(build: Build, name: str) -> bool:
    return build.checkpoint.entry(name).dtype.is_floating_point and not bool(torch.any(build.checkpoint.read(name)))


def _differences(build: Build) -> Iterator[str]:
    """Linears that are quantized though the skip list holds them, or not though it does not."""
    head = build.architecture.lm_head
    quantized = {linear.name: build.is_quantized(linear) for linear in _linears(build)}
    # A tied head has no tensor of its own, and is a linear to readers all the same.
    quantized[build.architecture.head_name] = head is not None and build.is_quantized(head)
    for name, is_quantized in quantized.items():
        skipped = build.is_skipped(name)
        if skipped == is_quantized:
            state, listed = ("quantized", "is") if skipped else ("not quantized", "is not")
            yield f"{name} is {state} but {listed} on the skip list"
