"""What the numbers of a build can be, whatever source they stand for: finite, positive, in range."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.checkpoint.reader import require_finite
from qconv.core.architecture import Layer, Linear, Module, Norm
from qconv.core.qtensor import QTensor
from qconv.core.workers import Workers
from qconv.errors import CheckpointError
from qconv.grids.e4m3 import MAX
from qconv.grids.nearest import E2M1
from qconv.verification.outcome import Progress, Verification

_E4M3_NAN = 0x7F
"""With either sign."""

_ROOM = 1.5
"""By what an input may exceed its bound: weights are rounded, and activations to 16 bits at every step."""
_LEAST_PEAK = 0.02
"""Of a normalized input over its norm's median weight. The mean square of what a norm gives is 1, so each token's
largest element is above the smallest weight; text without one token near that has not been seen."""


def bad_parameters(weight: QTensor) -> str | None:
    """What is wrong with a quantized weight by itself, or None."""
    return not_finite(weight) or not_positive(weight)


def not_finite(weight: QTensor) -> str | None:
    """What no reader can compute with, or None."""
    if not bool(torch.isfinite(weight.scales.float()).all()):
        return "a scale is not finite"
    if weight.biases is not None and not bool(torch.isfinite(weight.biases.float()).all()):
        return "a bias is not finite"
    if not 0.0 < weight.global_scale < math.inf:
        return "its global scale is not finite and positive"
    if weight.grid.number == "e4m3":
        if bool(((weight.codes.view(torch.uint8) & _E4M3_NAN) == _E4M3_NAN).any()):
            return "a code is not a number"
    elif weight.codes.numel() and int(weight.codes.max()) >= weight.grid.levels:
        return "a code is out of range"
    if weight.grid.stores_inputs:
        if weight.input_scale is None:
            return "there is no scale for its inputs"
        if not 0.0 < float(weight.input_scale) < math.inf:
            return "the scale of its inputs is not finite and positive"
    return None


def not_positive(weight: QTensor) -> str | None:
    """What qconv never writes, though others' files compute with it, or None."""
    if weight.biases is not None:  # mlx lets codes count downwards where that reaches a group's largest magnitude
        return None
    return None if bool((weight.scales.float() > 0).all()) else "a scale is not positive"


def check_values(build: Build, result: Verification, progress: Progress | None, workers: Workers) -> None:
    """Every scale and code, every element that is not quantized, and the scales of static activations."""

    def check(linear: Linear) -> tuple[str | None, str | None]:
        try:
            weight = build.qtensor(linear)
        except CheckpointError as error:
            return error.message, None
        problem, oddity = not_finite(weight), not_positive(weight)
        return (problem or oddity, None) if build.is_ours else (problem, oddity)

    model = build.architecture
    odd: list[str] = []
    for layer in model.layers:
        if progress is not None:
            progress("scales", layer.index, len(model.layers))
        linears = [linear for linear in layer.linears() if build.is_quantized(linear)]
        for linear, (problem, oddity) in zip(linears, workers.map(check, linears), strict=True):
            if problem is not None:
                result.problems.append(f"{linear.name}: {problem}")
            odd += [] if oddity is None else [f"{linear.name}: {oddity}"]
    if odd:
        result.notices.append(f"{odd[0]} ({len(odd)} such linears), which qconv never writes")
    check_inputs(build, result, workers)
    result.problems += cache_problems(build)
    result.checked.append("every scale finite and positive, everything that is not quantized finite")


def check_inputs(build: Build, result: Verification, workers: Workers) -> None:
    """Everything that is not quantized finite, and every scale of static activations one that a text can have given."""
    result.problems += plain_problems(build, workers)
    if not result.problems:
        layers = build.architecture.layers
        result.problems += [problem for layer in layers for problem in input_scale_problems(build, layer)]


def cache_problems(build: Build) -> Iterator[str]:
    """Scales of a cache of keys and values that are not finite and positive."""
    for spec in build.cache_scales():
        entry = build.checkpoint.entries.get(spec.name)  # of an absent one the structure tells
        if entry is not None and not (entry.dtype.is_floating_point and _is_scale(build.checkpoint.read(spec.name))):
            yield f"{spec.name}: the scale of a cache is not finite and positive"


def _is_scale(tensor: Tensor) -> bool:
    return bool((torch.isfinite(tensor) & (tensor > 0)).all())


def plain_problems(build: Build, workers: Workers) -> Iterator[str]:
    """Of what is not quantized, the tensors that hold a NaN or an infinity."""
    model = build.architecture
    modules: list[Module] = [model.embedding, model.final_norm]
    for layer in model.layers:
        modules += layer.modules()
    modules += [] if model.lm_head is None else [model.lm_head]
    names = [
        name
        for module in modules
        for name, _ in module.tensors()
        if not (isinstance(module, Linear) and name == module.weight and build.is_quantized(module))
    ]

    def check(name: str) -> str | None:
        entry, row = build.checkpoint.entry(name), 0
        if not entry.dtype.is_floating_point:
            return f"{name} is {entry.dtype_name}, no floats"
        try:
            for block in build.checkpoint.blocks(name):
                require_finite(block.float() if block.element_size() == 1 else block, entry, row)
                row += len(block) if block.dim() else 1
        except CheckpointError as error:
            return error.message
        return None

    yield from (problem for problem in workers.map(check, names) if problem is not None)


def input_scale_problems(build: Build, layer: Layer) -> Iterator[str]:
    """Scales of static activations that no text can have given.

    What a norm passes on is at most the root of its size times its largest weight; what an attention or an MLP passes
    to its last linear is bounded by that and by the lengths of its rows.
    """
    if not any(_has_input_scale(build, linear) for linear in layer.linears()):
        return
    length = 0.0
    for group in layer.groups():
        if isinstance(group.producer, Norm):
            inputs, length = _scaling(build, group.producer)
            yield from _normalized(build, group.linears, inputs, length)
        elif isinstance(group.producer, Linear):
            for linear in group.linears:
                yield from _bounded(build, linear, _largest(build, group.producer, length))
    inputs, length = _scaling(build, layer.post_attention_norm)
    yield from _normalized(build, [one for mlp in layer.mlps() for one in (mlp.gate, mlp.up)], inputs, length)
    for mlp in layer.mlps():
        if mlp.folds and _has_input_scale(build, mlp.down):
            yield from _bounded(build, mlp.down, _largest(build, mlp.gate, length) * _largest(build, mlp.up, length))


def _normalized(build: Build, linears: Sequence[Linear], norm: Tensor, length: float) -> Iterator[str]:
    """Linears that share the output of a norm: engines want one scale for all of them."""
    found = {linear.name: build.input_scale(linear) for linear in linears if _has_input_scale(build, linear)}
    if not found:
        return
    name, scale = next(iter(found.items()))
    least = _LEAST_PEAK * float(norm.abs().median())
    peak = scale * _reach(build, linears[0])
    if not least <= peak <= _ROOM * length:
        yield (
            f"{name}: the scale of its inputs says that they reach {peak:.3g}; after its norm they lie "
            f"between {least:.3g} and {_ROOM * length:.3g}"
        )
    other = next((one for one, value in found.items() if value != scale), None)
    if other is not None and build.is_ours:
        yield f"{other}: the scale of its inputs is not that of {name}, which has the same inputs"


def _bounded(build: Build, linear: Linear, most: float) -> Iterator[str]:
    if not _has_input_scale(build, linear):
        return
    peak = build.input_scale(linear) * _reach(build, linear)
    if peak > _ROOM * most:
        yield (
            f"{linear.name}: the scale of its inputs says that they reach {peak:.3g}; no text makes them larger than "
            f"{_ROOM * most:.3g}"
        )


def _has_input_scale(build: Build, linear: Linear) -> bool:
    return build.is_quantized(linear) and build.grid_of(linear).stores_inputs


def _reach(build: Build, linear: Linear) -> float:
    """How many times its scale a linear's largest input is; where groups have scales of their own, of those too."""
    return MAX * E2M1.highest if build.grid_of(linear).activations == "local" else MAX


def _largest(build: Build, linear: Linear, length: float) -> float:
    """What no output of a linear exceeds for an input of that length."""
    if build.is_quantized(linear):
        weight = build.qtensor(linear).dequantize()
    else:
        weight = build.checkpoint.read(linear.weight).float()
    bias = float(build.checkpoint.read(f"{linear.name}.bias").float().abs().max()) if linear.bias else 0.0
    return float(torch.linalg.vector_norm(weight, dim=1).max()) * length + bias


def _scaling(build: Build, norm: Norm) -> tuple[Tensor, float]:
    """What a norm scales by, float32 [size], and the length that nothing that it gives exceeds."""
    scaling = build.checkpoint.read(norm.weight).float() + norm.offset
    return scaling, math.sqrt(norm.size) * float(scaling.abs().max())
