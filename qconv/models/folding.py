"""AWQ's scales folded into the operation before a linear, and what that does to every tensor around them.

Dividing a producer's output channel by s and multiplying the consumers' column by s changes nothing in full precision.
Producers are norms (their consumers are q, k, v, or gate and up of **every** expert, the router and the shared expert's
gate) and linears (v before o, up before down).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.core.architecture import Architecture, Layer, Linear, Module, Norm

SCALE_SUFFIX = ".scale"
"""A fold's tensor in a scales file is its producer's name with this suffix."""


@dataclass(frozen=True, slots=True)
class Folds:
    """What was folded into one layer.

    Attributes:
        scales: By producer's module name, float32 [channels]: what its output was divided by.
        producers: For every linear of the layer, routers included, the module whose output is its input.
        repeats: How many attention heads read one key-value head.
        head_dim: Channels of a head.
    """

    scales: Mapping[str, Tensor]
    producers: Mapping[str, str]
    repeats: int = 1
    head_dim: int = 1

    @classmethod
    def of(cls, model: Architecture, layer: Layer, scales: Mapping[str, Tensor]) -> Folds:
        """The folds of a layer."""
        repeats = model.num_attention_heads // model.num_key_value_heads
        return cls(scales, producers(layer), repeats, model.head_dim)

    @classmethod
    def none(cls) -> Folds:
        """Nothing folded."""
        return cls({}, {})

    def input_scale(self, linear: Linear) -> Tensor | None:
        """What the columns of ``linear`` are multiplied by, float32 [in_features], or None."""
        scale = self.scales.get(self.producers.get(linear.name, ""))
        if scale is None or scale.numel() == linear.in_features:
            return scale
        return spread_heads(scale, self.repeats, self.head_dim)

    def output_scale(self, module: Module) -> Tensor | None:
        """What the output of ``module`` is divided by, float32 [channels], or None."""
        return self.scales.get(module.name)

    def touches(self, module: Module) -> bool:
        """Whether folding changes any tensor of ``module``."""
        return module.name in self.scales or self.producers.get(module.name) in self.scales

    def expected(self, module: Module, name: str, tensor: Tensor) -> Tensor:
        """What an unquantized tensor of the source must be in the build, in the source's dtype."""
        out_scale = self.output_scale(module)
        if not isinstance(module, Linear) or name != module.weight:
            return folded_vector(tensor, out_scale, module.offset if isinstance(module, Norm) else 0.0)
        in_scale = self.input_scale(module)
        if in_scale is None and out_scale is None:
            return tensor
        return folded_weight(tensor, in_scale, out_scale).to(tensor.dtype)


def producers(layer: Layer) -> dict[str, str]:
    """For every linear of a layer, routers included, the name of the module whose output is its input."""
    table = dict.fromkeys((router.name for router in layer.routers()), layer.post_attention_norm.name)
    for group in layer.groups():
        if group.producer is not None:
            table |= dict.fromkeys((one.name for one in (*group.linears, *group.unquantized)), group.producer.name)
    for mlp in layer.mlps():
        table |= {mlp.gate.name: layer.post_attention_norm.name, mlp.up.name: layer.post_attention_norm.name}
        if mlp.folds:
            table[mlp.down.name] = mlp.up.name
    return table


def output_channels(layer: Layer) -> dict[str, int]:
    """By name, how many channels each module of a layer puts out that another's input is."""
    made = [group.producer for group in layer.groups() if group.producer is not None]
    norms = [producer for producer in made if isinstance(producer, Norm)]
    channels = {norm.name: norm.size for norm in (*norms, layer.post_attention_norm)}
    channels |= {producer.name: producer.out_features for producer in made if isinstance(producer, Linear)}
    return channels | {mlp.up.name: mlp.up.out_features for mlp in layer.mlps() if mlp.folds}


def spread_heads(scale: Tensor, repeats: int, head_dim: int) -> Tensor:
    """A scale of v's output channels, [kv_heads * head_dim], as seen by o's input, [heads * head_dim].

    With grouped queries several heads read one key-value head, so its channels repeat.
    """
    return scale.view(-1, 1, head_dim).expand(-1, repeats, -1).reshape(-1)


def folded_weight(weight: Tensor, in_scale: Tensor | None, out_scale: Tensor | None) -> Tensor:
    """``weight`` float32 [out, in] with columns times ``in_scale`` and rows divided by ``out_scale``; a new tensor."""
    folded = weight.to(torch.float32, copy=True)
    if in_scale is not None:
        folded.mul_(in_scale)
    if out_scale is not None:
        folded.div_(out_scale.unsqueeze(-1))
    return folded


def folded_vector(vector: Tensor, scale: Tensor | None, offset: float = 0.0) -> Tensor:
    """A norm's weight or a bias after folding, in its own dtype; ``offset`` is what a norm adds to its weight."""
    if scale is None:
        return vector
    folded = (vector.float() + offset) / scale
    return (folded - offset if offset else folded).to(vector.dtype)


def norm_scale(norm: Tensor, wanted: Tensor, offset: float = 0.0) -> Tensor:
    """The scale that folding into a norm really applies, float32 [hidden].

    The norm is stored in its own dtype, so ``norm / wanted`` is rounded; dividing back gives the factor that the
    consumers must be multiplied by for an exact equivalence. A channel whose norm is 0 carries nothing and keeps 1.

    Args:
        norm: The norm's weight in its stored dtype, [hidden].
        wanted: The scale to come near to, float32 [hidden].
        offset: What the norm adds to its weight.
    """
    stored, before = folded_vector(norm, wanted, offset).float() + offset, norm.float() + offset
    return torch.where(stored == 0.0, torch.ones_like(wanted), before / torch.where(stored == 0.0, 1.0, stored))
