"""What a family file declares, and what it resolves to for one config.json.

A :class:`Family` names modules and says which config keys decide about biases, norms and experts. :func:`build` turns
it and a config into an :class:`Architecture`: every linear with its shape, grouped by layer, with the inputs that
linears share. Everything else in qconv (checks, plan, calibration, packing) walks that description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qconv.errors import CheckpointError
from qconv.models.config import MAX_EXPERTS, MAX_HEAD_DIM, MAX_LAYERS, Config

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
    """An RMS norm: ``weight`` is [size]."""

    name: str
    size: int

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
class Attention:
    """Self-attention: q, k and v share one input; the head norms are empty where the family has none."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    head_norms: tuple[Norm, ...]

    def linears(self) -> tuple[Linear, ...]:
        """q, k, v, o."""
        return self.q, self.k, self.v, self.o


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP, ``down(act(gate(x)) * up(x))``: a dense layer's, one expert's or a shared expert's."""

    gate: Linear
    up: Linear
    down: Linear

    def linears(self) -> tuple[Linear, ...]:
        """gate, up, down."""
        return self.gate, self.up, self.down


@dataclass(frozen=True, slots=True)
class Moe:
    """A sparse block: the router and every expert (and the shared expert and its gate) see the same input."""

    router: Linear
    experts: tuple[Mlp, ...]
    top_k: int
    shared_expert: Mlp | None = None
    shared_expert_gate: Linear | None = None

    def routers(self) -> tuple[Linear, ...]:
        """The linears that decide how much each expert counts; they stay unquantized."""
        return (self.router,) if self.shared_expert_gate is None else (self.router, self.shared_expert_gate)

    def mlps(self) -> tuple[Mlp, ...]:
        """The experts, then the shared expert."""
        return self.experts if self.shared_expert is None else (*self.experts, self.shared_expert)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    index: int
    name: str
    input_norm: Norm
    attention: Attention
    post_attention_norm: Norm
    mlp: Mlp | Moe

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

    def norms(self) -> tuple[Norm, ...]:
        """All norms of the layer."""
        return self.input_norm, *self.attention.head_norms, self.post_attention_norm

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of every tensor of the layer in a dense checkpoint."""
        for norm in self.norms():
            yield from norm.tensors()
        for router in self.routers():
            yield from router.tensors()
        for linear in self.linears():
            yield from linear.tensors()


@dataclass(frozen=True, slots=True)
class Architecture:
    """A whole model. ``lm_head`` is None when it is tied to the embedding."""

    family: str
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    embedding: Linear
    layers: tuple[Layer, ...]
    final_norm: Norm
    lm_head: Linear | None

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
            names.add(f"{HEAD}.weight")
        return frozenset(names)


def _never(config: Config) -> bool:
    return False


def _never_sparse(config: Config, layer: int) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What differs between families, as data.

    Attributes:
        qkv_bias, o_bias, mlp_bias: whether those linears have a bias, decided from the config.
        head_norm: whether q and k are normalized per head (``q_norm``, ``k_norm`` of size head_dim).
        head_dim: size of a head where config.json does not say; None for ``hidden_size // num_attention_heads``.
        sparse: whether a layer is an MoE, decided from the config and the layer's index.
        mlp: module name of the MLP or sparse block in a layer.
        sparse_block: module name of the sparse block where it differs from ``mlp``.
        expert_linears: names of an expert's gate, up and down projections.
        expert_count: config keys of the number of experts, newest first.
        expert_width: config keys of an expert's intermediate size.
        shared_expert: whether a sparse block has a shared expert with a gate of its own.
    """

    qkv_bias: Callable[[Config], bool] = _never
    o_bias: Callable[[Config], bool] = _never
    mlp_bias: Callable[[Config], bool] = _never
    head_norm: bool = False
    head_dim: int | None = None
    sparse: Callable[[Config, int], bool] = _never_sparse
    mlp: str = "mlp"
    sparse_block: str = "mlp"
    expert_linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_count: tuple[str, ...] = ("num_local_experts", "num_experts")
    expert_width: tuple[str, ...] = ("moe_intermediate_size",)
    shared_expert: bool = False


def sparse_by_step(config: Config, layer: int) -> bool:
    """Qwen's rule: an MoE unless listed in ``mlp_only_layers``, every ``decoder_sparse_step``-th layer."""
    step = config.integer("decoder_sparse_step", default=1)
    return layer not in config.integers("mlp_only_layers") and (layer + 1) % step == 0


def build(family: Family, values: dict[str, Any]) -> Architecture:
    """Resolve a family for one config.json.

    Raises:
        CheckpointError: a key of config.json is missing or of the wrong type.
    """
    return _Builder(family, Config(values)).architecture()


@dataclass(slots=True)
class _Builder:
    family: Family
    config: Config
    hidden: int = field(init=False)
    heads: int = field(init=False)
    kv_heads: int = field(init=False)
    head_dim: int = field(init=False)

    def __post_init__(self) -> None:
        self.hidden = self.config.integer("hidden_size")
        self.heads = self.config.integer("num_attention_heads")
        self.kv_heads = self.config.integer("num_key_value_heads", default=self.heads)
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {self.heads} is no multiple of num_key_value_heads {self.kv_heads}.",
                hint="Repair config.json.",
            )
        default = self.family.head_dim or max(1, self.hidden // self.heads)
        self.head_dim = self.config.integer("head_dim", default=default, most=MAX_HEAD_DIM)

    def architecture(self) -> Architecture:
        config = self.config
        vocabulary = config.integer("vocab_size")
        layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
        for key in ("rms_norm_eps", "rope_theta"):
            config.positive(key)
        tied = config.flag(TIED, default=False)
        return Architecture(
            family=str(config.values["model_type"]),
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            embedding=Linear(EMBEDDING, vocabulary, self.hidden),
            layers=tuple(self._layer(index) for index in range(layers)),
            final_norm=Norm("model.norm", self.hidden),
            lm_head=None if tied else Linear(HEAD, vocabulary, self.hidden),
        )

    def _layer(self, index: int) -> Layer:
        name = f"model.layers.{index}"
        sparse = self.family.sparse(self.config, index)
        return Layer(
            index=index,
            name=name,
            input_norm=Norm(f"{name}.input_layernorm", self.hidden),
            attention=self._attention(f"{name}.self_attn"),
            post_attention_norm=Norm(f"{name}.post_attention_layernorm", self.hidden),
            mlp=self._moe(f"{name}.{self.family.sparse_block}") if sparse else self._dense(f"{name}.{self.family.mlp}"),
        )

    def _attention(self, name: str) -> Attention:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv_bias, o_bias = self.family.qkv_bias(self.config), self.family.o_bias(self.config)
        norms = ("q_norm", "k_norm") if self.family.head_norm else ()
        return Attention(
            q=Linear(f"{name}.q_proj", queries, self.hidden, qkv_bias),
            k=Linear(f"{name}.k_proj", keys, self.hidden, qkv_bias),
            v=Linear(f"{name}.v_proj", keys, self.hidden, qkv_bias),
            o=Linear(f"{name}.o_proj", self.hidden, queries, o_bias),
            head_norms=tuple(Norm(f"{name}.{norm}", self.head_dim) for norm in norms),
        )

    def _mlp(self, name: str, width: int, linears: tuple[str, str, str], bias: bool = False) -> Mlp:
        gate, up, down = linears
        return Mlp(
            gate=Linear(f"{name}.{gate}", width, self.hidden, bias),
            up=Linear(f"{name}.{up}", width, self.hidden, bias),
            down=Linear(f"{name}.{down}", self.hidden, width, bias),
        )

    def _dense(self, name: str) -> Mlp:
        width = self.config.integer("intermediate_size")
        return self._mlp(name, width, ("gate_proj", "up_proj", "down_proj"), self.family.mlp_bias(self.config))

    def _moe(self, name: str) -> Moe:
        family, config = self.family, self.config
        layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
        count = config.integer(*family.expert_count, most=MAX_EXPERTS)
        if count * layers > MAX_EXPERTS:
            raise CheckpointError(
                f"config.json: {count:,} experts in each of {layers:,} layers are not plausible.",
                hint="Repair config.json.",
            )
        top_k = config.integer("num_experts_per_tok")
        if top_k > count:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {top_k} exceeds the {count} experts.", hint="Repair config.json."
            )
        width = config.integer(*family.expert_width)
        experts = (self._mlp(f"{name}.experts.{e}", width, family.expert_linears) for e in range(count))
        shared = shared_gate = None
        if family.shared_expert:
            shared_width = config.integer("shared_expert_intermediate_size")
            shared = self._mlp(f"{name}.shared_expert", shared_width, ("gate_proj", "up_proj", "down_proj"))
            shared_gate = Linear(f"{name}.shared_expert_gate", 1, self.hidden)
        return Moe(Linear(f"{name}.gate", count, self.hidden), tuple(experts), top_k, shared, shared_gate)
