"""transformers' model without weights, and how a part of it is given those that it computes with.

The model is built on the meta device, where it costs nothing. Linears with packed weights and all experts are replaced
by modules of ours; norms, routers and embeddings stay transformers' own, with the file's tensors as their
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qconv.checkpoint.reader import in_config
from qconv.core.architecture import Layer, Linear, Moe, Norm, Parameter
from qconv.models import transformer
from qconv.models.gating import Gating, gating_of
from qconv.runtime.activations import InputRounding
from qconv.runtime.backends.base import Backend
from qconv.runtime.engine_rounding import cache_rounding
from qconv.runtime.files import ModelFiles, require_no_bias
from qconv.runtime.modules import DenseLinear, PackedEmbedding, PackedExperts, PackedLinear
from qconv.runtime.packed import BlockWeight, DenseWeight, PackedMlp, PackedWeight
from qconv.runtime.rounded import RoundedExperts, RoundedLinear, RoundedMlp


def empty_model(files: ModelFiles, dtype: torch.dtype) -> Any:
    """transformers' model for causal language modelling with everything on the meta device but rotary frequencies.

    Raises:
        CheckpointError: transformers does not accept the config.
    """
    with in_config(files.path):
        model = transformer.empty_model(transformer.config_of(files.config), dtype)
    divisors = files.inverse_frequency_divisors()
    if divisors is not None:
        rotary = model.model.rotary_emb
        rotary.inv_freq /= divisors
        rotary.original_inv_freq /= divisors
    return model


def place_rotary(model: Any, device: torch.device) -> None:
    """Put the frequencies of rotary embeddings on a device, where transformers' model without its head has some."""
    if getattr(model, "rotary_emb", None) is not None:
        model.rotary_emb.to(device)


@dataclass(frozen=True, slots=True)
class Installer:
    """Gives parts of a model their weights.

    Attributes:
        model: What :func:`empty_model` made.
        files: Where weights come from.
        backend: What multiplies with them.
        dtype: The dtype of everything that is not packed.
        round_inputs: Whether inputs are rounded as engines round them.
    """

    model: nn.Module
    files: ModelFiles
    backend: Backend
    dtype: torch.dtype
    round_inputs: bool = False

    def held_name(self, name: str) -> str:
        """What a module or parameter of the checkpoint is called in the model."""
        return self.files.architecture.held_name(name)

    def everything(self) -> None:
        """The whole model.

        Raises:
            CheckpointError: a tensor is absent or misshapen.
        """
        self.embedding()
        for layer in self.files.architecture.layers:
            self.layer(layer)
        self.norm(self.files.architecture.final_norm)
        self.head()
        place_rotary(self.model.model, self.backend.device)

    def embedding(self) -> None:
        """The embedding."""
        linear = self.files.architecture.embedding
        weight = self.files.weight(linear)
        if isinstance(weight, BlockWeight) and self.backend.device.type == "cpu":
            self.replace(linear.name, PackedEmbedding(weight, self.dtype))
        else:
            self._assign(linear.name, weight=weight.dequantize(self.dtype))

    def head(self) -> None:
        """The head, which may be the embedding again."""
        architecture = self.files.architecture
        if architecture.lm_head is not None:
            self.linear(architecture.lm_head)
            return
        weight = self.files.weight(architecture.embedding)
        if isinstance(weight, DenseWeight):
            embedding = self.model.get_submodule(self.held_name(architecture.embedding.name))
            head = DenseLinear(weight.shape, bias=False)
            head.register_parameter("weight", embedding.get_parameter("weight"))
            self.replace("lm_head", head)
        else:
            self._packed("lm_head", weight, None)

    def layer(self, layer: Layer) -> None:
        """One decoder layer."""
        self.around_experts(layer)
        if isinstance(layer.mlp, Moe):
            self.experts(layer.mlp)

    def experts(self, moe: Moe) -> None:
        """The experts of a sparse block."""
        name = moe.experts_name
        self.check_experts(moe)
        gating = self.gating(name)
        linears = [linear for mlp in moe.experts for linear in mlp.linears()]
        by_kernels = not any(linear.bias or self.rounding(linear) is not None for linear in linears)
        if gating.activation is None or not by_kernels:
            rounded = [RoundedMlp(*map(self._rounded, mlp.linears())) for mlp in moe.experts]
            self.replace(name, PackedExperts(RoundedExperts(rounded, gating), len(moe.experts)))
            return
        mlps = [PackedMlp(*map(self._weight, mlp.linears())) for mlp in moe.experts]
        self.replace(name, PackedExperts(self.backend.experts(mlps, gating.activation), len(moe.experts)))

    def rounding(self, linear: Linear) -> InputRounding | None:
        """How a linear's inputs are rounded here."""
        return self.files.input_rounding(linear) if self.round_inputs else None

    def _rounded(self, linear: Linear) -> RoundedLinear:
        bias = self.files.bias(linear) if linear.bias else None
        bias = None if bias is None else bias.to(self.backend.device)
        return RoundedLinear(self.backend.linear(self._weight(linear)), self.rounding(linear), bias)

    def check_experts(self, moe: Moe) -> None:
        """Nobody adds the bias of an expert whose family has none.

        Raises:
            CheckpointError: one has a bias that is not zero.
        """
        for mlp in moe.experts:
            for linear in mlp.linears():
                require_no_bias(self.files, linear)

    def around_experts(self, layer: Layer) -> None:
        """All of a decoder layer but its routed experts."""
        for norm in layer.norms():
            self.norm(norm)
        for module in (*layer.attention.kept(), *layer.routing()):
            if isinstance(module, Parameter):
                self._parameter(module)
        for module in layer.attention.kept():
            if isinstance(module, Linear):
                self.linear(module)
        for linear in layer.attention.linears():
            self.linear(linear)
        cache = cache_rounding(self.files, layer) if self.round_inputs else None
        if cache is not None:
            cache.install(self.model.get_submodule(self.held_name(layer.attention.name)))
        for router in layer.routers():
            shape = (router.out_features, router.in_features)
            self._assign(router.name, weight=self.files.tensor(router.weight, shape))
            bias = self.files.bias(router) if router.bias else None
            if bias is not None:
                self._assign(router.name, bias=bias)
        mlp = layer.mlp.shared_expert if isinstance(layer.mlp, Moe) else layer.mlp
        for linear in () if mlp is None else mlp.linears():
            self.linear(linear)

    def gating(self, name: str) -> Gating:
        """That of transformers' experts of that name, which :meth:`replace` then replaces."""
        experts = self.model.get_submodule(self.held_name(name))
        return gating_of(experts, self.files.architecture.joined.interleaved)

    def linear(self, linear: Linear) -> None:
        """A linear, packed or dense."""
        weight, bias = self.files.weight(linear), self.files.bias(linear)
        if isinstance(weight, DenseWeight):
            self.replace(linear.name, DenseLinear(weight.shape, bias=bias is not None))
            self._assign(linear.name, weight=weight.weight, **({} if bias is None else {"bias": bias}))
        else:
            self._packed(linear.name, weight, bias)
        rounding = self.rounding(linear)
        if rounding is not None:
            placed = self.model.get_submodule(self.held_name(linear.name))
            placed.register_forward_pre_hook(lambda _, arguments: (rounding(arguments[0]),))

    def norm(self, norm: Norm) -> None:
        """A norm."""
        self._assign(norm.name, weight=self.files.tensor(norm.weight, (norm.size,)))

    def _parameter(self, parameter: Parameter) -> None:
        """A tensor of transformers' own module; a buffer, such as a correction bias, keeps the file's dtype."""
        parent, _, leaf = self.held_name(parameter.name).rpartition(".")
        tensor = self.files.tensor(parameter.name, parameter.shape)
        module = self.model.get_submodule(parent)
        if leaf in dict(module.named_buffers(recurse=False)):
            module.register_buffer(leaf, tensor.to(self.backend.device))
        else:
            self._place(module, leaf, tensor)

    def _packed(self, name: str, weight: PackedWeight, bias: Tensor | None) -> None:
        if bias is not None:
            bias = bias.to(self.backend.device, self.dtype)
        self.replace(name, PackedLinear(self.backend.linear(weight), weight.shape, bias))

    def _weight(self, linear: Linear) -> PackedWeight:
        """An expert's weight; a dense one in the model's dtype, mapped where that is the file's."""
        weight = self.files.weight(linear)
        return DenseWeight(weight.name, weight.weight.to(self.dtype)) if isinstance(weight, DenseWeight) else weight

    def _assign(self, name: str, **tensors: Tensor) -> None:
        module = self.model.get_submodule(self.held_name(name))
        for leaf, tensor in tensors.items():
            self._place(module, leaf, tensor)

    def _place(self, module: nn.Module, leaf: str, tensor: Tensor) -> None:
        placed = tensor.to(self.backend.device, self.dtype)
        module.register_parameter(leaf, nn.Parameter(placed, requires_grad=False))

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of the one that the checkpoint calls so."""
        parent, _, leaf = self.held_name(name).rpartition(".")
        self.model.get_submodule(parent).register_module(leaf, module.eval())
