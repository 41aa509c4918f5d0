"""What an engine sees of a build: config.json, the headers of its tensors, which files there are, GGUF's keys.

Nothing here knows a model or a format of qconv: rules must speak of builds that others wrote, damaged ones among them.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qconv.checkpoint.config import language_part
from qconv.errors import CheckpointError
from qconv.formats.base import by_target

GGUF, DENSE, MLX, MODELOPT, COMPRESSED = "gguf", "dense", "mlx", "modelopt", "compressed-tensors"
CODES = ("weight_packed", "qweight", "weight_blocks", "blocks")
"""Leaves that hold nothing but codes."""
SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "scales", "qzeros")
"""Leaves that say that the module beside them is quantized."""
_FLOATS = ("BF16", "F16", "F32")
_LAYER = re.compile(r"(?P<layer>.*?\blayers\.\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"(?P<block>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>[^.]+)")
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)
"""Linears of one parent that engines hold as one, by their last names."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: its dtype as safetensors or ggml call it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Deployment:
    """Over how many devices a build is to be served: ``tp`` ranks split a tensor, ``ep`` ranks the experts."""

    tp: int = 1
    ep: int = 1

    @property
    def expert_ranks(self) -> int:
        """How many ranks split one expert."""
        return self.tp if self.ep == 1 else 1


@dataclass(frozen=True)
class Subject:
    """A build as rules look at it.

    Attributes:
        config: config.json; empty for GGUF.
        section: Its ``quantization_config``, or what stands for one; None for dense weights and GGUF.
        tensors: Everything that is stored, by name.
        files: Names of the folder's files; None where nothing was written yet.
        keys: GGUF's key/values; None for safetensors.
        generation: generation_config.json; None if there is none.
        quantization_file: hf_quant_config.json; None if there is none.
        template: The text of its chat templates; None if there is none.
        read: Gives a tensor's values by name; None where nothing was written yet.
    """

    config: Mapping[str, Any]
    section: Mapping[str, Any] | None
    tensors: Mapping[str, Stored]
    files: frozenset[str] | None = None
    keys: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] | None = None
    quantization_file: Mapping[str, Any] | None = None
    template: str | None = ""
    read: Callable[[str], Tensor] | None = field(default=None, compare=False)

    @property
    def layout(self) -> str:
        """What the way of storing is called: ``awq``, ``pack-quantized``, ``modelopt NVFP4``, ``gguf`` ..."""
        if self.keys is not None:
            return GGUF
        if self.section is None:
            return DENSE
        method = str(self.section.get("quant_method"))
        if method == COMPRESSED:
            return str(self.section.get("format") or method)
        if method == MODELOPT:
            return f"{method} {self.section.get('quant_algo')}"
        return method

    @functools.cached_property
    def text(self) -> Mapping[str, Any]:
        """What config.json says of the language model."""
        try:
            return language_part(dict(self.config))
        except CheckpointError:
            return self.config

    @property
    def model_type(self) -> str:
        """The language model's type; empty where none is named."""
        return str(self.text.get("model_type") or self.config.get("model_type") or "")

    @functools.cached_property
    def modules(self) -> dict[str, dict[str, Stored]]:
        """Every module's tensors by the last part of their names."""
        found: dict[str, dict[str, Stored]] = {}
        for name, stored in self.tensors.items():
            module, _, leaf = name.rpartition(".")
            found.setdefault(module, {})[leaf] = stored
        return found

    @functools.cached_property
    def quantized(self) -> dict[str, dict[str, Stored]]:
        """The modules that hold codes, or scales beside a weight."""
        return {
            name: leaves
            for name, leaves in self.modules.items()
            if any(leaf in leaves for leaf in CODES) or any(leaf in leaves for leaf in SCALES)
        }

    @functools.cached_property
    def dense(self) -> tuple[str, ...]:
        """The linears of layers that are stored as plain weights, and the head."""
        return tuple(
            name
            for name, leaves in self.modules.items()
            if name not in self.quantized
            and "weight" in leaves
            and leaves["weight"].dtype in _FLOATS
            and len(leaves["weight"].shape) == 2
            and (_LAYER.fullmatch(name) is not None or name.rpartition(".")[2] == "lm_head")
            and not name.rpartition(".")[2].startswith("conv")
        )

    @functools.cached_property
    def experts(self) -> dict[str, list[str]]:
        """The linears of experts of their own tensors, by the module that holds them all."""
        found: dict[str, list[str]] = {}
        for name in (*self.quantized, *self.dense):
            match = _EXPERT.fullmatch(name)
            if match is not None:
                found.setdefault(match["block"], []).append(name)
        return found

    @functools.cached_property
    def config_groups(self) -> dict[str, Mapping[str, Any]]:
        """compressed-tensors' config groups by name, those that are objects."""
        groups = (self.section or {}).get("config_groups")
        return {name: one for name, one in groups.items() if isinstance(one, dict)} if isinstance(groups, dict) else {}

    @functools.cached_property
    def groups(self) -> dict[str, Mapping[str, Any]]:
        """What compressed-tensors' config groups say of each module of a layer, exceptions or not."""
        given = [(targets_of(group), group) for group in self.config_groups.values()]
        try:
            return by_target(given, (*self.quantized, *self.dense))
        except CheckpointError:
            return {}

    @functools.cached_property
    def attentions(self) -> tuple[dict[str, frozenset[str]], ...]:
        """The attention blocks of layers, of each kind, with the last names of their linears."""
        found: dict[str, dict[str, set[str]]] = {}
        for name in (*self.quantized, *self.dense):
            layer = _LAYER.fullmatch(name)
            parent, _, leaf = name.rpartition(".")
            if layer is not None and "attn" in layer["rest"]:
                kind = layer["rest"].rpartition(".")[0]
                found.setdefault(kind, {}).setdefault(parent, set()).add(leaf)
        return tuple({parent: frozenset(leaves) for parent, leaves in of.items()} for of in found.values())

    def weights(self, module: str) -> Mapping[str, Any]:
        """What the config says of a module's weights, in compressed-tensors' words; empty where it says nothing."""
        group = self.groups.get(module)
        weights = group.get("weights") if group is not None else None
        return weights if isinstance(weights, dict) else {}

    def names(self, *keys: str) -> tuple[str, ...]:
        """The entries of the section's lists of exceptions, under any of ``keys``."""
        found: list[str] = []
        for key in keys:
            value = (self.section or {}).get(key)
            found += [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []
        return tuple(found)

    def number(self, key: str) -> int | None:
        """A whole number of the section."""
        value = (self.section or {}).get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @functools.cached_property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """The linears that engines hold as one, two or more that are there of each kind and parent."""
        present = {*self.quantized, *self.dense}
        parents = dict.fromkeys(name.rpartition(".")[0] for name in present)
        found = (
            tuple(name for leaf in leaves if (name := f"{parent}.{leaf}") in present)
            for parent in parents
            for leaves in FUSED
        )
        return tuple(names for names in found if len(names) > 1)

    @functools.cached_property
    def siblings(self) -> tuple[tuple[str, ...], ...]:
        """Modules that must be alike: the same linear of every expert of a layer, and of every layer's attention."""
        found: dict[str, list[str]] = {}
        linears = {*self.quantized, *self.dense}
        for name in self.modules:
            expert, layer = _EXPERT.fullmatch(name), _LAYER.fullmatch(name)
            if expert is not None:
                found.setdefault(f"{expert['block']}.*.{expert['leaf']}", []).append(name)
            elif layer is not None and "attn" in layer["rest"] and name in linears:
                found.setdefault(f"*.{layer['rest']}", []).append(name)
        return tuple(tuple(names) for names in found.values() if len(names) > 1)

    def size(self, module: str) -> tuple[int, int] | None:
        """(out_features, in_features) of a linear, from the shapes of what is stored; None where these do not say."""
        leaves = {leaf: one for leaf, one in self.modules.get(module, {}).items() if len(one.shape) == 2}
        bits = self.bits(module)
        if "qweight" in leaves:
            rows, columns = leaves["qweight"].shape
            packed = 32 // bits
            return (columns * packed, rows) if self.layout == "awq" else (columns, rows * packed)
        if "weight_packed" in leaves:
            rows, columns = leaves["weight_packed"].shape
            return rows, columns * (2 if leaves["weight_packed"].dtype == "U8" else 32 // bits)
        weight = leaves.get("weight")
        if weight is None:
            return None
        rows, columns = weight.shape
        in_word = {"U8": 2, "U32": 32 // bits}.get(weight.dtype, 1)
        if weight.dtype == "I8" and self.layout == "w4afp8":
            in_word = 2
        return rows, columns * in_word

    def bits(self, module: str) -> int:
        """Bits of a code, by the config; 4 where it does not say."""
        found = self.weights(module).get("num_bits") or self.number("bits")
        return found if isinstance(found, int) and 1 <= found <= 16 else 4

    def block(self, module: str) -> tuple[int, int]:
        """Rows and columns that share a scale; 1 for rows that share none, 0 columns where a row has one scale."""
        leaves, size = self.modules.get(module, {}), self.size(module)
        weights, section = self.weights(module), self.section or {}
        structure = weights.get("block_structure") or section.get("weight_block_size")
        if isinstance(structure, list) and len(structure) == 2 and all(isinstance(side, int) for side in structure):
            return structure[0], structure[1]
        group = weights.get("group_size") or section.get("group_size")
        if self.layout == "w4afp8" and leaves.get("weight", Stored("", ())).dtype.startswith("F8"):
            return 128, 128
        if isinstance(group, int) and group > 0:
            return 1, group
        scale = leaves.get("weight_scale") or leaves.get("scales")
        if size is not None and scale is not None and len(scale.shape) == 2 and scale.shape[1] > 1:
            return 1, size[1] // scale.shape[1]
        return 1, 0

    def first(self, name: str) -> float | None:
        """The first number of a tensor; None where it is not there, has none, or nothing was written yet."""
        stored = self.tensors.get(name)
        if self.read is None or stored is None or 0 in stored.shape:
            return None
        return float(self.read(name).reshape(-1)[0])


def targets_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    """What a config group targets, as strings; empty where there is no list."""
    targets = group.get("targets")
    return tuple(map(str, targets)) if isinstance(targets, list) else ()


def odd_ones(subject: Subject, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Of modules that must be alike, each that lacks a tensor that most have, with what it lacks."""
    usual = most_frequent([frozenset(subject.modules[name]) for name in names])
    for name in names:
        missing = sorted(usual - frozenset(subject.modules[name]))
        if missing:
            yield name, missing[0]


def odd_shapes(subject: Subject, names: Sequence[str]) -> Iterator[str]:
    """Of modules that must be alike, the tensors whose shape or dtype is another than most have."""
    for leaf in sorted(most_frequent([frozenset(subject.modules[name]) for name in names])):
        held = {name: subject.modules[name][leaf] for name in names if leaf in subject.modules[name]}
        usual = Counter(held.values()).most_common(1)[0][0]
        yield from (f"{name}.{leaf}" for name, one in held.items() if one != usual)


def most_frequent(kinds: list[frozenset[str]]) -> frozenset[str]:
    """The most frequent of them; of equally frequent ones the largest."""
    counts = Counter(kinds)
    return max(counts, key=lambda kind: (counts[kind], len(kind)), default=frozenset())
