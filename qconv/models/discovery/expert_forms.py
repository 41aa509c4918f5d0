"""How transformers' experts are held together and gated, shown on two small ones."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qconv.models.discovery.stand_ins import Unproved, require_equal, running
from qconv.models.gating import Own, gating_of, is_linear_in_up, takes_turns

_TOKENS = 6
_WIDTH = 4
"""Of the experts that stand for those of a model."""


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """How experts are held together.

    Attributes:
        transposed: Whether their matrices are [in_features, out_features].
        interleaved: Whether the rows of gate and up come by turns.
        folds: Whether down's input is linear in up's outputs.
    """

    transposed: bool
    interleaved: bool
    folds: bool


def is_told(experts: nn.Module) -> bool:
    """Whether experts are told who was chosen, and do not read scaled inputs of all behind each other."""
    return len(inspect.signature(type(experts).forward).parameters) > 2


def form_of(
    empty: nn.Module,
    name: str,
    hidden: int,
    config: Any,
    random: Callable[..., Tensor],
    transposed: bool,
    interleaved: bool,
) -> ExpertForm:
    """The form of a model's experts, where two small ones in the place of all are held so.

    Args:
        empty: transformers' module of them; not changed.
        name: What it is called.
        hidden: The width of what they read.
        config: The model's.
        random: Gives normal numbers of a shape.
        transposed, interleaved: See :class:`ExpertForm`.

    Raises:
        Unproved: they are not held so, or compute something else.
    """
    with running(name):
        module: Any = copy.deepcopy(empty)
        module.__dict__.pop("forward", None)  # the stand-in of the trace
        joined, down = random(2, 2 * _WIDTH, hidden), random(2, hidden, _WIDTH)
        biases = {"gate_up_proj_bias": random(2, 2 * _WIDTH), "down_proj_bias": random(2, hidden)}
        biases = {leaf: bias for leaf, bias in biases.items() if hasattr(module, leaf)}
        held = {"gate_up_proj": joined, "down_proj": down}
        held = {leaf: weight.transpose(1, 2).contiguous() if transposed else weight for leaf, weight in held.items()}
        for leaf, tensor in {**held, **biases}.items():
            setattr(module, leaf, nn.Parameter(tensor))
        module.num_experts = 2
        module.config = copy.copy(config)
        module.config._experts_implementation = "eager"
        gating = gating_of(module, interleaved)
        if isinstance(gating, Own) and takes_turns(gating) != interleaved:
            raise Unproved(f"{name} hold gate and up in another way")
        tokens, factors = random(_TOKENS, hidden), random(_TOKENS, 2)
        indices = torch.tensor([[0, 1], [1, 0]] * (_TOKENS // 2))
        if not is_told(module):
            factors = torch.ones_like(factors)
            output = module(tokens.repeat(2, 1)).view(2, _TOKENS, hidden).sum(0)
        else:
            output = module(tokens, indices, factors)
        expected = torch.zeros_like(tokens)
        for expert in range(2):
            both = tokens @ joined[expert].t()
            if "gate_up_proj_bias" in biases:
                both = both + biases["gate_up_proj_bias"][expert]
            gate, up = (both[:, ::2], both[:, 1::2]) if interleaved else both.chunk(2, dim=-1)
            made = gating(gate, up) @ down[expert].t()
            if "down_proj_bias" in biases:
                made = made + biases["down_proj_bias"][expert]
            expected += made * (factors * (indices == expert)).sum(-1, keepdim=True)
        require_equal(output, expected, f"{name} are not gated as their config says")
        return ExpertForm(transposed, interleaved, is_linear_in_up(gating))
