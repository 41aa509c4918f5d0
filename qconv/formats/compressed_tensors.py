"""compressed-tensors: the words of its ``quantization_config``, and one format for all of its layouts that are read.

A config group says of the linears that it targets how weights and inputs are quantized, and in which layout they lie
(its ``format``): integers in ``pack-quantized`` or ``int-quantized``, E4M3 floats in ``float-quantized`` or
``mxfp8-quantized``, E2M1 floats in ``nvfp4-pack-quantized`` or ``mxfp4-pack-quantized``. Groups of several layouts
together are called ``mixed-precision``. One group that is written targets every Linear; of several each
names its linears by regular expressions that exclude each other, since readers rank targets in different ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.core.qtensor import Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.formats.base import LINEAR, AllInConfig, Described, Group, TensorReader, matches, require_readable, skip_list
from qconv.formats.cache import COMPRESSED_TENSORS, CacheNaming
from qconv.formats.float4 import MXFP4_PAIRS, NVFP4_PAIRS
from qconv.formats.float8 import FLOATS, MX_FLOATS
from qconv.formats.packed import PACKED, WHOLE_NUMBERS, WholeNumberGrid, by_token, not_read

VERSION = "0.20.0"
"""The release whose layouts these are; written to config.json as readers expect."""
MIXED_PRECISION = "mixed-precision"
MICROSCALING = 32
"""Elements that share a scale in all of OCP's microscaling formats."""
_LAYER = re.compile(r".*\.layers\.(\d+)\.(.+)")


class Layout(Protocol):
    """How one of the compression formats lays out a linear."""

    @property
    def kind(self) -> str:
        """What compressed-tensors calls it."""

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype) -> Grid:
        """As :meth:`qconv.formats.base.Format.grid`."""

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """As :meth:`qconv.formats.base.Format.check`."""

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """As :meth:`qconv.formats.base.Format.specs`."""

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """As :meth:`qconv.formats.base.Format.pack`."""

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """As :meth:`qconv.formats.base.Format.unpack`."""

    def describe(self, grid: Grid) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What a config group says of weights and of activations, None for activations that are left alone."""

    def read(self, group: Mapping[str, Any], weight_dtype: torch.dtype) -> Grid:
        """The grid of a config group.

        Raises:
            CheckpointError: one that is not read.
        """


LAYOUTS: tuple[Layout, ...] = (PACKED, WHOLE_NUMBERS, FLOATS, MX_FLOATS, NVFP4_PAIRS, MXFP4_PAIRS)


def layout_of(grid: Grid) -> Layout:
    """The layout of a linear on a grid."""
    if isinstance(grid, WholeNumberGrid):
        return WHOLE_NUMBERS
    return _layout(grid.number, grid.group_size == MICROSCALING)


def _layout(number: Number, microscaling: bool) -> Layout:
    """The layout of codes of a kind, in OCP's microscaling formats or not."""
    if number == "int":
        return PACKED
    if number == "e4m3":
        return MX_FLOATS if microscaling else FLOATS
    return MXFP4_PAIRS if microscaling else NVFP4_PAIRS


class CompressedTensors(AllInConfig):
    """compressed-tensors' layouts as one format; a format adds its name, what it takes by default and recognizes."""

    name: str
    number: Number
    """What codes are where a recipe does not say."""
    microscaling = False
    """Whether they are then those of OCP's microscaling formats."""
    pack_columns = 1
    act_order = False
    mixes = True
    cache: CacheNaming | None = COMPRESSED_TENSORS

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """Integers in groups or rows, or floats by row, block or group.

        Raises:
            RecipeError: the layout cannot express the settings.
        """
        if number is None:
            return _layout(self.number, self.microscaling).grid(settings, weight_dtype)
        return _layout(number, settings.group_size == MICROSCALING).grid(settings, weight_dtype)

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Why a linear of that shape cannot be stored, or None."""
        return layout_of(grid).check(out_features, in_features, grid)

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """The tensors of the grid's layout."""
        return layout_of(grid).specs(module, out_features, in_features, grid)

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        return layout_of(weight.grid).pack(module, weight)

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """The QTensor of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent, misshapen, or contradicts the others.
        """
        return layout_of(grid).unpack(module, shape, read, grid)

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """A config group for each grid, and the list of exceptions."""
        kinds = {layout_of(grid).kind for grid in quantized}
        targets = [[LINEAR]] if len(quantized) == 1 else list(_targets(list(quantized.values())))
        groups = [_group(grid, names) for grid, names in zip(quantized, targets, strict=True)]
        return {
            "quant_method": "compressed-tensors",
            "format": kinds.pop() if len(kinds) == 1 else MIXED_PRECISION,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(skipped),
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "version": VERSION,
            "sparsity_config": {},
            "transform_config": {},
        }

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """The groups with their targets, and the skipped modules.

        Raises:
            CheckpointError: no group, one whose layout or scheme is not read, or weights that are not the model's own.
        """
        groups = section.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(one, dict) for one in groups.values()):
            raise not_read("config_groups", "no group that tells how linears are quantized")
        # Rotated or pruned weights are not the model's own, whatever their codes say.
        for key, plain in (("transform_config", (None, {})), ("sparsity_config", (None, {}, {"format": "dense"}))):
            if section.get(key) not in plain:
                raise not_read(key, repr(section[key]))
        found = tuple(self._read_group(group, section, weight_dtype) for group in groups.values())
        skipped = skip_list(section, "ignore")
        require_readable([*skipped, *(target for group in found for target in group.targets)])
        return Described(found, tuple(skipped), section.get("kv_cache_scheme") is not None)

    def _read_group(self, group: Mapping[str, Any], section: Mapping[str, Any], weight_dtype: torch.dtype) -> Group:
        kind = section.get("format")
        if kind == MIXED_PRECISION:
            kind = group.get("format")
        layout = next((one for one in LAYOUTS if one.kind == kind), None)
        if layout is None:
            known = ", ".join(one.kind for one in LAYOUTS)
            raise not_read("config_groups", f"of groups of format {kind!r}; {known} are read")
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
            targets = [LINEAR]
        return Group(layout.read(group, weight_dtype), tuple(targets))

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """Whether a list of exceptions holds a module, by its name or by a regular expression."""
        return any(matches(module, entry) for entry in skipped)


def is_of_kind(section: dict[str, Any], kind: str) -> bool:
    """Whether a ``quantization_config`` is compressed-tensors' of that compression format."""
    return section.get("quant_method") == "compressed-tensors" and section.get("format") == kind


def bits_and_inputs(section: dict[str, Any]) -> set[tuple[int | None, Number | None]]:
    """The weights' bits of each config group of a ``quantization_config``, and what each token's inputs become."""
    groups = section.get("config_groups")
    found = set[tuple[int | None, Number | None]]()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
        found.add((bits if isinstance(bits, int) else None, by_token(group) if isinstance(group, dict) else None))
    return found


def rounds_inputs(section: dict[str, Any]) -> bool:
    """Whether any config group of a ``quantization_config`` says that inputs are rounded."""
    groups = section.get("config_groups")
    return isinstance(groups, dict) and any(
        isinstance(group, dict) and group.get("input_activations") is not None for group in groups.values()
    )


def is_static(section: dict[str, Any]) -> bool:
    """Whether inputs have stored scales by every config group of a ``quantization_config``."""
    groups = section.get("config_groups")
    activations = [
        group.get("input_activations") if isinstance(group, dict) else None
        for group in (groups.values() if isinstance(groups, dict) else ())
    ]
    return bool(activations) and all(isinstance(one, dict) and one.get("dynamic") is False for one in activations)


def _group(grid: Grid, targets: Sequence[str]) -> dict[str, Any]:
    weights, activations = layout_of(grid).describe(grid)
    return {
        "targets": list(targets),
        "format": layout_of(grid).kind,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }


def _targets(parts: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Regular expressions for the linears of each part that fit none of another's.

    What linears are called in their layer, with any expert's number, where all that are called so are of one part; else
    with their layers listed. The experts of a layer are of one part.
    """
    owners: dict[str, set[int]] = {}
    for number, names in enumerate(parts):
        for name in names:
            owners.setdefault(_in_layer(name)[1], set()).add(number)
    for names in parts:
        layers: dict[str, dict[str, None]] = {}
        for name in names:
            layer, called = _in_layer(name)
            layers.setdefault(called, {})[layer] = None
        yield [_expression(called, () if len(owners[called]) == 1 else tuple(of)) for called, of in layers.items()]


def _expression(called: str, layers: Sequence[str]) -> str:
    place = rf"layers\.({'|'.join(layers)})\." if layers else ""
    return rf"re:.*\.{place}{called}$"


def _in_layer(name: str) -> tuple[str, str]:
    """The number of a linear's layer, and a regular expression for what it is called there."""
    found = _LAYER.fullmatch(name)
    layer, called = ("", name) if found is None else found.groups()
    return layer, r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in called.split("."))
