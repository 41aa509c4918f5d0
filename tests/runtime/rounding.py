"""Whether a model's bf16 logits are those of another within bf16's rounding.

What rounding is allowed is measured, not guessed: transformers computes the same dequantized weights in float32
(``exact``) and in bf16 (``rounded``), and the distance between the two is what rounding costs. The packed model in bf16
must lie no farther from ``exact``. It rounds where transformers does, only the sum over experts less often, so the
two errors are draws from one distribution:

RMS
    :data:`RMS_RATIO` times ``rounded``'s. A token's mean square error scatters by about its own size between tokens, so
    the ratio of two root mean squares over n tokens has a standard error of ``sqrt(2) / (2 sqrt(n))`` or less; for 384
    tokens, paired, it is 2 %. A tenth is five of those. Measured on eleven build types of the bundled model: 0.95 to
    1.03.
Largest
    :data:`LARGEST_RATIO` times ``rounded``'s. The largest of N = 786,432 normal errors stands at ``sqrt(2 ln N)`` = 5.2
    standard deviations and scatters by 0.2 of one, but one token's scale differs between two bf16 models by up to 1.9
    times (in 98 of 100). Measured: 0.75 to 1.22; a wrong expert costs 3 to 17.

Both hold only while the same experts compute. Where the last expert chosen and the first one left out are closer than
bf16 tells apart, a model in bf16 takes the other one than in float32, whoever computes it, and the logits of that token
and of those that see it move by up to forty times the rounding: that, and no bug, is why free-running models of equal
quality differ by a factor of two in RMS. So all three models replay the experts that ``exact`` chooses, and what a
router would have chosen itself is held against a bound of its own.

Near ties
    With the router's input x, its rows w and its logits l of ``exact``, taking expert b instead of a is excused while
    ``l_a - l_b <= r sum_i |w_a,i - w_b,i| |x_i| + u (|l_a| + |l_b|)``. u = 2**-8 is bf16's unit roundoff, and r what
    all roundings before this router amount to: the relative error of its input in ``rounded``, root mean square over
    all tokens (1 to 2 u in the bundled model, more where random norms have outliers). The bound has all their signs
    aligned; they are random, and over n = 256 inputs add up to a tenth of that, so it is ten standard deviations of
    the typical token, and three of one whose error is three times as large. One in seven of all tokens and layers has
    its last two experts so close. Measured, differences reach 0.5 of the bound (0.7 in transformers' own bf16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

RMS_RATIO = 1.1
LARGEST_RATIO = 2.0
UNIT_ROUNDOFF = 2.0**-8


@dataclass(frozen=True)
class Routing:
    """What one router saw and would have chosen, all in float32.

    Attributes:
        inputs: [tokens, hidden].
        logits: [tokens, experts].
        chosen: int64 [tokens, top_k].
    """

    inputs: Tensor
    logits: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Pass:
    """A model's output: ``logits`` float32 [sequences, length, vocabulary], and its routers' in their order."""

    logits: Tensor
    routings: list[Routing] = field(default_factory=list)


def routers(model: nn.Module) -> list[Any]:
    """The routers of a model of transformers."""
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


def forward(model: Any, ids: Tensor, replayed: Sequence[Routing] | None = None) -> Pass:
    """Run a model.

    Args:
        model: In evaluation mode.
        ids: int64 [sequences, length].
        replayed: Whose experts are taken, layer by layer, weighted by the model's own router.
    """
    routings: list[Routing] = []
    with _watched(model, routings, replayed), torch.no_grad():
        logits: Tensor = model(ids).logits
    return Pass(logits.float(), routings)


@contextmanager
def _watched(model: nn.Module, routings: list[Routing], replayed: Sequence[Routing] | None) -> Iterator[None]:
    def watch(router: Any, arguments: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, chosen = output
        inputs = arguments[0].reshape(len(logits), -1).float()
        routings.append(Routing(inputs, logits.float(), chosen))
        if replayed is None:
            return output
        chosen = replayed[len(routings) - 1].chosen
        own = torch.softmax(logits.float(), -1).gather(-1, chosen)
        if getattr(router, "norm_topk_prob", True):
            own = own / own.sum(-1, keepdim=True)
        return logits, own.to(weights.dtype), chosen

    handles = [router.register_forward_hook(watch) for router in routers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def assert_within_bf16_rounding(packed: Any, rounded: Any, exact: Any, ids: Tensor) -> None:
    """Hold ``packed`` in bf16 against ``exact`` in float32, by what ``rounded``, transformers in bf16, is off.

    Args:
        packed: The model under test.
        rounded: transformers' model of the dequantized weights in bf16.
        exact: The same in float32.
        ids: int64 [sequences, length].
    """
    wanted = forward(exact, ids)
    ours, theirs = (forward(model, ids, wanted.routings) for model in (packed, rounded))
    assert len(ours.routings) == len(wanted.routings)
    _assert_no_farther("logits", ours.logits, theirs.logits, wanted.logits)
    for layer, (got, other, true) in enumerate(zip(ours.routings, theirs.routings, wanted.routings, strict=True)):
        _assert_no_farther(f"router {layer}", got.logits, other.logits, true.logits)
        relative = float(torch.linalg.vector_norm(other.inputs - true.inputs) / torch.linalg.vector_norm(true.inputs))
        worst = max(excess(got, true, routers(exact)[layer].weight.detach(), relative), default=0.0)
        assert worst <= 1.0, f"router {layer} takes another expert at {worst:.2f} times the gap that rounding excuses"


def _assert_no_farther(what: str, ours: Tensor, theirs: Tensor, wanted: Tensor) -> None:
    got, allowed = (ours - wanted).abs(), (theirs - wanted).abs()
    rms, largest = got.square().mean().sqrt(), got.max()
    assert rms < RMS_RATIO * allowed.square().mean().sqrt(), f"{what}: RMS {rms:.5f}"
    assert largest < LARGEST_RATIO * allowed.max(), f"{what}: largest {largest:.5f}"


def excess(got: Routing, wanted: Routing, weight: Tensor, relative: float) -> Iterator[float]:
    """The gap over the bound of each expert that was exchanged for another.

    Args:
        got: What the model under test would have chosen.
        wanted: What the exact one chose.
        weight: The router's, float32 [experts, hidden].
        relative: By how much rounding moves the router's input, relative to its length.
    """
    none = torch.zeros(wanted.logits.shape, dtype=torch.bool)
    true, own = none.scatter(1, wanted.chosen, True), none.scatter(1, got.chosen, True)
    for token in (true != own).any(-1).nonzero().flatten().tolist():
        x, logits = wanted.inputs[token], wanted.logits[token]
        for a in (true & ~own)[token].nonzero().flatten():
            for b in (own & ~true)[token].nonzero().flatten():
                moved = relative * ((weight[a] - weight[b]).abs() * x.abs()).sum()
                yield float((logits[a] - logits[b]) / (moved + UNIT_ROUNDOFF * (logits[a].abs() + logits[b].abs())))
