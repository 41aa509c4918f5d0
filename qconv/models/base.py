"""What a family file declares, and what it resolves to for one config.json.

A :class:`Family` names modules and says which config keys decide about biases, norms and experts. :func:`build` turns
it and a config into an :class:`~qconv.core.architecture.Architecture`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qconv.checkpoint.config import MAX_EXPERTS, MAX_HEAD_DIM, MAX_LAYERS, Config
from qconv.core.architecture import (
    EMBEDDING,
    HEAD,
    TIED,
    Architecture,
    Attention,
    Joined,
    Layer,
    Linear,
    Mlp,
    Moe,
    Norm,
)
from qconv.errors import CheckpointError


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
        expert_bias: whether the linears of experts have a bias.
        joined: how experts lie in a checkpoint that has one tensor for all of a layer.
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
    expert_bias: bool = False
    joined: Joined = field(default_factory=Joined)


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
            held=dict(self._held(layers)),
            joined=self.family.joined,
        )

    def _held(self, layers: int) -> Iterator[tuple[str, str]]:
        """transformers calls every sparse block ``mlp``."""
        block = self.family.sparse_block
        for index in range(layers if block != "mlp" else 0):
            for leaf in ("gate", "experts"):
                yield f"model.layers.{index}.{block}.{leaf}", f"model.layers.{index}.mlp.{leaf}"

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
        linears, bias = family.expert_linears, family.expert_bias
        experts = (self._mlp(f"{name}.experts.{e}", width, linears, bias) for e in range(count))
        shared = shared_gate = None
        if family.shared_expert:
            shared_width = config.integer("shared_expert_intermediate_size")
            shared = self._mlp(f"{name}.shared_expert", shared_width, ("gate_proj", "up_proj", "down_proj"))
            shared_gate = Linear(f"{name}.shared_expert_gate", 1, self.hidden)
        return Moe(Linear(f"{name}.gate", count, self.hidden), tuple(experts), top_k, shared, shared_gate)
