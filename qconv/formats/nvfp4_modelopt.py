"""ModelOpt's NVFP4, as TensorRT-LLM, vLLM and SGLang read it (``quant_method: modelopt``).

``weight`` is uint8 [out, in/2], two codes in a byte, the even column in its lower half; ``weight_scale`` F8_E4M3 [out,
in/16]; ``weight_scale_2`` float32 [], which multiplies: a weight is ``code * (weight_scale * weight_scale_2)``.
``input_scale`` float32 [] is the largest input over 2688. Both are the inverse of compressed-tensors' global scales.

W4A16 is read too (``quant_algo: W4A16_NVFP4``), which lacks ``input_scale``. Of ModelOpt's other ``quant_algo`` none
is.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from qconv.checkpoint.header import TensorSpec
from qconv.core.qtensor import Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.formats.base import (
    Described,
    EachItsOwn,
    Group,
    TensorReader,
    by_rows,
    pack_pairs,
    read_tensors,
    require_number,
    skip_list,
    unpack_pairs,
)
from qconv.formats.cache import MODELOPT, CacheNaming
from qconv.formats.float4 import NVFP4, fp4_grid, misfit, positive
from qconv.formats.packed import not_read

QUANT_CONFIG = "hf_quant_config.json"
"""Beside config.json: the same in other words, which TensorRT-LLM reads."""
W4A4, W4A16 = "NVFP4", "W4A16_NVFP4"
PRODUCER = {"name": "modelopt", "version": "0.39.0"}
"""The release whose layout this is; some readers ask for the name."""


class ModelOptFormat(EachItsOwn):
    """NVFP4 weights and inputs."""

    name = "nvfp4_modelopt"
    pack_columns = 1
    act_order = False
    mixes = False
    beside_names = (QUANT_CONFIG,)
    cache: CacheNaming | None = MODELOPT

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """The only one.

        Raises:
            RecipeError: the settings are of another.
        """
        require_number(number, "e2m1", self.name)
        return replace(fp4_grid(NVFP4, settings, self.name), activations="local", activation_number="e2m1")

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Whole groups."""
        return misfit(in_features, grid)

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """weight, weight_scale, weight_scale_2, input_scale (local activations)."""
        specs = [
            TensorSpec(f"{module}.weight", torch.uint8, (out_features, in_features // 2)),
            TensorSpec(f"{module}.weight_scale", torch.float8_e4m3fn, (out_features, in_features // 16)),
            TensorSpec(f"{module}.weight_scale_2", torch.float32, ()),
        ]
        if grid.stores_inputs:
            specs.append(TensorSpec(f"{module}.input_scale", torch.float32, ()))
        return specs

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of :meth:`specs`."""
        yield f"{module}.weight", by_rows(pack_pairs, weight.codes)
        yield f"{module}.weight_scale", weight.scales
        yield f"{module}.weight_scale_2", torch.tensor(weight.global_scale, dtype=torch.float32)
        if weight.grid.stores_inputs:
            if weight.input_scale is None:
                raise ValueError(f"{module}: local activations need an input scale")
            yield f"{module}.input_scale", weight.input_scale.float()

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes and scales of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent or misshapen, or a scale of all is no positive number.
        """
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        shared, inputs = positive(tensors["weight_scale_2"], f"{module}.weight_scale_2"), None
        if grid.stores_inputs:
            scale = positive(tensors["input_scale"], f"{module}.input_scale")
            inputs = torch.tensor(scale, dtype=torch.float64)
        codes = by_rows(unpack_pairs, tensors["weight"], growth=2)
        return QTensor(grid, codes, tensors["weight_scale"], None, input_scale=inputs, global_scale=shared)

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """ModelOpt's keys: one group, and the list of exceptions."""
        (grid,) = quantized
        arguments = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": grid.group_size}
        inputs = {"input_activations": {**arguments}} if grid.stores_inputs else {}
        return {
            "quant_method": "modelopt",
            "quant_algo": W4A4 if grid.stores_inputs else W4A16,
            "config_groups": {"group_0": {**inputs, "weights": arguments, "targets": ["Linear"]}},
            "ignore": list(skipped),
            "producer": PRODUCER,
        }

    def beside(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """hf_quant_config.json."""
        said = {
            "quant_algo": section["quant_algo"],
            "kv_cache_quant_algo": "FP8" if _caches(section) else None,
            "group_size": section["config_groups"]["group_0"]["weights"]["group_size"],
            "exclude_modules": section["ignore"],
        }
        return {QUANT_CONFIG: {"producer": section["producer"], "quantization": said}}

    def recognizes(self, section: dict[str, Any]) -> bool:
        """``quant_method`` is modelopt, whichever of its layouts: what is not read is refused by its own name."""
        return str(section.get("quant_method")).lower() in ("modelopt", "modelopt_fp4")

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """Grid and exceptions.

        Raises:
            CheckpointError: another ``quant_algo``, or groups of another size.
        """
        algorithm = section.get("quant_algo")
        if algorithm not in (W4A4, W4A16):
            raise not_read("quant_algo", f"{algorithm!r}; of ModelOpt's {W4A4} and {W4A16} are read")
        groups = section.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            size = weights.get("group_size", 16) if isinstance(weights, dict) else 16
            if size != NVFP4.group_size:
                raise not_read("config_groups", f"of groups of {size!r} weights")
        grid = NVFP4 if algorithm == W4A16 else replace(NVFP4, activations="local", activation_number="e2m1")
        return Described((Group(grid),), tuple(skip_list(section, "ignore")), _caches(section))

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """Whether a shell pattern fits the module, or what it is a part of."""
        parts = module.split(".")
        within = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in skipped for name in within)


def _caches(section: Mapping[str, Any]) -> bool:
    """Whether it says that a cache of keys and values has stored scales."""
    return section.get("kv_cache_scheme") is not None


FORMAT = ModelOptFormat()
