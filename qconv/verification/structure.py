"""Whether a build holds every tensor of its model, and says of each linear what is so."""

from __future__ import annotations

from qconv.build import Build
from qconv.models.base import HEAD
from qconv.verification.outcome import Verification


def check_structure(build: Build, result: Verification) -> None:
    """Every tensor of the model once, of its shape, none besides; the skip list equal to what was skipped."""
    expected = dict(build.expected_tensors())
    entries = build.checkpoint.entries
    for name in expected.keys() - entries.keys():
        result.problems.append(f"tensor {name} is missing")
    for name in entries.keys() - expected.keys():
        result.problems.append(f"{entries[name].file.name}: tensor {name} is not part of the model")
    for name in expected.keys() & entries.keys():
        if entries[name].shape != expected[name]:
            result.problems.append(f"tensor {name} is {list(entries[name].shape)}, not {list(expected[name])}")
    model = build.architecture
    linears = [linear for layer in model.layers for linear in (*layer.routers(), *layer.linears())]
    quantized = {linear.name: build.is_quantized(linear) for linear in linears}
    # A tied head has no tensor of its own, and is a linear to readers all the same.
    quantized[HEAD] = model.lm_head is not None and build.is_quantized(model.lm_head)
    for name, is_quantized in quantized.items():
        skipped = build.format.is_skipped(name, build.skipped)
        if skipped == is_quantized:
            state, listed = ("quantized", "is") if skipped else ("not quantized", "is not")
            result.problems.append(f"{name} is {state} but {listed} on the skip list")
    result.problems.sort()
    result.checked.append(f"{len(expected)} tensors present once with their shapes, skip list of {len(build.skipped)}")
