"""Block FP8 as Qwen and DeepSeek publish it (``quant_method: fp8``).

``weight`` F8_E4M3 [out, in] and ``weight_scale_inv`` float32 [ceil(out/128), ceil(in/128)], which multiplies despite
its name; engines quantize activations by groups of 128 as they come. Scales in bfloat16 and float16 are read too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from qconv.core.architecture import HEAD
from qconv.core.qtensor import Grid, Number
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats.base import AllInConfig, Described, Group, require_number, skip_list
from qconv.formats.float8 import BLOCK, Float8Layout, block_sides, require_eight_bits

SKIP_KEY = "modules_to_not_convert"
NORMS = ("input_layernorm", "post_attention_layernorm")
"""The norms of a layer that Qwen's releases list among what is not converted."""


class Fp8Format(AllInConfig, Float8Layout):
    """Blocks of 128 x 128 with float32 scales."""

    name = "fp8"
    scale_leaf = "weight_scale_inv"
    pack_columns = 1
    act_order = False
    mixes = False

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """Blocks of 128 x 128.

        Raises:
            RecipeError: other bits, zero points, or another group size.
        """
        require_number(number, "e4m3", self.name)
        require_eight_bits(settings, self.name)
        if settings.group_size != BLOCK:
            raise RecipeError(
                f"grid.group_size: the fp8 format has blocks of {BLOCK} x {BLOCK}, not {settings.group_size}.",
                hint="Take --fmt fp8-dynamic for one scale a row.",
            )
        return _grid(BLOCK, BLOCK)

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """Qwen's keys; the head, and of every layer its norms and what else is not converted."""
        ((grid, names),) = quantized.items()
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [grid.block_rows, grid.group_size],
            SKIP_KEY: list(_not_converted(skipped, names)),
        }

    def recognizes(self, section: dict[str, Any]) -> bool:
        """``quant_method`` is fp8."""
        return section.get("quant_method") == "fp8"

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """Grid and skipped modules.

        Raises:
            CheckpointError: another float, one scale for a whole weight, or static activations.
        """
        for key, known in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
            if section.get(key, known) != known:
                raise CheckpointError(f"config.json: quantization_config.{key} is {section[key]!r}, not {known!r}.")
        block = block_sides(section.get("weight_block_size"))
        if block is None:
            raise CheckpointError(
                f"config.json: quantization_config.weight_block_size is {section.get('weight_block_size')!r}.",
                hint="FP8 is verified in blocks; other FP8 checkpoints can be the source of a build.",
            )
        # Without a list transformers leaves the head alone; with one that lacks it, it does not.
        skipped = [HEAD] if section.get(SKIP_KEY) is None else skip_list(section, SKIP_KEY)
        return Described((Group(_grid(*block)),), tuple(skipped))

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """The module itself or what it is a part of."""
        return any(module == entry or module.startswith(f"{entry}.") for entry in skipped)


def _grid(rows: int, columns: int) -> Grid:
    return Grid(8, columns, True, torch.float32, number="e4m3", block_rows=rows, activations="dynamic")


def _not_converted(skipped: Sequence[str], quantized: Sequence[str]) -> Iterator[str]:
    """The head, then by layer in order its norms, its skipped linears, and the fused experts that these make up."""
    of_layers: dict[str, set[str]] = {}
    for name in (*quantized, *skipped):
        found = re.match(r".*?\.layers\.\d+", name)
        if found is not None:
            of_layers.setdefault(found[0], {f"{found[0]}.{norm}" for norm in NORMS})
    yield HEAD
    for name in skipped:
        layer = re.match(r".*?\.layers\.\d+", name)
        if layer is not None:
            # transformers asks for a layer's experts as one module.
            of_layers[layer[0]] |= {name, re.sub(r"\.experts\.\d+\.\w+$", ".experts", name)}
        elif name != HEAD:
            yield name
    for names in of_layers.values():
        yield from sorted(names)


FORMAT = Fp8Format()
