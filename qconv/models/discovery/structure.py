"""A model's structure by layers: what reads one input, what made that input, and every tensor of the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qconv.boundary.printable import one_line
from qconv.checkpoint.config import MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, Config
from qconv.errors import CheckpointError
from qconv.models.discovery.tracing import is_fused_experts, is_reader, own_tensors, trace
from qconv.models.transformer import config_of, text_part

_LAYER = re.compile(r"^(?:.*\.)?layers\.(\d+)\.")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ReadTensor:
    """Modules that read the very same tensor.

    Attributes:
        readers: Their names in the checkpoint, sorted: linears, routers and fused experts.
        producer: The norm whose output they read as it is; None if something else made it.
    """

    readers: tuple[str, ...]
    producer: str | None


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """Experts that transformers holds together.

    Attributes:
        name: What their names in the checkpoint begin with.
        shapes: Their tensors in transformers' model, by leaf name: weights are [experts, ...].
        stored: The tensors of the checkpoint that each of those is saved as, in the order of experts.
    """

    name: str
    shapes: Shapes
    stored: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class LayerStructure:
    """One decoder layer.

    Attributes:
        index: Its number.
        groups: By what is read, in the order in which it is read.
        linears: ``[out_features, in_features]`` of every linear that is no router and no expert, by name.
        experts: Fused experts; empty for a dense layer.
        tensors: Every tensor of the layer in the checkpoint.
    """

    index: int
    groups: tuple[ReadTensor, ...]
    linears: Mapping[str, tuple[int, int]]
    experts: tuple[FusedExperts, ...]
    tensors: Shapes


@dataclass(frozen=True, slots=True)
class Discovery:
    """A whole model.

    Attributes:
        model_type: transformers' name of it.
        layers: In order.
        outside: The checkpoint's tensors that belong to no layer; a tied head is none.
        held: What modules and parameters of the checkpoint are called in transformers' model, where it is not the same.
    """

    model_type: str
    layers: tuple[LayerStructure, ...]
    outside: Shapes
    held: Mapping[str, str]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint with its shape."""
        found = dict(self.outside)
        for layer in self.layers:
            found |= layer.tensors
        return found


def discover(values: Mapping[str, Any]) -> Discovery:
    """The structure of the model that a config.json describes; of its text part where it has several.

    Raises:
        CheckpointError: transformers knows no such model type, does not accept the config, or its model cannot run.
    """
    return read_model(values)[0]


def read_model(values: Mapping[str, Any]) -> tuple[Discovery, nn.Module]:
    """The structure, and the model on the meta device that it was read off; its experts compute nothing any more.

    Raises:
        CheckpointError: as :func:`discover`.
    """
    config = read_config(values)
    from transformers import AutoModelForCausalLM

    untyped: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: nn.Module = untyped.from_config(config, dtype=torch.bfloat16).eval()
        experts = {name: module for name, module in model.named_modules() if is_fused_experts(module)}
        found = trace(model, experts)
        saved = _Saved(model)
    # Its checks raise a kind of their own, its modules whatever a value of another type makes them raise.
    except Exception as error:
        raise CheckpointError(
            f"config.json: unknown architecture: model_type {config.model_type!r}, and transformers' model of it does "
            f"not run: {one_line(error)}.",
            hint=f"Repair config.json, or declare the family in qconv/models/{config.model_type}.py.",
        ) from error
    structure = _Structure(model, experts, saved, found.reads, found.makes).discovery(config.model_type)
    _require_plausible(structure)
    return structure, model


def _require_plausible(found: Discovery) -> None:
    """Check that no tensor of a layer is empty, or wider than can be: what runs it to prove something takes memory.

    Raises:
        CheckpointError: one is; names it.
    """
    for layer in found.layers:
        for name, shape in layer.tensors.items():
            if not all(1 <= size <= MAX_WIDTH for size in shape):
                raise CheckpointError(
                    f"config.json: {name} would be {list(shape)}; sizes of 1 to {MAX_WIDTH:,} are read.",
                    hint="Repair config.json.",
                )


def read_config(values: Mapping[str, Any]) -> Any:
    """transformers' config of the model that a config.json describes, of its text part where it has several.

    Raises:
        CheckpointError: transformers knows no such model type, or does not accept the config.
    """
    limits = Config(text_part(values))
    layers = limits.integer("num_hidden_layers", default=1, most=MAX_LAYERS)
    if limits.integer(*_EXPERT_COUNTS, default=1, most=MAX_EXPERTS) * layers > MAX_EXPERTS:
        raise CheckpointError(f"config.json: more than {MAX_EXPERTS:,} experts.", hint="Repair config.json.")
    config = config_of(values)
    # Of all implementations this one never asks whether a mask can be left out, which needs numbers.
    config._attn_implementation = "eager"
    return config


class _Saved:
    """The names and shapes under which transformers saves a model's tensors, each tensor of the model by itself."""

    def __init__(self, model: nn.Module) -> None:
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        alone = {name: tensor for name, tensor in state.items() if tensor.dim() < 3}
        names = {id(tensor): name for name, tensor in alone.items()}
        self._saved: dict[str, dict[str, tuple[int, ...]]] = {}
        # What is only renamed is still the same tensor, so that all of it can be asked for together.
        for stored, tensor in _reverted(model, alone).items():
            if id(tensor) in names:
                self._saved[names[id(tensor)]] = {stored: tuple(tensor.shape)}
        for name in state.keys() - self._saved.keys():
            saved = _reverted(model, {name: state[name]})
            self._saved[name] = {stored: tuple(tensor.shape) for stored, tensor in saved.items()}
        self.names = list(state)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of everything in the checkpoint."""
        return {stored: shape for name in self.names for stored, shape in self._saved[name].items()}

    def of(self, name: str) -> tuple[str, ...]:
        """What one tensor of the model is saved as."""
        return tuple(self._saved[name])


def _reverted(model: Any, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    saved: Mapping[str, Tensor] = revert_weight_conversion(model, state)
    return saved


@dataclass(slots=True)
class _Structure:
    model: nn.Module
    experts: Mapping[str, nn.Module]
    saved: _Saved
    reads: Mapping[str, int]
    makes: Mapping[int, str]

    def discovery(self, model_type: str) -> Discovery:
        outside: dict[str, tuple[int, ...]] = {}
        by_layer: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.saved.shapes().items():
            index = _layer_of(name)
            (outside if index is None else by_layer.setdefault(index, {}))[name] = shape
        modules: dict[int, list[str]] = {}
        for name, module in self.model.named_modules():
            index = _layer_of(f"{name}.")
            if index is not None and (name in self.experts or is_reader(module)):
                modules.setdefault(index, []).append(name)
        layers = (self._layer(index, modules.get(index, []), by_layer[index]) for index in sorted(by_layer))
        return Discovery(model_type, tuple(layers), outside, dict(self._held()))

    def _held(self) -> Iterator[tuple[str, str]]:
        for name in self.saved.names:
            owner, _, leaf = name.rpartition(".")
            if owner in self.experts:
                stored, held = self._stored(owner), owner
            else:
                stored, held = self.saved.of(name)[0], name
                if leaf in ("weight", "bias") and stored.endswith(f".{leaf}"):
                    stored, held = stored.removesuffix(f".{leaf}"), owner
            if stored != held:
                yield stored, held

    def _layer(self, index: int, modules: Iterable[str], tensors: Shapes) -> LayerStructure:
        read: dict[int, list[str]] = {}
        linears, experts = {}, []
        # In the order in which they ran; what did not run comes last.
        order = {name: number for number, name in enumerate(self.reads)}
        for name in sorted(modules, key=lambda one: order.get(one, len(order))):
            called = self._stored(name)
            if name in self.reads:
                read.setdefault(self.reads[name], []).append(called)
            module = self.model.get_submodule(name)
            if name in self.experts:
                experts.append(self._experts(name, called))
            elif isinstance(module, nn.Linear):
                linears[called] = (module.out_features, module.in_features)
        groups = (ReadTensor(tuple(sorted(readers)), self._producer(number)) for number, readers in read.items())
        return LayerStructure(index, tuple(groups), linears, tuple(experts), tensors)

    def _producer(self, number: int) -> str | None:
        made = self.makes.get(number)
        return None if made is None else self._stored(made)

    def _experts(self, name: str, called: str) -> FusedExperts:
        own = dict(own_tensors(self.model.get_submodule(name)))
        return FusedExperts(
            called,
            {leaf: tuple(tensor.shape) for leaf, tensor in own.items()},
            {leaf: self.saved.of(f"{name}.{leaf}") for leaf in own},
        )

    def _stored(self, name: str) -> str:
        """A module's name in the checkpoint, by that of a tensor of its own."""
        leaf = next(leaf for leaf, _ in own_tensors(self.model.get_submodule(name)))
        first = self.saved.of(f"{name}.{leaf}")[0]
        if name not in self.experts:
            return first.removesuffix(f".{leaf}")
        # One tensor of all experts is saved as one an expert, with the number after the module's name.
        before, _, _ = re.sub(r"\.\d+\.[^.]+(?:\.weight)?$", ".", first).rpartition(".")
        return before


def _layer_of(name: str) -> int | None:
    found = _LAYER.match(name)
    return None if found is None else int(found[1])
