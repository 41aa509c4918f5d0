"""MLX's layout: codes in words of 32 bits, a scale and a base a group, experts stacked; what mlx-lm calls its tensors.

A row's codes are a stream of bits, the first in the lowest. In mode ``affine`` a weight is ``code * scale + bias``, in
``mxfp4``, ``mxfp8`` and ``nvfp4`` it is a float times a scale of 8 bits (mlx: quantize; mlx_lm/utils.py: load_model).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qconv.conversion.exact import stored_as
from qconv.core.architecture import Architecture
from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.errors import UsageError
from qconv.formats.base import by_rows

_AFFINE = {2, 3, 4, 8}
_GROUPS = (32, 64, 128)
_FLOATS = {("e2m1", 32): "mxfp4", ("e2m1", 16): "nvfp4", ("e4m3", 32): "mxfp8"}
"""Modes by what codes are and how many share a scale."""
_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<number>\d+)\.(?P<role>\w+)")
_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "glm4_moe", "olmoe")
"""Those whose tensors mlx-lm takes as they are, experts stacked; of others it renames, splits or changes some."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How a module's codes are to be read.

    Attributes:
        name: ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
        bits: Of a code.
        group_size: Codes that share a scale.
    """

    name: str
    bits: int
    group_size: int

    def section(self) -> dict[str, int | str]:
        """As config.json says it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.name}


def require_known(model: Architecture) -> None:
    """Check that mlx-lm's names of a model's tensors are known.

    Raises:
        UsageError: they are not.
    """
    if model.family not in FAMILIES:
        raise UsageError(
            f"--to mlx: how mlx-lm stores a {model.family} model is not known to qconv.",
            hint=f"Known are {', '.join(FAMILIES)}; --to bf16, then mlx_lm.convert, which rounds anew.",
        )


def stacked(name: str) -> tuple[str, int | None]:
    """What mlx-lm calls a module, and which of its experts it is."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return name, None
    role = _ROLES.get(found["role"], found["role"])
    return f"{found['block']}.switch_mlp.{role}", int(found["number"])


def mode_of(grid: Grid, in_features: int) -> Mode | str:
    """The mode that reads a grid's codes, or why there is none; inputs that others round by token stay as they are."""
    size = in_features if grid.group_size == CHANNEL else grid.group_size
    if grid.act_order:
        return "mlx has no place for groups of inputs in an order of their own"
    if grid.stores_inputs:
        return "mlx has no place for stored scales of inputs"
    if grid.is_float:
        name = _FLOATS.get((grid.number, size)) if grid.block_rows == 1 else None
        return Mode(name, grid.bits, size) if name is not None else "mlx has no such floats: mxfp4, mxfp8 and nvfp4"
    if grid.bits not in _AFFINE:
        return f"mlx has no codes of {grid.bits} bits"
    if size not in _GROUPS:
        larger = [one for one in reversed(_GROUPS) if size % one == 0]
        if not larger:
            return f"mlx has groups of 32, 64 and 128, not of {size}"
        size = larger[0]
    return Mode("affine", grid.bits, size)


def misfit(weight: QTensor) -> str | None:
    """Why mlx has not a weight's numbers, on a grid that :func:`mode_of` has a mode for; None where it has."""
    if weight.grid.has_global_scale:
        found = stored_as(weight.steps(), torch.float8_e4m3fn)
        return "its scale of all scales has no place in mlx's nvfp4" if found is None else None
    if weight.grid.is_float:
        return None
    exact = _bases(weight)
    if torch.equal(exact.to(weight.scales.dtype).double(), exact):
        return None
    dtype = str(weight.scales.dtype).removeprefix("torch.")
    return f"its zero points times scales are no numbers of {dtype}, which mlx's biases would be"


def pieces(weight: QTensor, mode: Mode) -> dict[str, Tensor]:
    """The tensors of a weight by the ends of their names.

    Args:
        weight: [out_features, in_features]; one that :func:`misfit` has nothing to say of.
        mode: What :func:`mode_of` says of its grid.

    Returns:
        ``weight`` uint32 [out, in * bits / 32], ``scales`` [out, groups], of affine ones ``biases`` of the same shape.
    """
    words = packed(weight.codes.view(torch.uint8), mode.bits)
    if mode.name != "affine":
        scales = weight.steps().to(torch.float8_e4m3fn) if weight.grid.has_global_scale else weight.scales
        return {"weight": words, "scales": scales.view(torch.uint8)}
    repeats = weight.shape[1] // weight.scales.shape[1] // mode.group_size
    return {
        "weight": words,
        "scales": weight.scales.repeat_interleave(repeats, 1),
        "biases": _bases(weight).to(weight.scales.dtype).repeat_interleave(repeats, 1),
    }


def _bases(weight: QTensor) -> Tensor:
    """What a code of 0 stands for, float64 of the scales' shape."""
    zeros: Tensor | int = weight.grid.mid if weight.zero_points is None else weight.zero_points.double()
    return -(weight.scales.double() * zeros)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [rows, columns], as words, uint32 [rows, columns * bits / 32], the first code lowest."""

    def some(values: Tensor) -> Tensor:
        if bits == 8:
            data = np.ascontiguousarray(values.numpy())
        elif bits == 4:
            pairs = values.numpy()
            data = pairs[:, ::2] | (pairs[:, 1::2] << 4)
        else:
            each = np.unpackbits(values.numpy()[..., None], axis=-1, count=bits, bitorder="little")
            data = np.packbits(each.reshape(len(values), -1), axis=-1, bitorder="little")
        return torch.from_numpy(np.ascontiguousarray(data).view(np.uint32))

    return by_rows(some, codes.contiguous())


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`packed`."""

    def some(values: Tensor) -> Tensor:
        data = np.ascontiguousarray(values.numpy()).view(np.uint8)
        if bits == 8:
            return torch.from_numpy(data)
        if bits == 4:
            return torch.from_numpy(np.stack([data & 15, data >> 4], -1).reshape(len(data), -1))
        each = np.unpackbits(data, axis=-1, bitorder="little").reshape(len(data), -1, bits)
        return torch.from_numpy(np.packbits(each, axis=-1, bitorder="little")[..., 0])

    return by_rows(some, words.contiguous(), growth=32 // bits)


def dense(found: dict[str, Tensor], mode: Mode) -> Tensor:
    """The weight that tensors stand for, float32 [out_features, in_features]: ``code * scale + bias``."""
    codes = unpacked(found["weight"], mode.bits)
    if mode.name != "affine":
        return _float_weight(codes, found["scales"], mode).dequantize()
    grouped = codes.view(len(codes), -1, mode.group_size).float()
    grouped.mul_(found["scales"].float().unsqueeze(-1)).add_(found["biases"].float().unsqueeze(-1))
    return grouped.view(len(codes), -1)


def whole(found: dict[str, Tensor], mode: Mode) -> QTensor | str:
    """The codes and scales that tensors hold, or why its bases are no zero points."""
    codes = unpacked(found["weight"], mode.bits)
    if mode.name != "affine":
        return _float_weight(codes, found["scales"], mode)
    scales, biases = found["scales"], found["biases"]
    if not bool((scales > 0).all()):
        return "some of its scales are not positive"
    zeros = -biases.double() / scales.double()
    middle = 1 << (mode.bits - 1)
    if bool((zeros == middle).all()):
        return QTensor(grid_of(mode, scales.dtype), codes, scales, None)
    if not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros < 1 << mode.bits)).all()):
        return "the biases of its groups are no whole number of steps"
    return QTensor(grid_of(mode, scales.dtype, symmetric=False), codes, scales, zeros.to(torch.uint8))


def grid_of(mode: Mode, scale_dtype: torch.dtype, *, symmetric: bool = True) -> Grid:
    """The grid of a mode's codes."""
    if mode.name == "affine":
        return Grid(mode.bits, mode.group_size, symmetric, scale_dtype)
    scale = torch.float8_e4m3fn if mode.name == "nvfp4" else torch.float8_e8m0fnu
    return Grid(mode.bits, mode.group_size, True, scale, "e4m3" if mode.name == "mxfp8" else "e2m1")


def _float_weight(codes: Tensor, scales: Tensor, mode: Mode) -> QTensor:
    grid = grid_of(mode, torch.float32)
    codes = codes.view(torch.float8_e4m3fn) if grid.number == "e4m3" else codes
    return QTensor(grid, codes, scales.contiguous().view(grid.scale_dtype), None)
