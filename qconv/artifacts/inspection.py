"""What a checkpoint consists of, read from its headers alone: anybody's, quantized or not, known architecture or not.

Modules are put in classes by their names: those that differ in numbers alone, such as one linear of every expert of
every layer, are one class. Packed words are counted as the weights they hold, by the naming conventions of the common
formats, so bits per weight mean the same for every checkpoint.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qconv.artifacts.bits import BitsByLayer, module_bits
from qconv.artifacts.layout import MLX, layout_of, quantization_section
from qconv.boundary.content import misplaced_files
from qconv.boundary.printable import name_of
from qconv.checkpoint.header import TensorEntry, read_header
from qconv.checkpoint.reader import Checkpoint
from qconv.errors import CheckpointError, UnreadLayoutError
from qconv.folders.state import require_finished
from qconv.formats.base import by_target
from qconv.models import is_known

SKIP_KEYS = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "llm_int8_skip_modules")
"""Where a quantization_config lists what is not quantized: AWQ, compressed-tensors, FP8, ModelOpt, bitsandbytes."""

_PACKED = ("qweight", "weight_packed")
"""Leaf names of tensors that hold several weights in a word; unsigned words named ``weight`` or ``*_blocks`` do too."""
_PAIRS = "w4afp8"
"""The method whose int8 weights are two numbers each, where others' are one."""
OUTSIDE = "-"
"""Name of the summary of what belongs to no layer."""
_PARAMETERS = re.compile(
    r"((.*_)?scales|biases|qzeros|g_idx|weight_scale|weight_scale_2|weight_scale_inv|weight_zero_point|weight_shape|weight_g_idx"
    r"|weight_global_scale|input_scale|input_global_scale|k_scale|v_scale|SCB|weight_format"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))"
)
"""Leaf names of tensors that hold no weights: scales, zero points and the like."""


@dataclass(slots=True)
class ModuleClass:
    """Modules whose names differ in numbers alone.

    Attributes:
        name: The common name, ``*`` for each number.
        modules: How many there are.
        weights: How many weights they hold together.
        nbytes: Bytes of all their tensors.
        tensors: How many tensors they have, by leaf name, dtype and shape.
    """

    name: str
    modules: int = 0
    weights: int = 0
    nbytes: int = 0
    tensors: Counter[tuple[str, str, tuple[int, ...]]] = field(default_factory=Counter)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of all tensors over weights; None where there are no weights."""
        return 8.0 * self.nbytes / self.weights if self.weights else None


@dataclass(slots=True)
class LayerSummary:
    """What belongs to one layer, or (``name`` is :data:`OUTSIDE`) to none."""

    name: str
    tensors: int = 0
    weights: int = 0
    nbytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint's make-up.

    Attributes:
        path: Its folder or file.
        architecture: The class or model type that config.json names, or None.
        known: Whether qconv knows the architecture.
        quantization: The plain values of config.json's quantization_config; None for an unquantized checkpoint.
        format: qconv's name of its layout, None for dense weights and where it reads no such layout.
        skipped: The skip list of its quantization_config.
        entries: Every tensor by name, in file order.
        shards: How many files hold them.
        classes: The module classes, in the files' order.
        layers: What lies outside of layers, then each layer.
        bits_by_layer: Of the layers' matrices, by role.
        notices: What a reader should know, as sentences: files that a failed download left.
    """

    path: Path
    architecture: str | None
    known: bool
    quantization: Mapping[str, Any] | None
    format: str | None
    skipped: tuple[str, ...]
    entries: Mapping[str, TensorEntry]
    shards: int
    classes: tuple[ModuleClass, ...]
    layers: tuple[LayerSummary, ...]
    bits_by_layer: BitsByLayer
    notices: tuple[str, ...] = ()

    @property
    def layer_count(self) -> int:
        """The number of layers."""
        return sum(layer.name != OUTSIDE for layer in self.layers)

    @property
    def weights(self) -> int:
        """The number of weights."""
        return sum(one.weights for one in self.classes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.nbytes for one in self.classes)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of all tensors over weights."""
        return 8.0 * self.nbytes / self.weights if self.weights else None


def inspect(path: Path) -> Inspection:
    """Inspect a checkpoint's folder, or a single safetensors file.

    Raises:
        CheckpointError: a file is damaged or missing, or the folder holds an unfinished build.
    """
    if path.is_file():
        return _inspection(path, {}, read_header(path))
    require_finished(path)
    checkpoint = Checkpoint.open(path)
    notices = tuple(
        f"{name_of(name)} is {instead.what}. {instead.remedy}" for name, instead in misplaced_files(path).items()
    )
    return replace(_inspection(path, checkpoint.config, checkpoint.entries), notices=notices)


def name_class(name: str) -> str:
    """A module's or tensor's name with ``*`` for each of its numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def split_name(tensor: str) -> tuple[str, str]:
    """A tensor's module and leaf name; the leaf has dots where a format's own names have them."""
    module, separator, leaf = tensor.partition(".weight.")
    if separator:
        return module, f"weight.{leaf}"
    module, _, leaf = tensor.rpartition(".")
    return module, leaf


def logical_weights(leaf: str, dtype: torch.dtype, shape: Iterable[int], bits: int) -> int:
    """How many weights a tensor holds.

    Args:
        leaf: Its name within its module.
        dtype: Its dtype.
        shape: Its shape.
        bits: Bits of a packed weight, from the checkpoint's config.
    """
    if _PARAMETERS.fullmatch(leaf):
        return 0
    elements = math.prod(shape)
    in_words = dtype in (torch.uint8, torch.uint32) and (leaf == "weight" or leaf.endswith("_blocks"))
    packed = leaf in _PACKED or in_words
    return elements * dtype.itemsize * 8 // bits if packed else elements


def _inspection(path: Path, config: dict[str, Any], entries: Mapping[str, TensorEntry]) -> Inspection:
    section, layout = quantization_section(path, config), None
    with suppress(UnreadLayoutError):
        layout = layout_of(path, config)
    pairs = torch.int8 if (section or {}).get("quant_method") == _PAIRS else None
    bits, bits_of = _bits(section or {}), _bits_by_group(section or {}, {split_name(name)[0] for name in entries})
    classes: dict[str, ModuleClass] = {}
    layers: dict[str, LayerSummary] = {}
    modules = set()
    matrices = {split_name(entry.name)[0] for entry in entries.values() if len(entry.shape) > 1}
    amounts = []
    for entry in entries.values():
        module, leaf = split_name(entry.name)
        # A dtype whose elements share bytes counts elements in its shapes.
        weights = (
            entry.numel if entry.packed else logical_weights(leaf, entry.dtype, entry.shape, bits_of.get(module, bits))
        )
        weights *= 2 if entry.dtype is pairs and leaf == "weight" else 1
        if module in matrices:
            amounts.append((module, entry.nbytes, weights))
        dtype = entry.dtype_name
        one = classes.setdefault(name_class(module), ModuleClass(name_class(module)))
        one.modules += module not in modules
        one.weights += weights
        one.nbytes += entry.nbytes
        one.tensors[leaf, dtype, entry.shape] += 1
        modules.add(module)
        layer = layers.setdefault(_layer(module), LayerSummary(_layer(module)))
        layer.tensors += 1
        layer.weights += weights
        layer.nbytes += entry.nbytes
        layer.dtypes[dtype] += entry.nbytes
    return Inspection(
        path=path,
        architecture=_architecture(config),
        known=is_known(config),
        quantization=None if section is None else dict(_plain_values(section)),
        format=None if layout is None else layout.name,
        skipped=tuple(_skip_list(section or {})),
        entries=entries,
        shards=len({entry.file for entry in entries.values()}),
        classes=tuple(classes.values()),
        bits_by_layer=module_bits(amounts),
        layers=tuple(sorted(layers.values(), key=lambda layer: natural_order(layer.name))),
    )


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts layer 10 after layer 9, and numbered parts after the others."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _layer(module: str) -> str:
    """The module's name up to its first number."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return OUTSIDE if number is None else ".".join(parts[: number + 1])


def _architecture(config: Mapping[str, Any]) -> str | None:
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else config.get("model_type")
    return name if isinstance(name, str) else None


def _plain_values(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, strings, booleans and lists of numbers by dotted key; other lists are skip lists, told apart."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _plain_values(value, f"{prefix}{key}.")
        elif isinstance(value, (str, int, float)) or (isinstance(value, list) and _are_numbers(value)):
            yield f"{prefix}{key}", value


def _are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, (int, float)) for value in values)


def _bits(section: Mapping[str, Any]) -> int:
    """Bits of a packed weight: the first that the section names, 4 where it names none."""
    for key, value in _plain_values(section):
        leaf = key.rpartition(".")[2]
        if "activations" in key or "kv_cache" in key:
            continue
        if leaf in ("bits", "w_bit", "num_bits") and isinstance(value, int) and 1 <= value <= 16:
            return value
    return 4


def _bits_by_group(section: Mapping[str, Any], modules: Iterable[str]) -> dict[str, int]:
    """Bits of a packed weight of each module that says otherwise than the rest: of several config groups, by name."""
    if section.get("quant_method") == MLX:
        return {name: _bits(said) for name, said in section.items() if isinstance(said, dict)}
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or len(groups) < 2:
        return {}
    said = []
    for group in groups.values():
        targets = group.get("targets") if isinstance(group, dict) else None
        if isinstance(targets, list) and all(isinstance(one, str) for one in targets):
            said.append((targets, _bits(group)))
    with suppress(CheckpointError):
        return by_target(said, modules)
    return {}


def _skip_list(section: Mapping[str, Any]) -> Iterator[str]:
    for key in SKIP_KEYS:
        value = section.get(key)
        if isinstance(value, list):
            yield from (entry for entry in value if isinstance(entry, str))
    # GPTQModel's exceptions: keys of a mapping, a leading "-:" for what stays unquantized.
    dynamic = section.get("dynamic")
    if isinstance(dynamic, dict):
        yield from (key for key in dynamic if key.startswith("-:"))
