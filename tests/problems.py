"""Linears with correlated inputs, every grid that methods round them on, and what an error costs in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qconv.core.grid import FittedGrid
from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.settings import ClipSettings
from qconv.grids.affine import AffineGrid
from qconv.grids.blocks import BlockGrid
from qconv.grids.elements import E4M3Grid, IntegerGrid
from qconv.grids.fp4 import Mxfp4Grid, Nvfp4Grid
from qconv.grids.ggml import GgmlType

HESSIANS = ("full", "few tokens", "one token", "constant input", "dead columns", "no tokens")
WEIGHTS = ("usual", "constant rows", "zero rows", "outlier", "two values")


def _float(block_rows: int, group_size: int, **named: Any) -> Grid:
    return Grid(8, group_size, True, torch.float32, "e4m3", block_rows, **named)


LATTICES = {
    name: BlockGrid(GgmlType[name]) for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
}
BLOCKS: dict[str, FittedGrid[Any]] = {
    **{one.name: BlockGrid(one) for one in GgmlType if BlockGrid(one).has_codes and one.name not in LATTICES},
}
ELEMENTS: dict[str, FittedGrid[Any]] = {
    "int4 g128": IntegerGrid(Grid(4, 128, True, torch.float16)),
    "int4 g128 zero points": IntegerGrid(Grid(4, 128, False, torch.float16), ClipSettings(steps=4)),
    "int3 per row": IntegerGrid(Grid(3, CHANNEL, True, torch.bfloat16)),
    "int8 g32 zero points": IntegerGrid(Grid(8, 32, False, torch.float32)),
    "int4 act_order": IntegerGrid(Grid(4, 64, False, torch.float16, act_order=True)),
    "E4M3 128x128": E4M3Grid(_float(128, 128)),
    "E4M3 32x96, searched": E4M3Grid(_float(32, 96), ClipSettings(steps=4)),
    "E4M3 per row": E4M3Grid(_float(1, CHANNEL)),
    "E4M3 per tensor": E4M3Grid(_float(CHANNEL, CHANNEL, activations="static"), None, torch.tensor(0.5)),
}
AFFINE: dict[str, FittedGrid[Any]] = {
    "affine4 g64": AffineGrid(Grid(4, 64, False, torch.bfloat16, based=True)),
    "affine3 g32, searched": AffineGrid(Grid(3, 32, False, torch.float16, based=True), ClipSettings(steps=4)),
    "affine8 g128": AffineGrid(Grid(8, 128, False, torch.bfloat16, based=True)),
}
POWERS: dict[str, FittedGrid[Any]] = {
    "MXFP8": E4M3Grid(Grid(8, 32, True, torch.float8_e8m0fnu, "e4m3"), ClipSettings(steps=4)),
}
FOURS: dict[str, FittedGrid[Any]] = {
    "NVFP4": Nvfp4Grid(),
    "NVFP4 plain": Nvfp4Grid(search=False),
    "NVFP4 shared": Nvfp4Grid(global_scale=2e-3),
    "MXFP4 searched": Mxfp4Grid(),
    "MXFP4 plain": Mxfp4Grid(search=False),
}
STEPS: dict[str, FittedGrid[Any]] = {**BLOCKS, **ELEMENTS, **AFFINE, **POWERS, **FOURS}
"""Grids that round one column at a time."""
FITTED: dict[str, FittedGrid[Any]] = {**STEPS, **LATTICES}


def weight_of_kind(kind: str, out_features: int, in_features: int, seed: int) -> Tensor:
    """:func:`random_weight`, or with something in it that grids find hard."""
    weight = random_weight(out_features, in_features, seed)
    if kind == "constant rows":
        weight[::2] = 0.0123
    elif kind == "zero rows":
        weight[::2] = 0.0
    elif kind == "outlier":
        weight[0, seed % in_features] = 3.0
    elif kind == "two values":
        weight = torch.sign(weight) * 0.01
    return weight


def random_weight(out_features: int, in_features: int, seed: int) -> Tensor:
    """Columns of different sizes, as real weights have them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.5 + torch.rand(in_features, generator=generator)
    return torch.randn(out_features, in_features, generator=generator) * sizes * 0.02


def random_hessian(in_features: int, seed: int, kind: str = "full") -> Tensor:
    """The mean of ``x x^T`` of correlated inputs, some of them large, symmetric to the bit."""
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = {"few tokens": in_features // 4, "one token": 1}.get(kind, 4 * in_features)
    falling = torch.logspace(0, -1.5, in_features).unsqueeze(-1)
    mixing = torch.randn(in_features, in_features, generator=generator) * falling
    inputs = torch.randn(tokens, in_features, generator=generator) @ mixing
    inputs[:, torch.randperm(in_features, generator=generator)[: in_features // 16]] *= 8.0
    if kind == "constant input":
        inputs = inputs[:1].expand(tokens, -1)
    if kind == "dead columns":
        inputs[:, ::3] = 0.0
    if kind == "no tokens":
        inputs = torch.zeros_like(inputs)
    return (inputs.double().t() @ inputs.double() / tokens).float()


def true_errors(dense: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """``d H d^T`` of each row in float64."""
    delta = dense.double() - weight.double()
    return ((delta @ hessian.double()) * delta).sum(1)


def rounding_noise(delta: Tensor, hessian: Tensor) -> Tensor:
    """How far float32 may be off a row's ``d H d^T``: its terms can cancel each other."""
    size = delta.double().abs()
    return 2.0**-20 * ((size @ hessian.double().abs()) * size).sum(1)
