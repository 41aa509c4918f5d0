"""The architecture of a model type that no file declares, where its layers are of a kind that qconv works on.

That is: attention with q, k, v that read one norm and an o, then a gated MLP or a sparse block that reads another, each
added to what runs through the layers. ``proofs`` shows by numbers what names cannot say. What a layer has beside that
(head norms, sinks, correction biases) belongs to transformers' own modules, and is kept as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn

from qconv.core.architecture import (
    EMBEDDING,
    HEAD,
    Architecture,
    Attention,
    Layer,
    Linear,
    Mlp,
    Moe,
    Norm,
    Parameter,
)
from qconv.errors import CheckpointError
from qconv.models.discovery.proofs import Proofs, Unproved
from qconv.models.discovery.structure import Discovery, FusedExperts, InputGroup, LayerStructure, read_model
from qconv.models.discovery.tracing import is_norm

_FINAL_NORM = "model.norm"
_DENSE = ("gate_proj", "up_proj", "down_proj")


def fitted(values: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json of a type without a family file describes.

    Raises:
        CheckpointError: transformers cannot make the model, or its layers are of another kind; says which.
    """
    return _fitted(json.dumps(values, sort_keys=True, default=str))


@lru_cache(maxsize=4)
def _fitted(described: str) -> Architecture:
    found, model = read_model(json.loads(described))
    try:
        return _Fitting(found, model).architecture()
    except Unproved as error:
        raise CheckpointError(
            f"config.json: unknown architecture: model_type {found.model_type!r} is of a kind that qconv does not work "
            f"on: {error}.",
            hint=f"The family file that declares it would be qconv/models/{found.model_type}.py.",
        ) from error


@dataclass(slots=True)
class _Fitting:
    found: Discovery
    model: nn.Module
    proofs: Proofs = field(init=False)
    proved: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.proofs = Proofs(self.model, self.found.held)

    def architecture(self) -> Architecture:
        outside = dict(self.found.outside)
        embedding, head, final = (outside.pop(f"{name}.weight", None) for name in (EMBEDDING, HEAD, _FINAL_NORM))
        if outside or embedding is None or final is None:
            raise Unproved(f"beside its layers it has {next(iter(outside), 'no embedding or no norm')}")
        self.proofs.ends()
        layers = tuple(self._layer(one) for one in self.found.layers)
        attention, heads = layers[0].heads, self.proofs.heads
        head_dim = attention.o.in_features // heads
        return Architecture(
            family=self.found.model_type,
            hidden_size=embedding[1],
            num_attention_heads=heads,
            num_key_value_heads=attention.k.out_features // head_dim,
            head_dim=head_dim,
            embedding=Linear(EMBEDDING, embedding[0], embedding[1]),
            layers=layers,
            final_norm=Norm(_FINAL_NORM, final[0]),
            lm_head=None if head is None else Linear(HEAD, head[0], head[1]),
            held=self.found.held,
        )

    def _layer(self, structure: LayerStructure) -> Layer:
        name = f"model.layers.{structure.index}"
        parts = _Parts.of(structure, self.model, self.found.held)
        attention, input_norm = parts.attention(f"{name}.self_attn")
        experts = structure.experts
        mlp: tuple[Mlp | Moe, Norm] = parts.sparse(experts, self.proofs) if experts else parts.dense(f"{name}.mlp")
        parts.require_all_taken()
        layer = Layer(structure.index, name, input_norm, attention, mlp[1], mlp[0])
        kind = repr(layer).replace(f"{name}.", "").replace(name, "").replace(f"index={structure.index}", "")
        if kind not in self.proved:
            self.proved.add(kind)
            self.proofs.layer(layer)
        return layer


@dataclass(slots=True)
class _Parts:
    """A layer's groups by reader and its tensors, as they are taken for one thing after the other."""

    model: nn.Module
    held: Mapping[str, str]
    groups: dict[str, InputGroup]
    tensors: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, structure: LayerStructure, model: nn.Module, held: Mapping[str, str]) -> _Parts:
        groups = {reader: group for group in structure.groups for reader in group.readers}
        return cls(model, held, groups, dict(structure.tensors))

    def attention(self, name: str) -> tuple[Attention, Norm]:
        """q, k, v and o, what attention has beside them, and the norm before them."""
        if any(stored.startswith(f"{name}.") for stored in self.held):
            raise Unproved(f"transformers holds {name} under another name")
        q, k, v, o = (f"{name}.{leaf}_proj" for leaf in "qkvo")
        shared = self._take([q, k, v])
        self._take([o])
        linears = self._linear(q), self._linear(k), self._linear(v), self._linear(o)
        kept = [self._kept(one) for one in self._below(name)]
        norms = tuple(one for one in kept if isinstance(one, Norm))
        parameters = tuple(one for one in kept if isinstance(one, Parameter))
        return Attention(*linears, norms, parameters), self._norm(shared)

    def dense(self, name: str) -> tuple[Mlp, Norm]:
        """A gated MLP and the norm before it."""
        gate, up, _ = (f"{name}.{leaf}" for leaf in _DENSE)
        return self._mlp(name), self._norm(self._take([gate, up]))

    def sparse(self, found: Sequence[FusedExperts], proofs: Proofs) -> tuple[Moe, Norm]:
        """Experts, what decides about them, a shared expert, and the norm before them."""
        (experts, *others) = found
        if others or {*experts.shapes} != {"gate_up_proj", "down_proj"}:
            raise Unproved(f"{experts.name} are not gated experts without biases")
        count, hidden, width = experts.shapes["down_proj"]
        if len(experts.stored["down_proj"]) != count or len(experts.stored["gate_up_proj"]) != 2 * count:
            raise Unproved(f"{experts.name} lie in tensors of all experts")
        group = self.groups.get(experts.name)
        if group is None:
            raise Unproved(f"nothing is known of what {experts.name} read")
        self._take(group.readers)
        block = experts.name.rpartition(".")[0]
        by_shape = {self.tensors.get(f"{one}.weight"): one for one in group.readers if one != experts.name}
        router, gate = by_shape.pop((count, hidden), None), by_shape.pop((1, hidden), None)
        held = self._held(experts.name).rpartition(".")[0]
        if router is None or self._held(router).rpartition(".")[0] != held:
            raise Unproved(f"{block} has no router beside its experts")
        shared = [one.rpartition(".")[0] for one in group.readers if one.endswith(".gate_proj")]
        readers = {experts.name, router, *(f"{one}.{leaf}" for one in shared for leaf in _DENSE[:2])}
        if len(shared) > 1 or {*group.readers} != (readers if gate is None else readers | {gate}):
            raise Unproved(f"{block} has more than experts, a router and a shared expert")
        weights = [*experts.stored["gate_up_proj"], *experts.stored["down_proj"]]
        gates, ups, downs = (weights[start : start + count] for start in (0, count, 2 * count))
        mlps = tuple(
            Mlp(self._expert(g, width, hidden), self._expert(u, width, hidden), self._expert(d, hidden, width))
            for g, u, d in zip(gates, ups, downs, strict=True)
        )
        made = Moe(
            self._linear(router),
            mlps,
            proofs.experts_per_token(held),
            self._mlp(shared[0]) if shared else None,
            None if gate is None else self._linear(gate),
            tuple(self._parameter(one) for one in self._below(block)),
        )
        return made, self._norm(group)

    def require_all_taken(self) -> None:
        """Check that nothing is left."""
        if self.tensors or self.groups:
            raise Unproved(f"a layer has {next(iter([*self.tensors, *self.groups]))}")

    def _take(self, readers: Sequence[str]) -> InputGroup:
        group = self.groups.get(readers[0])
        if group is None or {*group.readers} != {*readers}:
            raise Unproved(f"{readers[0]} does not read what {', '.join(readers[1:]) or 'nothing else'} reads")
        for reader in readers:
            del self.groups[reader]
        return group

    def _mlp(self, name: str) -> Mlp:
        gate, up, down = (f"{name}.{leaf}" for leaf in _DENSE)
        self._take([down])
        return Mlp(self._linear(gate), self._linear(up), self._linear(down))

    def _linear(self, name: str) -> Linear:
        shape = self.tensors.pop(f"{name}.weight", None)
        if shape is None or len(shape) != 2:
            raise Unproved(f"{name} is no linear")
        return Linear(name, shape[0], shape[1], self.tensors.pop(f"{name}.bias", None) is not None)

    def _expert(self, weight: str, out_features: int, in_features: int) -> Linear:
        if self.tensors.pop(weight, None) != (out_features, in_features) or not weight.endswith(".weight"):
            raise Unproved(f"{weight} is not [{out_features}, {in_features}]")
        return Linear(weight.removesuffix(".weight"), out_features, in_features)

    def _norm(self, group: InputGroup) -> Norm:
        shape = None if group.producer is None else self.tensors.pop(f"{group.producer}.weight", None)
        if group.producer is None or group.producer in self.held or shape is None or len(shape) != 1:
            raise Unproved(f"no norm makes what {group.readers[0]} reads")
        return Norm(group.producer, shape[0])

    def _below(self, name: str) -> Iterator[str]:
        """Tensors of a module that nothing has taken yet."""
        yield from [one for one in self.tensors if one.startswith(f"{name}.")]

    def _kept(self, tensor: str) -> Norm | Parameter:
        owner, shape = tensor.rpartition(".")[0], self.tensors[tensor]
        if not tensor.endswith(".weight") or len(shape) != 1 or not is_norm(self.model.get_submodule(owner)):
            return self._parameter(tensor)
        return Norm(owner, self.tensors.pop(tensor)[0])

    def _parameter(self, tensor: str) -> Parameter:
        return Parameter(tensor, self.tensors.pop(tensor))

    def _held(self, name: str) -> str:
        return self.held.get(name, name)
