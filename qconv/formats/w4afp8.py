"""W4AFP8 as SGLang and TensorRT-LLM read it (``quant_method: w4afp8``): int4 experts, everything else in block FP8.

An expert's ``weight`` is int8 [out, in/2], two codes in a byte, each a signed number of four bits, the even column in
the lower half; ``weight_scale_inv`` bfloat16 [out, in/128], which multiplies despite its name; ``input_scale`` float32
[], the largest input over 448: engines round inputs to E4M3 by the largest one of a layer's experts. Other linears have
``weight`` F8_E4M3 [out, in] and ``weight_scale_inv`` float32 [ceil(out/128), ceil(in/128)], as in
:mod:`qconv.formats.fp8`, and inputs rounded as they come.

Which linear is which no key says: readers know experts by their name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.core.architecture import HEAD
from qconv.core.qtensor import Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats.base import (
    LINEAR,
    AllInConfig,
    Described,
    Group,
    TensorReader,
    by_rows,
    pack_pairs,
    read_tensors,
    skip_list,
    unpack_pairs,
)
from qconv.formats.float4 import misfit, positive
from qconv.formats.float8 import BLOCK, SCALE_DTYPES, Float8Layout, require_eight_bits

METHOD, SKIP_KEY = "w4afp8", "modules_to_not_convert"
EXPERTS = Grid(4, BLOCK, True, torch.bfloat16, activations="static", activation_number="e4m3")
OTHERS = Grid(8, BLOCK, True, torch.float32, "e4m3", BLOCK, activations="dynamic")
_IN_EXPERTS = r".*\.experts\.\d+\."
_SIGN = 8
_PAIRED = (("gate_proj", "up_proj"), ("w1", "w3"))
"""What families call gate and up, which share their inputs."""


def sharing_inputs(name: str) -> Iterator[str]:
    """The linears of experts 0, 1, 2 ... without end whose inputs readers divide by one scale with those of one."""
    block, _, within = name.partition(".experts.")
    leaf = within.rpartition(".")[2]
    leaves = next((pair for pair in _PAIRED if leaf in pair), (leaf,))
    return (f"{block}.experts.{number}.{one}" for number in itertools.count() for one in leaves)


class _Blocks(Float8Layout):
    scale_leaf = "weight_scale_inv"


class _Pairs:
    """The tensors of an expert's linear."""

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """weight, weight_scale_inv, input_scale."""
        return [
            TensorSpec(f"{module}.weight", torch.int8, (out_features, in_features // 2)),
            TensorSpec(f"{module}.weight_scale_inv", grid.scale_dtype, (out_features, grid.groups(in_features))),
            TensorSpec(f"{module}.input_scale", torch.float32, ()),
        ]

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        if weight.input_scale is None:
            raise ValueError(f"{module}: static activations need an input scale")
        yield f"{module}.weight", by_rows(lambda codes: pack_pairs(codes ^ _SIGN), weight.codes).view(torch.int8)
        yield f"{module}.weight_scale_inv", weight.scales
        yield f"{module}.input_scale", weight.input_scale.float().view(())

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes, each 8 more than the number in the file, and scales, whichever dtype they have.

        Raises:
            CheckpointError: a tensor is absent or misshapen, or an input's scale is no positive number.
        """
        weight, scale, inputs = self.specs(module, *shape, grid)
        pairs = read_tensors([weight], module, read)["weight"].view(torch.uint8)
        scales, stored = read(scale.name), read(inputs.name)
        if tuple(scales.shape) != scale.shape or scales.dtype not in SCALE_DTYPES:
            raise CheckpointError(f"{scale.name}: {scales.dtype} {list(scales.shape)}, not {list(scale.shape)}.")
        codes = by_rows(unpack_pairs, pairs, growth=2).bitwise_xor_(_SIGN)
        input_scale = torch.tensor(positive(stored, inputs.name))
        return QTensor(replace(grid, scale_dtype=scales.dtype), codes, scales, None, input_scale=input_scale)


_BLOCKS, _PAIRS = _Blocks(), _Pairs()


class W4AFp8Format(AllInConfig):
    """Both, each where readers expect it."""

    name = METHOD
    pack_columns = 1
    act_order = False
    mixes = True

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """Blocks of floats, or with number int groups of 128, for experts.

        Raises:
            RecipeError: the settings are of neither.
        """
        if number not in (None, "int", "e4m3"):
            raise RecipeError(f"grid.number: the {METHOD} format holds integers and E4M3 floats alone.")
        experts = number == "int"
        if not experts:
            require_eight_bits(settings, METHOD)
        given = (settings.bits, settings.group_size, settings.symmetric is not False)
        if given != ((4, BLOCK, True) if experts else (8, BLOCK, True)):
            own = f"int4 in groups of {BLOCK}" if experts else f"blocks of {BLOCK} x {BLOCK}"
            raise RecipeError(
                f"grid: the {METHOD} format has {own} without zero points; the recipe asks for {settings.bits} bits, "
                f"group_size {settings.group_size}.",
                hint="See recipes/w4afp8.yaml: blocks are what the grid says, int4-g128 is the rule of experts.",
            )
        return EXPERTS if experts else OTHERS

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Whole groups of an expert's rows."""
        return None if grid.is_float else misfit(in_features, grid)

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """The tensors of an expert's linear, or of another."""
        return (_BLOCKS if grid.is_float else _PAIRS).specs(module, out_features, in_features, grid)

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        return (_BLOCKS if weight.grid.is_float else _PAIRS).pack(module, weight)

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """The QTensor of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent or misshapen.
        """
        return (_BLOCKS if grid.is_float else _PAIRS).unpack(module, shape, read, grid)

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """Its few keys.

        Raises:
            RecipeError: an expert is not int4, or something else is.
        """
        for grid, names in quantized.items():
            wrong = next((name for name in names if grid.is_float == bool(re.match(_IN_EXPERTS, name))), None)
            if wrong is not None:
                raise RecipeError(
                    f"rules: {wrong} is to have {grid.bits} bits, but readers of {METHOD} take all experts for int4 "
                    "and everything else for FP8.",
                    hint="Give 'experts.*' the grid int4-g128, and nothing else.",
                )
        return {
            "quant_method": METHOD,
            "group_size": BLOCK,
            "weight_block_size": [BLOCK, BLOCK],
            "moe_activation_scheme": "static",
            "linear_activation_scheme": "dynamic",
            SKIP_KEY: list(skipped),
        }

    def recognizes(self, section: dict[str, Any]) -> bool:
        """``quant_method`` is w4afp8."""
        return section.get("quant_method") == METHOD

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """The two grids, and what is skipped.

        Raises:
            CheckpointError: other groups, or inputs of experts without stored scales.
        """
        known = {"group_size": BLOCK, "weight_block_size": [BLOCK, BLOCK], "moe_activation_scheme": "static"}
        for key, value in known.items():
            if section.get(key, value) != value:
                raise CheckpointError(f"config.json: quantization_config.{key} is {section[key]!r}, not {value!r}.")
        groups = Group(EXPERTS, (f"re:{_IN_EXPERTS}",)), Group(OTHERS, (LINEAR,))
        skipped = next((skip_list(section, key) for key in (SKIP_KEY, "ignored_layers") if key in section), [HEAD])
        return Described(groups, tuple(skipped))

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """The module itself or what it is a part of."""
        return any(module == entry or module.startswith(f"{entry}.") for entry in skipped)


FORMAT = W4AFp8Format()
