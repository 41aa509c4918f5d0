"""gpt-oss's own layout (``quant_method: mxfp4``): a layer's experts in one tensor of blocks and one of scales.

``mlp.experts.gate_up_proj_blocks`` uint8 [experts, 2 * width, hidden / 32, 16], two E2M1 codes in a byte, the even
column low; ``gate_up_proj_scales`` uint8 [experts, 2 * width, hidden / 32], E8M0: exponents of two plus 127;
``gate_up_proj_bias`` [experts, 2 * width]; the rows of gate and up by turns, gate's first. ``down_proj_blocks``,
``down_proj_scales`` and ``down_proj_bias`` likewise. Everything else is plain, and so says the list of exceptions that
the published checkpoints have (openai/gpt-oss-120b: config.json).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.checkpoint.mxfp4 import BLOCK, BLOCKS, METHOD, SCALES
from qconv.core.qtensor import Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats.base import (
    EXPRESSION,
    AllInConfig,
    Described,
    Group,
    Place,
    TensorReader,
    by_rows,
    pack_pairs,
    read_tensors,
    require_number,
    skip_list,
    unpack_pairs,
)
from qconv.formats.float4 import MXFP4, fp4_grid, misfit

SKIPPED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
_SKIP_KEY = "modules_to_not_convert"
_EXPERT = r".*\.experts\.\d+\.(gate|up|down)_proj"
_MEMBER = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<role>gate|up|down)_proj\."
    rf"(?P<leaf>{BLOCKS}|{SCALES}|bias)"
)


class GptOssFormat(AllInConfig):
    """MXFP4 experts of gpt-oss models."""

    name = "gpt_oss"
    pack_columns = 1
    act_order = False
    mixes = False
    families = ("gpt_oss",)
    number: Number = "e2m1"

    def place(self, tensor: str) -> Place | None:
        """An expert's place among those of its layer, gate and up by turns."""
        found = _MEMBER.fullmatch(tensor)
        if found is None:
            return None
        leaf = found["leaf"].removeprefix("weight_")
        if found["role"] == "down":
            return Place(f"{found['experts']}.down_proj_{leaf}", int(found["number"]))
        half = int(found["role"] == "up")
        return Place(f"{found['experts']}.gate_up_proj_{leaf}", int(found["number"]), half, 2)

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """MXFP4, the only one.

        Raises:
            RecipeError: the settings are of another.
        """
        require_number(number, "e2m1", self.name)
        return fp4_grid(MXFP4, settings, self.name)

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Whole groups."""
        return misfit(in_features, grid)

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """weight_blocks, weight_scales."""
        groups = in_features // BLOCK
        return [
            TensorSpec(f"{module}.{BLOCKS}", torch.uint8, (out_features, groups, BLOCK // 2)),
            TensorSpec(f"{module}.{SCALES}", torch.uint8, (out_features, groups)),
        ]

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        pairs = by_rows(pack_pairs, weight.codes)
        yield f"{module}.{BLOCKS}", pairs.view(len(pairs), -1, BLOCK // 2)
        yield f"{module}.{SCALES}", weight.scales.view(torch.uint8)

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes and scales of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent or misshapen.
        """
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        codes = by_rows(unpack_pairs, tensors[BLOCKS].flatten(1), growth=2)
        return QTensor(grid, codes, tensors[SCALES].view(torch.float8_e8m0fnu), None)

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """Its two keys.

        Raises:
            RecipeError: an expert is not quantized, or something else is.
        """
        other = next((name for of in quantized.values() for name in of if not re.fullmatch(_EXPERT, name)), None)
        if other is not None:
            raise RecipeError(
                f"skip: {other} is to be quantized, and the {self.name} format holds codes of experts alone.",
                hint="Skip what is no expert, as recipes/gpt-oss.yaml does, or take format mxfp4.",
            )
        plain = next((name for name in skipped if re.fullmatch(_EXPERT, name)), None)
        if plain is not None:
            raise RecipeError(
                f"skip: {plain} is not to be quantized, and the {self.name} format holds codes of all experts.",
                hint="Skip no experts, or take format mxfp4.",
            )
        return {"quant_method": METHOD, _SKIP_KEY: list(SKIPPED)}

    def recognizes(self, section: dict[str, Any]) -> bool:
        """``quant_method`` is mxfp4."""
        return section.get("quant_method") == METHOD

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """Experts are MXFP4.

        Raises:
            CheckpointError: the list of exceptions is none.
        """
        return Described((Group(MXFP4, (f"{EXPRESSION}{_EXPERT}$",)),), tuple(skip_list(section, _SKIP_KEY)))

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """Experts never are: their readers look for blocks, whatever the list says."""
        return re.fullmatch(_EXPERT, module) is None


FORMAT = GptOssFormat()
