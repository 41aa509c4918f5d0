"""Integer grids and weights that are hard to round."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from qconv.core.qtensor import CHANNEL, Grid

GRIDS = st.builds(
    Grid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([8, 16, CHANNEL]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)


def part_of_kind(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """float64 [rows, columns] of magnitude 1: normal, or of a kind that rounding finds hard."""
    part = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if kind in ("positive", "negative"):
        part = part.abs() * (1 if kind == "positive" else -1)
    elif kind == "shifted":
        part = part * 1e-3 - 5.0
    elif kind == "constant":
        part = torch.full_like(part, -0.7)
    elif kind == "zero":
        part = torch.zeros_like(part)
    elif kind == "spike":
        part = part * 1e-3
        part[:, 3] = 1.0
    elif kind == "two":
        part = torch.sign(part)
    elif kind == "ties":
        part = torch.round(part * 4.0) / 4.0
    return part


@st.composite
def weights(draw: st.DrawFn, smallest: int = -45, largest: int = 38) -> Tensor:
    """float32 [rows, 16 or 48] whose groups have magnitudes from 10^smallest to 10^largest, some constant or zero."""
    rows, columns = draw(st.integers(1, 4)), 16 * draw(st.sampled_from([1, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kinds = draw(st.lists(st.sampled_from(["normal", "positive", "constant", "zero", "spike"]), min_size=2, max_size=2))
    exponents = draw(st.lists(st.integers(smallest, largest), min_size=2, max_size=2))
    parts = []
    for kind, exponent in zip(kinds, exponents, strict=True):
        part = part_of_kind(kind, rows, columns // 2, generator)
        parts.append(part * 10.0**exponent)
    limit = torch.finfo(torch.float32).max
    return torch.cat(parts, dim=1).clamp(-limit, limit).float()
