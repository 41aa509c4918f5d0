"""What a model consists of: every linear with its shape, grouped by layer, with the inputs that linears share.

A family in :mod:`qconv.models` and a config.json give one :class:`Architecture`. Everything else in qconv (checks,
plan, calibration, packing) walks that description.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""Names of the embedding and of the output head, tied to it or not."""
TIED = "tie_word_embeddings"
"""The key of config.json that says whether the head is the embedding."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module: ``weight`` is [out_features, in_features], ``bias`` is [out_features]."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False

    @property
    def weight(self) -> str:
        """The name of the weight tensor."""
        return f"{self.name}.weight"

    @property
    def numel(self) -> int:
        """The number of weights, bias not counted."""
        return self.out_features * self.in_features

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the module's tensors in a dense checkpoint."""
        yield self.weight, (self.out_features, self.in_features)
        if self.bias:
            yield f"{self.name}.bias", (self.out_features,)


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm that scales each feature by ``weight + offset``; ``weight`` is [size]."""

    name: str
    size: int
    offset: float = 0.0

    @property
    def numel(self) -> int:
        """The number of weights."""
        return self.size

    @property
    def weight(self) -> str:
        """The name of the weight tensor."""
        return f"{self.name}.weight"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of the module's tensor."""
        yield self.weight, (self.size,)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor that is neither a linear's nor a norm's, such as a router's correction bias: it stays as it is."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def weight(self) -> str:
        """The name of the tensor: its own."""
        return self.name

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Its name and shape."""
        yield self.name, self.shape


@dataclass(frozen=True, slots=True)
class CacheScales:
    """The scales of a layer's cache of keys and values: a build may hold them beside an attention, no model does."""

    name: str
    """The attention's."""

    @property
    def numel(self) -> int:
        """None of the model's weights."""
        return 0

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """None of the model's tensors."""
        return iter(())


Module: TypeAlias = Linear | Norm | Parameter


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears that read one tensor.

    Attributes:
        linears: Those that are candidates for quantization.
        producer: The norm or linear whose output that is, where dividing its channels and multiplying the linears'
            columns by the same numbers changes nothing; None where it would. A linear with fewer outputs is read by
            heads, several of which share a key-value head's.
        unquantized: Linears that read it, too, and stay as they are.
    """

    linears: tuple[Linear, ...]
    producer: Norm | Linear | None = None
    unquantized: tuple[Linear, ...] = ()

    @property
    def in_features(self) -> int:
        """The width of what is read."""
        return (*self.linears, *self.unquantized)[0].in_features


@dataclass(frozen=True, slots=True)
class Attention:
    """Self-attention: q, k and v share one input; head norms and parameters are empty where the family has none."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    head_norms: tuple[Norm, ...]
    parameters: tuple[Parameter, ...] = ()

    @property
    def name(self) -> str:
        """The module's name."""
        return self.q.name.rpartition(".")[0]

    def linears(self) -> tuple[Linear, ...]:
        """q, k, v, o."""
        return self.q, self.k, self.v, self.o

    def kept(self) -> tuple[Module, ...]:
        """What is never quantized: head norms and parameters."""
        return *self.head_norms, *self.parameters

    def modules(self) -> tuple[Module, ...]:
        """The linears, then what is kept."""
        return *self.linears(), *self.kept()


@dataclass(frozen=True, slots=True)
class Mixer:
    """What mixes tokens in a layer where it is no :class:`Attention`: latent attention, a delta rule, a state space.

    Attributes:
        name: The module's name.
        groups: Its linears by what they read, in the order in which they run. The first reads the normed stream, and
            what the last gives is the mixer's output.
        unquantized: Norms, parameters and linears that stay as they are.
    """

    name: str
    groups: tuple[InputGroup, ...]
    unquantized: tuple[Module, ...] = ()

    def linears(self) -> tuple[Linear, ...]:
        """All linears that are candidates for quantization."""
        return tuple(linear for group in self.groups for linear in group.linears)

    def kept(self) -> tuple[Module, ...]:
        """What is never quantized."""
        return self.unquantized

    def modules(self) -> tuple[Module, ...]:
        """The linears, then what is kept."""
        return *self.linears(), *self.kept()


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP, ``down(act(gate(x)) * up(x))``: a dense layer's, one expert's or a shared expert's.

    ``folds`` says whether down's input is linear in up's outputs, as it is there, so that scales fold from down into
    up; experts of some models limit what they give.
    """

    gate: Linear
    up: Linear
    down: Linear
    folds: bool = True

    def linears(self) -> tuple[Linear, ...]:
        """gate, up, down."""
        return self.gate, self.up, self.down


@dataclass(frozen=True, slots=True)
class Moe:
    """A sparse block: the router and every expert (and the shared expert and its gate) see the same input.

    The parameters are the router's own beside its weight. ``scales_inputs`` says that the router's factor is on what an
    expert reads, as in Llama 4, and not on what it gives.
    """

    router: Linear
    experts: tuple[Mlp, ...]
    top_k: int
    shared_expert: Mlp | None = None
    shared_expert_gate: Linear | None = None
    parameters: tuple[Parameter, ...] = ()
    scales_inputs: bool = False

    @property
    def experts_name(self) -> str:
        """What the names of all experts begin with."""
        return self.experts[0].gate.name.rpartition(".experts.")[0] + ".experts"

    def routers(self) -> tuple[Linear, ...]:
        """The linears that decide how much each expert counts; they stay unquantized."""
        return (self.router,) if self.shared_expert_gate is None else (self.router, self.shared_expert_gate)

    def routing(self) -> tuple[Module, ...]:
        """The routers and their parameters."""
        return *self.routers(), *self.parameters

    def mlps(self) -> tuple[Mlp, ...]:
        """The experts, then the shared expert."""
        return self.experts if self.shared_expert is None else (*self.experts, self.shared_expert)


@dataclass(frozen=True, slots=True)
class Joined:
    """How the experts of a layer lie in a checkpoint that has one tensor for all of them.

    Attributes:
        gate_up: The name of gate's and up's matrices within the sparse block.
        down: The name of down's.
        transposed: Whether a matrix is [in_features, out_features], and not [out_features, in_features].
        interleaved: Whether the rows of gate and up come by turns, gate's first, and not all of gate's before up's.
        always: Whether the family's dense checkpoints hold them so, and readers know no other way.
    """

    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    transposed: bool = False
    interleaved: bool = False
    always: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    index: int
    name: str
    input_norm: Norm
    attention: Attention | Mixer
    post_attention_norm: Norm
    mlp: Mlp | Moe

    @property
    def heads(self) -> Attention:
        """Its attention, of a layer that has q, k, v and o.

        Raises:
            TypeError: it has another mixer.
        """
        if isinstance(self.attention, Mixer):
            raise TypeError(f"{self.attention.name} has no q, k, v and o")
        return self.attention

    def groups(self) -> tuple[InputGroup, ...]:
        """The linears of attention by what they read, in the order in which they run."""
        attention = self.attention
        if isinstance(attention, Mixer):
            return attention.groups
        shared = InputGroup((attention.q, attention.k, attention.v), self.input_norm)
        return shared, InputGroup((attention.o,), attention.v)

    def mlps(self) -> tuple[Mlp, ...]:
        """The gated MLPs: the experts and the shared expert, or the dense one."""
        return self.mlp.mlps() if isinstance(self.mlp, Moe) else (self.mlp,)

    def linears(self) -> Iterator[Linear]:
        """The linears that are candidates for quantization: everything but the routers."""
        yield from self.attention.linears()
        for mlp in self.mlps():
            yield from mlp.linears()

    def routers(self) -> tuple[Linear, ...]:
        """The layer's router and shared-expert gate; empty for a dense layer."""
        return self.mlp.routers() if isinstance(self.mlp, Moe) else ()

    def routing(self) -> tuple[Module, ...]:
        """The routers and their parameters; empty for a dense layer."""
        return self.mlp.routing() if isinstance(self.mlp, Moe) else ()

    def norms(self) -> tuple[Norm, ...]:
        """All norms of the layer."""
        within = (module for module in self.attention.kept() if isinstance(module, Norm))
        return self.input_norm, *within, self.post_attention_norm

    def modules(self) -> Iterator[Module]:
        """Everything that has tensors, in the order in which builds finish and write it."""
        yield self.input_norm
        yield from self.attention.modules()
        yield self.post_attention_norm
        yield from self.routing()
        for mlp in self.mlps():
            yield from mlp.linears()

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of every tensor of the layer in a dense checkpoint."""
        for module in self.modules():
            yield from module.tensors()


@dataclass(frozen=True, slots=True)
class Architecture:
    """A whole model. ``lm_head`` is None when it is tied to the embedding.

    ``held`` says what modules, and parameters that are no module's weight, are called in transformers' model, where
    the checkpoint calls them otherwise, and ``prefixes`` what names begin with in the checkpoint and in that model,
    where it is a part of a larger one. ``joined`` says how experts are that lie in one tensor.
    """

    family: str
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    embedding: Linear
    layers: tuple[Layer, ...]
    final_norm: Norm
    lm_head: Linear | None
    held: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[tuple[str, str], ...] = ()
    joined: Joined = Joined()

    @property
    def head_name(self) -> str:
        """The name of the output head, tied or not."""
        return next((stored for stored, held in self.prefixes if held == HEAD), HEAD)

    def plain_name(self, name: str) -> str:
        """A name as it is where the language model is no part of a larger one."""
        for stored, held in self.prefixes:
            if name.startswith(stored):
                return held + name.removeprefix(stored)
        return name

    def held_name(self, name: str) -> str:
        """What transformers calls a module or parameter that the checkpoint calls so."""
        return self.held.get(name) or self.plain_name(name)

    def within(self, layer: Layer, name: str) -> str:
        """What transformers calls it within a layer of its model."""
        return self.held_name(name).removeprefix(f"{self.held_name(layer.name)}.")

    def held_tensor(self, name: str) -> str:
        """What transformers calls a tensor that the checkpoint calls so."""
        owner, _, leaf = name.rpartition(".")
        return self.held.get(name) or f"{self.held_name(owner)}.{leaf}"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of every tensor that a dense checkpoint must hold, each once."""
        yield from self.embedding.tensors()
        for layer in self.layers:
            yield from layer.tensors()
        yield from self.final_norm.tensors()
        if self.lm_head is not None:
            yield from self.lm_head.tensors()

    def ignorable(self) -> frozenset[str]:
        """Tensors that some checkpoints carry and no one needs: a tied head's copy, old rotary buffers."""
        names = {f"{layer.name}.self_attn.rotary_emb.inv_freq" for layer in self.layers}
        if self.lm_head is None:
            names.add(f"{self.head_name}.weight")
        return frozenset(names)
