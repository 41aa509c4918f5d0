"""Weights of every kind, and what others say about encoded ones: the gguf package's decoder, plain rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf.quants import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_NL, dequantize
from hypothesis import strategies as st
from torch import Tensor

from qconv import native
from qconv.grids.ggml import GgmlType
from tests.integer_grids import part_of_kind

AFFINE_SUPER = {GgmlType.Q2_K: (3, 15, 16), GgmlType.Q4_K: (15, 63, 32), GgmlType.Q5_K: (31, 63, 32)}
SCALED_SUPER = {GgmlType.Q3_K: (4, 32, 16), GgmlType.Q6_K: (32, 128, 16), GgmlType.IQ4_XS: (127, 32, 32)}
SIGNED = {
    GgmlType.IQ2_XXS: (1 / 8, 32),
    GgmlType.IQ2_XS: (1 / 8, 16),
    GgmlType.IQ2_S: (1 / 8, 16),
    GgmlType.IQ3_XXS: (1 / 4, 32),
    GgmlType.IQ3_S: (1.0, 32),
}
SHIFTED = {GgmlType.IQ1_S: (32, 32), GgmlType.IQ1_M: (16, 8)}
"""Weights of a sub-block, and those that share a shift."""
EVEN_SIGNS = (GgmlType.IQ2_XXS, GgmlType.IQ2_XS, GgmlType.IQ3_XXS)
TERNARY = [GgmlType.TQ1_0, GgmlType.TQ2_0]
SEARCHED = [*AFFINE_SUPER, *SCALED_SUPER, *SIGNED, *SHIFTED, GgmlType.IQ4_NL]
WITH_IMPORTANCE = [*SEARCHED, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, *TERNARY]


@pytest.fixture(params=["compiled", "torch"])
def both_encoders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the encoders in C++ and with those in torch, the same where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setenv(native.SWITCH, "0")


def lattice_points(type: GgmlType) -> Any:
    """float64 [points, elements] as the gguf package has them."""
    grids = (IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S)
    grid = next(one for one in grids if one.__name__ == type.name)
    grid.init_grid()  # type: ignore[no-untyped-call]  # gguf does not say what it returns
    return np.asarray(grid.grid, dtype=np.float64).reshape(grid.grid_shape)


def decode(encoded: Tensor, type: GgmlType) -> Tensor:
    """float32 [rows, columns] as the gguf package reads the bytes."""
    return torch.from_numpy(np.ascontiguousarray(dequantize(encoded.numpy(), type.value)))


def squared_error(weight: Tensor, encoded: Tensor, type: GgmlType, importance: Tensor | None = None) -> Tensor:
    """``sum importance * (w - w')^2`` of each row, float64 [rows]."""
    error = (weight.double() - decode(encoded, type).double()).square()
    return (error if importance is None else error * importance.double()).sum(1)


def column_importance(columns: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    """float32 [columns] over a few orders of magnitude, as the mean squares of activations are."""
    return torch.exp(spread * torch.randn(columns, generator=torch.Generator().manual_seed(seed)))


def bell_weights(rows: int = 8, columns: int = 512, seed: int = 0) -> Tensor:
    """Normal rows, and heavy-tailed ones (Student's t with 4 degrees of freedom), of an LLM's scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    deviation = torch.randn(4, rows // 2, columns, generator=generator).square().mean(0).sqrt()
    weight[: rows // 2] /= deviation
    return weight


SPREAD = ("normal", "positive", "negative", "ties")
NEARLY_EXACT = ("shifted", "constant", "zero", "spike", "two")


@st.composite
def blocks_of_256(draw: st.DrawFn, kinds: tuple[str, ...], smallest: int, largest: int) -> Tensor:
    """float32 [1 to 3, 256]: parts of different kinds and of magnitudes from 10^smallest to 10^largest in each row."""
    rows = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    parts = []
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=8, max_size=8)):
        part = part_of_kind(kind, rows, 32, generator)
        parts.append(part * 10.0 ** draw(st.integers(smallest, largest)))
    return torch.cat(parts, dim=1).clamp(-65504.0, 65504.0).float()


def plainly_rounded(weight: Tensor, type: GgmlType) -> Tensor:
    """What rounding to the full range of each sub-block decodes to, float64 [rows, columns], in NumPy."""
    values: Any = weight.double().numpy()
    if type in AFFINE_SUPER:
        rounded = _affine(values, *AFFINE_SUPER[type])
    elif type in SCALED_SUPER:
        rounded = _scaled(values, *SCALED_SUPER[type])
    elif type in SIGNED:
        rounded = _signed(values, type, *SIGNED[type])
    elif type in SHIFTED:
        rounded = _shifted(values, type, *SHIFTED[type])
    else:
        rounded = _scaled(values, 127, None, 32)
    return torch.from_numpy(rounded.reshape(values.shape))


def _affine(values: Any, levels: int, top: int, size: int) -> Any:
    x = values.reshape(-1, 256 // size, size)
    low = np.minimum(x.min(2), 0.0)
    scale = (np.maximum(x.max(2), 0.0) - low) / levels
    scale, low = _shared(scale, top)[..., None], -_shared(-low, top)[..., None]
    return scale * np.clip(np.rint((x - low) / np.where(scale == 0.0, 1.0, scale)), 0, levels) + low


def _scaled(values: Any, reach: int, top: int | None, size: int) -> Any:
    x = values.reshape(-1, 256 // size, size)
    grid = np.arange(-reach, reach) if reach < 127 else np.array(IQ4_NL.kvalues)
    scale = np.take_along_axis(x, np.abs(x).argmax(2)[..., None], 2)[..., 0] / -reach
    scale = (_half(scale) if top is None else _shared(scale, top))[..., None]
    multiples = x / np.where(scale == 0.0, 1.0, scale)
    return scale * grid[np.abs(multiples[..., None] - grid).argmin(-1)]


def _signed(values: Any, type: GgmlType, unit: float, size: int) -> Any:
    """The nearest points of the lattice; the last of eight signs makes the number of negative ones even."""
    points = lattice_points(type)
    x = values.reshape(-1, 256 // size, size)
    scale = np.abs(x).max(2) / points.max()
    d = _half(scale.max(1, keepdims=True) / 31 / unit) * unit
    scale = d * (2 * np.clip(np.rint((scale / np.where(d == 0.0, 1.0, d) - 1) / 2), 0, 15) + 1)
    signs = np.where(x < 0.0, -1.0, 1.0).reshape(-1, 8)
    if type in EVEN_SIGNS:
        signs[:, 7] = signs[:, :7].prod(1)
    targets = (signs * x.reshape(-1, 8)).reshape(-1, points.shape[1])
    steps = np.repeat(scale.reshape(-1, 1), size // points.shape[1])[:, None]
    nearest = (steps * (points**2).sum(1) - 2.0 * targets @ points.T).argmin(1)  # |steps p - t|^2, less |t|^2
    return signs.reshape(-1) * (steps * points[nearest]).reshape(-1)


def _shifted(values: Any, type: GgmlType, size: int, together: int) -> Any:
    """The nearest points plus the better of both shifts; the largest magnitude is 9/8 of the scale."""
    points = lattice_points(type)
    x = values.reshape(-1, 256 // size, size)
    scale = np.abs(x).max(2) / 1.125
    d = _half(scale.max(1, keepdims=True) / 15)
    scale = d * (2 * np.clip(np.rint((scale / np.where(d == 0.0, 1.0, d) - 1) / 2), 0, 7) + 1)
    steps = np.repeat(scale.reshape(-1, 1), size // 8)[:, None]
    tried = []
    for shift in (0.125, -0.125):
        places = points + shift
        nearest = (steps * (places**2).sum(1) - 2.0 * x.reshape(-1, 8) @ places.T).argmin(1)
        tried.append((steps * places[nearest]).reshape(-1, together))
    above, below = (((one - x.reshape(-1, together)) ** 2).sum(1) for one in tried)
    return np.where((below < above)[:, None], tried[1], tried[0]).reshape(-1)


def _shared(scale: Any, top: int) -> Any:
    """Sub-block scales as integers up to ``top`` times one float16 of the super-block."""
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
    signed = bool((scale < 0.0).any())
    d = _half(largest / (-top if signed else top))
    lowest, highest = (-top, top - 1) if signed else (0, top)
    return d * np.clip(np.rint(scale / np.where(d == 0.0, 1.0, d)), lowest, highest)


def _half(values: Any) -> Any:
    return values.astype(np.float16).astype(np.float64)
