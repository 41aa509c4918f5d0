"""One decoder layer at a time, with transformers' own attention, norms, router and rotary embedding on real weights.

The model is built on the meta device, where it costs nothing; a module becomes real when a layer's tensors are assigned
to a copy of it. Experts are not built at all: they are computed one by one from streamed weights.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qconv.checkpoint.reader import in_config, read_json
from qconv.core.architecture import Architecture, Layer, Mlp, Moe, Norm
from qconv.core.devices import CPU
from qconv.errors import RecipeError
from qconv.models.calls import Call, Calls, final_norm_of
from qconv.models.gating import Gating, Plain, gating_of
from qconv.models.transformer import config_of, empty_model


class Decoder:
    """transformers' modules of one model, made real layer by layer. Everything computes in one dtype."""

    def __init__(self, model_path: Path, architecture: Architecture, dtype: torch.dtype = torch.float32) -> None:
        """Build the skeleton from config.json.

        Args:
            model_path: The checkpoint's folder.
            architecture: What config.json describes.
            dtype: In which is computed.

        Raises:
            CheckpointError: transformers does not accept the config.
        """
        from transformers.activations import ACT2FN

        self.dtype = dtype
        self._architecture = architecture
        with in_config(model_path):
            config = config_of(read_json(model_path / "config.json"))
            self._skeleton = empty_model(config, dtype).model
        self._calls = Calls(self._skeleton, architecture.hidden_size)
        self._plain = Plain(ACT2FN[config.hidden_act])

    def norm(self, layer: Layer, norm: Norm, weight: Tensor) -> nn.Module:
        """A norm of a layer with its weight, [hidden]."""
        return self._real(layer, self._architecture.within(layer, norm.name), {"weight": weight})

    def final_norm(self, weight: Tensor) -> nn.Module:
        """The norm after the last layer with its weight, [hidden]."""
        return self._loaded(getattr(self._skeleton, final_norm_of(self._skeleton)), {"weight": weight})

    def router(self, layer: Layer, moe: Moe, read: Callable[[str], Tensor]) -> RouterBlock:
        """A sparse layer's routing.

        Args:
            layer: The layer.
            moe: Its sparse block.
            read: Gives a tensor of the checkpoint.
        """
        held = self._architecture.held_name
        block = held(moe.experts_name).rpartition(".")[0]
        names = {self._architecture.held_tensor(name): name for name, _ in moe.router.tensors()}
        names |= {held(parameter.name): parameter.name for parameter in moe.parameters}
        state = {name.removeprefix(f"{block}."): read(stored).to(self.dtype) for name, stored in names.items()}
        empty = self._skeleton.layers[layer.index].get_submodule(block_name(layer, self._architecture))
        router = held(moe.router.name).removeprefix(f"{block}.")
        return RouterBlock.of(empty, state, router if moe.scales_inputs else None, moe.top_k)

    def gating(self, layer: Layer, mlp: Mlp) -> Gating:
        """What an MLP of a layer makes of the outputs of gate and up."""
        if not isinstance(layer.mlp, Moe) or mlp == layer.mlp.shared_expert:
            return self._plain
        name = self._architecture.within(layer, layer.mlp.experts_name)
        experts = self._skeleton.layers[layer.index].get_submodule(name)
        return gating_of(experts, self._architecture.joined.interleaved)

    def attention(self, layer: Layer, tensors: Mapping[str, Tensor]) -> MixerBlock:
        """What mixes tokens in a layer.

        Args:
            layer: The layer.
            tensors: Its tensors by full name, any float dtype.
        """
        prefix = f"{self._architecture.held_name(layer.attention.name)}."
        held = {self._architecture.held_tensor(name): tensor for name, tensor in tensors.items()}
        state = {name.removeprefix(prefix): tensor for name, tensor in held.items() if name.startswith(prefix)}
        module = self._real(layer, layer.attention.name.removeprefix(f"{layer.name}."), state)
        return MixerBlock.of(module, self._calls, layer)

    def _real(self, layer: Layer, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        return self._loaded(self._skeleton.layers[layer.index].get_submodule(name), state)

    def _loaded(self, empty: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        module = copy.deepcopy(empty)
        module.load_state_dict({key: tensor.to(self.dtype) for key, tensor in state.items()}, assign=True)
        _follow(module, state)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module


def _follow(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Bring a module's buffers that no checkpoint holds to where its tensors are."""
    device = next((tensor.device for tensor in state.values()), CPU)
    for child in module.modules() if device != CPU else ():
        for name, buffer in child.named_buffers(recurse=False):
            if not buffer.is_meta:
                child._buffers[name] = buffer.to(device)


@dataclass(frozen=True, slots=True)
class RouterBlock:
    """A sparse block without its experts; threads may share one."""

    module: nn.Module
    kept: threading.local
    top_k: int

    @classmethod
    def of(cls, empty: nn.Module, state: Mapping[str, Tensor], scorer: str | None, top_k: int) -> RouterBlock:
        """transformers' sparse block with stand-ins for all that computes, and the router's tensors.

        Args:
            empty: The block on the meta device; not changed.
            state: The router's tensors by their names within the block.
            scorer: Its name, where experts are not told who was chosen, but read scaled inputs; else None.
            top_k: Experts a token.
        """
        kept = threading.local()
        module = copy.deepcopy(empty)
        for name, child in [*module.named_children()]:
            if name == "experts":
                module.register_module(name, _Chosen(kept))
            elif not any(key.startswith(f"{name}.") for key in state):
                module.register_module(name, _Zeros(child))
        if scorer is not None:
            module.get_submodule(scorer).register_forward_hook(_keeping_scores(kept, top_k))
        module.load_state_dict(state, assign=True)
        _follow(module, state)
        return cls(module.requires_grad_(False), kept, top_k)

    def __call__(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Who sees which token, and how much its output, or its input, counts.

        Args:
            normed: The block's input, [tokens, hidden].

        Returns:
            Factors and indices of experts, [tokens, experts per token].
        """
        self.module(normed.unsqueeze(0))
        indices, factors = self.kept.__dict__.pop("chosen")
        return factors, indices


def _keeping_scores(kept: threading.local, top_k: int) -> Callable[[nn.Module, Any, Any], None]:
    """Of a router that gives all experts' scores, 0 for those that are not chosen."""

    def hook(_: nn.Module, arguments: Any, output: Any) -> None:
        scores: Tensor = output[0] if isinstance(output, tuple) else output
        factors, indices = scores.topk(top_k, dim=-1)
        kept.chosen = indices, factors

    return hook


class _Chosen(nn.Module):
    """In the place of the experts: keeps what the router chose, where they are told."""

    def __init__(self, kept: threading.local) -> None:
        super().__init__()
        self._kept = kept

    def forward(self, hidden: Tensor, *told: Tensor) -> Tensor:
        if told:
            self._kept.chosen = told
        return torch.zeros_like(hidden)


class _Zeros(nn.Module):
    """In the place of a shared expert or of its gate: zeros of the shape that it gives."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self._features = replaced.out_features if isinstance(replaced, nn.Linear) else None

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self._features or hidden.shape[-1])


@dataclass(frozen=True, slots=True)
class MixerBlock:
    """What mixes the tokens of packed sequences; threads may share one."""

    module: nn.Module
    calls: Calls
    layer: Layer
    kept: threading.local

    @classmethod
    def of(cls, module: nn.Module, calls: Calls, layer: Layer) -> MixerBlock:
        """Wrap transformers' module; from now on each call keeps what its linears read in its own thread."""
        kept = threading.local()
        for number, group in enumerate(layer.groups()):
            name = group.linears[0].name.removeprefix(f"{layer.attention.name}.")
            module.get_submodule(name).register_forward_pre_hook(_keeping(kept, f"group {number}"))
        return cls(module, calls, layer, kept)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Mix causally within each sequence.

        Args:
            hidden: Normalized input, float32 [sequences, length, hidden].

        Returns:
            The block's output before the residual is added, of the same shape.
        """
        output, _ = self.with_inputs(hidden)
        return output

    def with_inputs(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output, and what each group of linears reads, float32 [sequences, length, in_features]."""
        name = self.layer.attention.name.removeprefix(f"{self.layer.name}.")
        output = self.calls.mixer(self.layer.index, name, hidden)(self.module, hidden)
        # The hooks run in the thread that computes, so what they kept there is this call's own.
        kept = self.kept.__dict__
        return output, [kept.pop(f"group {number}") for number in range(len(self.layer.groups()))]

    def cached(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The largest magnitudes of the keys, after their rotation, and of the values that a cache would be given.

        Args:
            hidden: Normalized input, float32 [sequences, length, hidden].

        Returns:
            Both float32 [key-value heads * head size].

        Raises:
            RecipeError: transformers' attention gives none to a cache.
        """
        name = self.layer.attention.name.removeprefix(f"{self.layer.name}.")
        call, cache = self.calls.mixer(self.layer.index, name, hidden), _Cache()
        replace(call, named={**call.named, "past_key_values": cache})(self.module, hidden)
        self.kept.__dict__.clear()
        if len(cache.largest) != 1:
            raise RecipeError(
                f"kv_cache: {self.layer.attention.name} does not give its keys and values to a cache.",
                hint="Leave kv_cache out.",
            )
        return cache.largest[0]


class _Cache:
    """In the place of transformers' cache: notes the largest magnitudes of what it is given, and gives it back."""

    def __init__(self) -> None:
        self.largest: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """[sequences, heads, length, head size] each."""
        by_channel = (one.abs().amax((0, 2)).flatten() for one in (keys, values))
        self.largest.append((next(by_channel), next(by_channel)))
        return keys, values


def _keeping(kept: threading.local, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        setattr(kept, name, arguments[0])

    return hook


@dataclass(frozen=True, slots=True)
class RunningLayer:
    """A decoder layer with its weights, half by half.

    Attributes:
        mixer: What mixes tokens.
        input_norm: The norm before it.
        block: The MLP or sparse block.
        norm: The norm before that.
        call: Gives what the mixer is called with for an input.
    """

    mixer: nn.Module
    input_norm: nn.Module
    block: nn.Module
    norm: nn.Module
    call: Callable[[Tensor], Call]

    @classmethod
    def of(cls, module: nn.Module, calls: Calls, layer: Layer, architecture: Architecture) -> RunningLayer:
        """Of transformers' layer and its parts' names."""

        def part(name: str) -> nn.Module:
            return module.get_submodule(architecture.within(layer, name))

        mixer = layer.attention.name.removeprefix(f"{layer.name}.")
        return cls(
            part(layer.attention.name),
            part(layer.input_norm.name),
            module.get_submodule(block_name(layer, architecture)),
            part(layer.post_attention_norm.name),
            lambda inputs: calls.mixer(layer.index, mixer, inputs),
        )

    @property
    def experts(self) -> nn.Module:
        """Those of a sparse block."""
        return self.block.get_submodule("experts")

    def mixed(self, hidden: Tensor) -> Tensor:
        """What the mixer adds to what runs through the layers, [sequences, length, hidden]."""
        normed: Tensor = self.input_norm(hidden)
        return self.call(normed)(self.mixer, normed)

    def fed(self, hidden: Tensor) -> Tensor:
        """What the MLP or sparse block adds to it, of the same shape."""
        output: Any = self.block(self.norm(hidden))
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found.view_as(hidden)


def block_name(layer: Layer, architecture: Architecture) -> str:
    """What transformers calls a layer's MLP or sparse block within the layer."""
    inside = layer.mlp.experts_name if isinstance(layer.mlp, Moe) else layer.mlp.gate.name
    return architecture.within(layer, inside).split(".")[0]
