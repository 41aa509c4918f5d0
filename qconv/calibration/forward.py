"""One decoder layer at a time, with transformers' own attention, norms, router and rotary embedding on real weights.

The model is built on the meta device, where it costs nothing; a module becomes real when a layer's tensors are assigned
to a copy of it. Experts are not built at all: they are computed one by one from streamed weights.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qconv.boundary.printable import one_line
from qconv.core.architecture import Architecture, Layer, Moe, Norm
from qconv.errors import CheckpointError

Activation = Callable[[Tensor], Tensor]


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
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.activations import ACT2FN

        self.dtype = dtype
        self._architecture = architecture

        try:
            self.config = AutoConfig.from_pretrained(model_path, local_files_only=True)
            self.config._attn_implementation = "sdpa"
            with torch.device("meta"):
                skeleton: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    self.config, dtype=dtype
                )
            self._skeleton = skeleton.eval().model
            # Rotary frequencies are computed, not loaded, so the module is built again off the meta device.
            self._rotary = type(self._skeleton.rotary_emb)(self.config)
            self.act: Activation = ACT2FN[self.config.hidden_act]
        # Its checks raise a kind of their own, its modules whatever a value of another type makes them raise.
        except Exception as error:
            raise CheckpointError(
                f"{model_path / 'config.json'}: transformers does not accept it: {one_line(error)}.",
                hint="Repair config.json.",
            ) from error

    def norm(self, layer: Layer, norm: Norm, weight: Tensor) -> nn.Module:
        """A norm of a layer with its weight, [hidden]."""
        return self._real(layer, norm.name.removeprefix(f"{layer.name}."), {"weight": weight})

    def final_norm(self, weight: Tensor) -> nn.Module:
        """The norm after the last layer with its weight, [hidden]."""
        return self._loaded(self._skeleton.norm, {"weight": weight})

    def router(self, layer: Layer, moe: Moe, read: Callable[[str], Tensor]) -> RouterBlock:
        """A sparse layer's routing.

        Args:
            layer: The layer.
            moe: Its sparse block.
            read: Gives a tensor of the checkpoint.
        """
        held = self._architecture.held_name
        block = held(moe.experts_name).rpartition(".")[0]
        names = {f"{held(moe.router.name)}.weight": moe.router.weight}
        names |= {held(parameter.name): parameter.name for parameter in moe.parameters}
        state = {name.removeprefix(f"{block}."): read(stored).to(self.dtype) for name, stored in names.items()}
        empty = self._skeleton.layers[layer.index].get_submodule(block.removeprefix(f"{layer.name}."))
        return RouterBlock.of(empty, state)

    def attention(self, layer: Layer, tensors: Mapping[str, Tensor]) -> AttentionBlock:
        """A layer's self-attention.

        Args:
            layer: The layer.
            tensors: Its tensors by full name, any float dtype.
        """
        prefix = layer.attention.q.name.removesuffix("q_proj")
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return AttentionBlock.of(
            self._real(layer, "self_attn", state), self._rotary, attention_window(self.config, layer.index)
        )

    def _real(self, layer: Layer, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        return self._loaded(self._skeleton.layers[layer.index].get_submodule(name), state)

    def _loaded(self, empty: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        module = copy.deepcopy(empty)
        module.load_state_dict({key: tensor.to(self.dtype) for key, tensor in state.items()}, assign=True)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module


@dataclass(frozen=True, slots=True)
class RouterBlock:
    """A sparse block without its experts; threads may share one."""

    module: nn.Module
    kept: threading.local

    @classmethod
    def of(cls, empty: nn.Module, state: Mapping[str, Tensor]) -> RouterBlock:
        """transformers' sparse block with stand-ins for all that computes, and the router's tensors.

        Args:
            empty: The block on the meta device; not changed.
            state: The router's tensors by their names within the block.
        """
        kept = threading.local()
        module = copy.deepcopy(empty)
        for name, child in [*module.named_children()]:
            if name == "experts":
                module.register_module(name, _Chosen(kept))
            elif not any(key.startswith(f"{name}.") for key in state):
                module.register_module(name, _Zeros(child))
        module.load_state_dict(state, assign=True)
        return cls(module.requires_grad_(False), kept)

    def __call__(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Who sees which token, and how much its output counts.

        Args:
            normed: The block's input, [tokens, hidden].

        Returns:
            Factors and indices of experts, [tokens, experts per token].
        """
        self.module(normed.unsqueeze(0))
        indices, factors = self.kept.__dict__.pop("chosen")
        return factors, indices


class _Chosen(nn.Module):
    """In the place of the experts: keeps what the router chose."""

    def __init__(self, kept: threading.local) -> None:
        super().__init__()
        self._kept = kept

    def forward(self, hidden: Tensor, indices: Tensor, factors: Tensor) -> Tensor:
        self._kept.chosen = indices, factors
        return torch.zeros_like(hidden)


class _Zeros(nn.Module):
    """In the place of a shared expert or of its gate: zeros of the shape that it gives."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self._features = replaced.out_features if isinstance(replaced, nn.Linear) else None

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self._features or hidden.shape[-1])


def attention_window(config: Any, layer: int) -> int | None:
    """A layer's sliding attention window in tokens by transformers' config, or None for full attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and kinds[layer] == "full_attention"):
        return None
    return int(window)


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """Self-attention on packed sequences; threads may share one."""

    module: nn.Module
    rotary: nn.Module
    window: int | None
    kept: threading.local

    @classmethod
    def of(cls, module: nn.Module, rotary: nn.Module, window: int | None) -> AttentionBlock:
        """Wrap transformers' module; from now on each call keeps o_proj's input in its own thread."""
        kept = threading.local()
        module.get_submodule("o_proj").register_forward_pre_hook(
            lambda _, arguments: setattr(kept, "o_input", arguments[0])
        )
        return cls(module, rotary, window, kept)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Attend causally within each sequence.

        Args:
            hidden: Normalized input, float32 [sequences, length, hidden].

        Returns:
            The block's output before the residual is added, of the same shape.
        """
        output, _ = self.with_o_input(hidden)
        return output

    def with_o_input(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the input of o_proj, float32 [sequences, length, heads * head_dim]."""
        output = self._run(hidden)
        # The hook runs in the thread that computes, so what it kept there is this call's own.
        o_input: Tensor = self.kept.__dict__.pop("o_input")
        return output, o_input

    def _run(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        positions = torch.arange(length, device=hidden.device).unsqueeze(0)
        output: Any = self.module(
            hidden_states=hidden,
            position_embeddings=self.rotary(hidden, positions),
            attention_mask=self._mask(positions[0]),
        )
        attended: Tensor = output[0]
        return attended

    def _mask(self, positions: Tensor) -> Tensor | None:
        if self.window is None or len(positions) <= self.window:
            return None  # sdpa's own causal path
        distance = positions.unsqueeze(-1) - positions
        return ((distance >= 0) & (distance < self.window)).unsqueeze(0).unsqueeze(0)
