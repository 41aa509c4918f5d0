"""How long passes over a model take, as numbers of multiplications: modelled from shapes, to compare them."""

from __future__ import annotations

from collections.abc import Iterator

from qconv.core.architecture import Architecture, Layer, Linear, Moe
from qconv.core.settings import CalibrationSettings, RefineSettings


def forward_products(architecture: Architecture, tokens: int) -> int:
    """Of tokens that pass the layers once, each by the experts that it is sent to; attention's scores aside."""
    return tokens * sum(_active(layer) for layer in architecture.layers)


def sensitivity_products(architecture: Architecture, tokens: int, gradients: bool) -> int:
    """Of ``qconv sensitivity``: the layers once or, with gradients, three times and their attention a fourth time.

    Going back computes each layer again and then the gradients of its inputs; logits and their gradients come between.
    """
    once = forward_products(architecture, tokens)
    if not gradients:
        return once
    attention = sum(linear.numel for layer in architecture.layers for linear in layer.attention.linears())
    return 3 * once + tokens * (attention + 2 * architecture.embedding.numel)


def calibration_products(architecture: Architecture, calibration: CalibrationSettings, refine: RefineSettings) -> float:
    """Of calibrated rounding by GPTQ: the streams' passes and second moments, then factors and compensation.

    A linear of r x c takes ``r c^2`` to compensate and twice that for each sweep or refit; factors of c inputs' second
    moments take about ``c^3`` (Frantar et al. 2022, section 3.3).
    """
    tokens, streams = calibration.tokens, calibration.streams
    moments, factors = 0.0, 0
    for layer in architecture.layers:
        for seen, inputs in _inputs(layer):
            moments += seen * inputs**2
            factors += inputs**3
    steps = 1 + 2 * (refine.sweeps + refine.refits)
    linears = (linear for layer in architecture.layers for linear in layer.linears())
    compensation = steps * sum(linear.numel * linear.in_features for linear in linears)
    return streams * (forward_products(architecture, tokens) + tokens * moments) + factors + compensation


def _active(layer: Layer) -> int:
    """Weights that a token meets."""
    numel = sum(linear.numel for linear in (*layer.attention.linears(), *layer.routers()))
    if not isinstance(layer.mlp, Moe):
        return numel + _numel(layer.mlp.linears())
    shared = layer.mlp.shared_expert
    return numel + layer.mlp.top_k * _numel(layer.mlp.experts[0].linears()) + _numel(shared.linears() if shared else ())


def _inputs(layer: Layer) -> Iterator[tuple[float, int]]:
    """Of inputs that linears share: the share of tokens that is seen, and how many features they have."""
    for group in layer.groups():
        yield 1.0, group.in_features
    experts = layer.mlp.experts if isinstance(layer.mlp, Moe) else ()
    for number, mlp in enumerate(layer.mlps()):
        routed = isinstance(layer.mlp, Moe) and number < len(experts)
        seen = layer.mlp.top_k / len(experts) if isinstance(layer.mlp, Moe) and routed else 1.0
        yield seen, mlp.gate.in_features
        yield seen, mlp.down.in_features


def _numel(linears: tuple[Linear, ...]) -> int:
    return sum(linear.numel for linear in linears)
