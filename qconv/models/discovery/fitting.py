"""The architecture of a model type that no file declares, where its layers are of a kind that qconv works on.

That is: a mixer of tokens that reads one norm, then a gated MLP or a sparse block that reads another, each added to
what runs through the layers. ``proofs`` shows by numbers what names cannot say. What a layer has beside that
(head norms, sinks, correction biases) belongs to transformers' own modules, and is kept as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import nn

from qconv.core.architecture import (
    EMBEDDING,
    HEAD,
    Architecture,
    Attention,
    InputGroup,
    Layer,
    Linear,
    Mixer,
    Mlp,
    Moe,
    Norm,
    Parameter,
)
from qconv.errors import CheckpointError
from qconv.models.discovery.kept import reason_to_keep
from qconv.models.discovery.nested import in_whole
from qconv.models.discovery.proofs import Proofs
from qconv.models.discovery.stand_ins import Unproved
from qconv.models.discovery.structure import Discovery, FusedExperts, LayerStructure, ReadTensor, read_model
from qconv.models.discovery.tracing import is_norm, settings_of

_DENSE = ("gate_proj", "up_proj", "down_proj")
_JOINED_LEAVES = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def fitted(values: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json of a type without a family file describes.

    Raises:
        CheckpointError: transformers cannot make the model, or its layers are of another kind; says which.
    """
    return _fitted(json.dumps(values, sort_keys=True, default=str))


@lru_cache(maxsize=4)
def _fitted(described: str) -> Architecture:
    values = json.loads(described)
    found, model = read_model(values)
    try:
        architecture = _Fitting(found, Proofs(model, found.held), model).architecture()
    except Unproved as error:
        raise CheckpointError(
            f"config.json: unknown architecture: model_type {found.model_type!r} is of a kind that qconv does not work "
            f"on: {error}.",
            hint=f"The family file that declares it would be qconv/models/{found.model_type}.py.",
        ) from error
    return in_whole(values, model, architecture)


@dataclass(slots=True)
class _Fitting:
    found: Discovery
    proofs: Proofs
    model: nn.Module
    proved: dict[str, tuple[tuple[bool, ...], bool]] = field(default_factory=dict)

    def architecture(self) -> Architecture:
        outside = dict(self.found.outside)
        norm = f"model.{self.proofs.final_norm}"
        embedding, head, final = (outside.pop(f"{name}.weight", None) for name in (EMBEDDING, HEAD, norm))
        if outside or embedding is None or final is None:
            raise Unproved(f"beside its layers it has {next(iter(outside), 'no embedding or no norm')}")
        self.proofs.ends()
        layers = tuple(self._layer(one) for one in self.found.layers)
        heads = self.proofs.heads
        head_dim, shared = self._heads(layers, heads)
        experts = (one for layer in self.found.layers for one in layer.experts)
        return Architecture(
            family=self.found.model_type,
            hidden_size=embedding[1],
            num_attention_heads=heads,
            num_key_value_heads=shared,
            head_dim=head_dim,
            embedding=Linear(EMBEDDING, embedding[0], embedding[1]),
            layers=layers,
            final_norm=Norm(norm, final[0]),
            lm_head=None if head is None else Linear(HEAD, head[0], head[1]),
            held=self.found.held,
            joined=replace(self.proofs.joined(), always=any(map(_lie_together, experts))),
        )

    def _heads(self, layers: Sequence[Layer], heads: int) -> tuple[int, int]:
        """The width of a head, and the number of heads of keys and values."""
        for group in (group for layer in layers for group in layer.groups()):
            if isinstance(group.producer, Linear):
                head_dim = group.in_features // heads
                return head_dim, group.producer.out_features // head_dim
        return max(1, layers[0].groups()[-1].in_features // heads), self.proofs.key_value_heads

    def _layer(self, structure: LayerStructure) -> Layer:
        name = f"model.layers.{structure.index}"
        parts = _Parts.of(structure, self.model, self.found.held, self.proofs)
        attention, input_norm = parts.mixer(structure)
        experts = structure.experts
        mlp: tuple[Mlp | Moe, Norm] = parts.sparse(experts) if experts else parts.dense(structure)
        parts.require_all_taken()
        layer = Layer(structure.index, name, input_norm, attention, mlp[1], mlp[0])
        kind = repr(layer).replace(f"{name}.", "").replace(name, "").replace(f"index={structure.index}", "")
        kind += settings_of(self.model.get_submodule(name))
        if kind not in self.proved:
            self.proofs.layer(layer)
            self.proved[kind] = self.proofs.folding_groups(layer), self._by_heads(layer)
        return _with_producers(layer, *self.proved[kind])

    def _by_heads(self, layer: Layer) -> bool:
        """Whether the last linear reads the outputs of v by heads, so that scales fold into v."""
        v, o = _values(layer), layer.groups()[-1].linears[-1]
        return v is not None and self.proofs.reads_by_heads(layer, v, o)


def _lie_together(experts: FusedExperts) -> bool:
    """Whether the checkpoint has one tensor for all experts of a layer."""
    return len(experts.stored["gate_up_proj"]) == 1


def _values(layer: Layer) -> Linear | None:
    """v, where the first linears have one and the last is alone."""
    groups = layer.groups()
    if len(groups) < 2 or len(groups[-1].linears) != 1:
        return None
    return next((one for one in groups[0].linears if one.name == f"{layer.attention.name}.v_proj"), None)


def _with_producers(layer: Layer, folding: Sequence[bool], by_heads: bool) -> Layer:
    """The layer with what its mixer's linears read where scales fold into it; as :class:`Attention` where it is one.

    Args:
        layer: The layer, with all norms that are read.
        folding: For each group of linears whether scales fold into its norm.
        by_heads: Whether they fold from the last linear into v.
    """
    mixer = layer.attention
    assert isinstance(mixer, Mixer)
    by_leaf = {one.name.removeprefix(f"{mixer.name}."): one for one in mixer.linears()}
    beside = any(isinstance(one, Linear) for one in mixer.unquantized)
    if by_heads and folding[0] and not beside and {*by_leaf} == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        q, k, v, o = (by_leaf[f"{one}_proj"] for one in "qkvo")
        if q.out_features == o.in_features:
            norms = tuple(one for one in mixer.unquantized if isinstance(one, Norm))
            parameters = tuple(one for one in mixer.unquantized if isinstance(one, Parameter))
            return replace(layer, attention=Attention(q, k, v, o, norms, parameters))
    groups = [
        group if folds else replace(group, producer=None) for group, folds in zip(mixer.groups, folding, strict=True)
    ]
    if by_heads:
        groups[-1] = replace(groups[-1], producer=_values(layer))
    return replace(layer, attention=replace(mixer, groups=tuple(groups)))


@dataclass(slots=True)
class _Parts:
    """A layer's groups by reader and its tensors, as they are taken for one thing after the other."""

    model: nn.Module
    held: Mapping[str, str]
    proofs: Proofs
    groups: dict[str, ReadTensor]
    tensors: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, structure: LayerStructure, model: nn.Module, held: Mapping[str, str], proofs: Proofs) -> _Parts:
        groups = {reader: group for group in structure.groups for reader in group.readers}
        return cls(model, held, proofs, groups, dict(structure.tensors))

    def mixer(self, structure: LayerStructure) -> tuple[Mixer, Norm]:
        """What mixes tokens: all that runs before the MLP, and the norm before it."""
        if not structure.groups:
            raise Unproved("a layer has no linears")
        layer = f"model.layers.{structure.index}"
        name = f"{layer}.{structure.groups[0].readers[0].removeprefix(f'{layer}.').split('.')[0]}"
        if any(stored.startswith(f"{name}.") for stored in self.held):
            raise Unproved(f"transformers holds {name} under another name")
        groups, kept = [], []
        norm: Norm | None = None
        for number, read in enumerate(one for one in structure.groups if one.readers[0].startswith(f"{name}.")):
            self._take(read.readers)
            linears = [self._linear(one) for one in read.readers]
            stay = [one for one in linears if reason_to_keep(one.name.removeprefix(f"{name}.")) is not None]
            quantizable = tuple(one for one in linears if one not in stay)
            kept += stay
            producer = self._norm(read) if number == 0 or (read.producer and quantizable) else None
            norm = producer if number == 0 else norm
            if quantizable:
                groups.append(InputGroup(quantizable, producer, tuple(stay)))
        inside = [group.producer for group in groups[1:] if isinstance(group.producer, Norm)]
        others = [self._kept(one) for one in self._below(name)]
        if norm is None or not groups or groups[0].producer != norm:
            raise Unproved(f"no norm makes what {name} reads")
        return Mixer(name, tuple(groups), (*inside, *others, *kept)), norm

    def dense(self, structure: LayerStructure) -> tuple[Mlp, Norm]:
        """A gated MLP, which reads what the mixer has left, and the norm before it."""
        layer = f"model.layers.{structure.index}."
        left = [one.readers[0] for one in structure.groups if one.readers[0] in self.groups]
        name = layer + (left[0].removeprefix(layer).split(".")[0] if left else "mlp")
        gate, up, _ = (f"{name}.{leaf}" for leaf in _DENSE)
        return self._mlp(name), self._norm(self._take([gate, up]))

    def sparse(self, found: Sequence[FusedExperts]) -> tuple[Moe, Norm]:
        """Experts, what decides about them, a shared expert, and the norm before them."""
        (experts, *others) = found
        biased = "gate_up_proj_bias" in experts.shapes
        leaves = _JOINED_LEAVES if biased else _JOINED_LEAVES[:2]
        if others or {*experts.shapes} != {*leaves}:
            raise Unproved(f"{experts.name} are not gated experts")
        if not experts.name.endswith(".experts"):
            raise Unproved(f"{experts.name} are experts under a name of their own")
        hidden = self.proofs.hidden
        form = self.proofs.experts(self._held(experts.name), hidden)
        count, *sides = experts.shapes["down_proj"]
        width = sides[0] if form.transposed else sides[1]
        block = experts.name.rpartition(".")[0]
        group = self._read_by(experts.name, block)
        shared = [one.rpartition(".")[0] for one in group.readers if one.endswith(".gate_proj")]
        fed = {experts.name, *(f"{one}.{leaf}" for one in shared for leaf in _DENSE[:2])}
        # A shared expert may be as wide as there are experts.
        by_shape = {self.tensors.get(f"{one}.weight"): one for one in group.readers if one not in fed}
        router, gate = by_shape.pop((count, hidden), None), by_shape.pop((1, hidden), None)
        held = self._held(experts.name).rpartition(".")[0]
        if router is None or not self._held(router).startswith(f"{held}."):
            raise Unproved(f"{block} has no router beside its experts")
        readers = fed & {*group.readers} | {router}
        if len(shared) > 1 or {*group.readers} != (readers if gate is None else readers | {gate}):
            raise Unproved(f"{block} has more than experts, a router and a shared expert")
        mlps = self._experts(experts, (count, width, hidden), form.folds)
        top_k, on_inputs = self.proofs.choice(held, self._held(router))
        made = Moe(
            self._linear(router),
            tuple(mlps),
            top_k,
            self._mlp(shared[0]) if shared else None,
            None if gate is None else self._linear(gate),
            tuple(self._parameter(one) for one in self._below(block)),
            on_inputs,
        )
        return made, self._norm(group)

    def _read_by(self, experts: str, block: str) -> ReadTensor:
        """What experts read with others, or where that is scaled for them, what the others in their block read."""
        found = self.groups.get(experts)
        if found is None:
            raise Unproved(f"nothing is known of what {experts} read")
        self._take(found.readers)
        if found.readers != (experts,):
            return found
        others = [one for one in self.groups.values() if one.producer and one.readers[0].startswith(f"{block}.")]
        if not others:
            raise Unproved(f"no norm makes what {experts} read")
        return self._take(others[0].readers)

    def require_all_taken(self) -> None:
        """Check that nothing is left."""
        if self.tensors or self.groups:
            raise Unproved(f"a layer has {next(iter([*self.tensors, *self.groups]))}")

    def _take(self, readers: Sequence[str]) -> ReadTensor:
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

    def _experts(self, found: FusedExperts, sizes: tuple[int, int, int], folds: bool) -> Iterator[Mlp]:
        """Each expert's linears, which the checkpoint holds by themselves or joined."""
        count, width, hidden = sizes
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        if not _lie_together(found):
            if [len(found.stored[leaf]) for leaf in _JOINED_LEAVES[:2]] != [2 * count, count]:
                raise Unproved(f"{found.name} lie together in a way of their own")
            weights = [*found.stored["gate_up_proj"], *found.stored["down_proj"]]
            for index in range(count):
                gate, up, down = (
                    self._expert(weights[index + start * count], *shape) for start, shape in enumerate(shapes.values())
                )
                yield Mlp(gate, up, down, folds)
            return
        for stored in found.stored.values():
            if len(stored) != 1 or self.tensors.pop(stored[0], None) is None:
                raise Unproved(f"{found.name} lie together in a way of their own")
        biased = len(found.stored) > 2
        for index in range(count):
            gate, up, down = (Linear(f"{found.name}.{index}.{leaf}", *shapes[leaf], biased) for leaf in shapes)
            yield Mlp(gate, up, down, folds)

    def _expert(self, weight: str, out_features: int, in_features: int) -> Linear:
        if self.tensors.pop(weight, None) != (out_features, in_features) or not weight.endswith(".weight"):
            raise Unproved(f"{weight} is not [{out_features}, {in_features}]")
        return Linear(weight.removesuffix(".weight"), out_features, in_features)

    def _norm(self, group: ReadTensor) -> Norm:
        shape = None if group.producer is None else self.tensors.pop(f"{group.producer}.weight", None)
        if group.producer is None or group.producer in self.held or shape is None or len(shape) != 1:
            raise Unproved(f"no norm makes what {group.readers[0]} reads")
        return Norm(group.producer, shape[0], self.proofs.offset(group.producer))

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
