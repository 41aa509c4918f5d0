"""Rounding to E4M3 floats that share a scale by block, by row or as a whole, with an optional search of the scales.

E4M3 (OCP 8-bit Floating Point Specification, 2023, section 5) has four bits of exponent, with bias 7, and three of
fraction. Its largest number is 448; below 2**-6 it goes on in steps of 2**-9 to 0; it has a NaN and no infinity.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.core.rounding import clip_ratios, row_blocks, storable
from qconv.core.settings import ClipSettings
from qconv.grids.nearest import E4M3

MAX = E4M3.highest
"""The largest number."""


def quantize(
    weight: Tensor, grid: Grid, clip: ClipSettings | None = None, input_scale: Tensor | None = None
) -> QTensor:
    """Round a weight to nearest on a float grid, ties to even; what a rounded scale puts beyond 448 becomes 448.

    Args:
        weight: [out_features, in_features], any float dtype, finite; not changed.
        grid: The float grid.
        clip: Search each scale for the least squared error of its weights; None puts the largest one at 448.
        input_scale: float32 [], of the linear's inputs, on a grid with static activations.
    """

    bands = _Bands(weight, grid)
    common = _fitted(bands, grid, clip) if grid.block_rows == CHANNEL else None
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = []
    for (start, stop), tiles in zip(bands.spans(), bands, strict=True):
        own = _fitted([tiles], grid, clip) if common is None else common
        codes[start:stop] = _encoded_(tiles, own)[: stop - start, : weight.shape[1]]
        scales.append(own)
    return QTensor(grid, codes, torch.cat(scales) if common is None else common, None, input_scale=input_scale)


def activation_scale(absmax: Tensor) -> Tensor:
    """What a linear's inputs are divided by so that the largest one becomes 448, float32 [].

    Args:
        absmax: The largest magnitude among its calibration inputs, []; 0 gives 1.
    """
    return storable(absmax.float() / MAX, torch.float32)


def scale_ratios(clip: ClipSettings) -> list[float]:
    """The factors on the scale that a search tries, 1 first.

    Half the scale moves every code up by one power of two and changes no rounding but at the two ends of E4M3's range:
    so instead of a clipping ratio r below 1, which cuts off the largest weights, 2r is tried, which cuts off nothing.
    """
    return [ratio if ratio == 1.0 else 2.0 * ratio for ratio in clip_ratios(clip)]


@dataclass(frozen=True, slots=True)
class _Bands:
    """A weight's rows in parts that fit the cache, as tiles; each iteration makes them anew."""

    weight: Tensor
    grid: Grid

    def spans(self) -> Iterator[tuple[int, int]]:
        """Ranges ``start, stop`` of rows."""
        rows, columns = self.weight.shape
        return row_blocks(rows, columns, self.grid.row_multiple)

    def __iter__(self) -> Iterator[Tensor]:
        return (_tiles(self.weight[start:stop], self.grid) for start, stop in self.spans())


def _tiles(band: Tensor, grid: Grid) -> Tensor:
    """Rows as the blocks that share a scale, float32 [down, tall, across, wide], zeros at ragged edges; a copy."""
    rows, columns = band.shape
    tall, wide = grid.rows_sharing(rows), grid.width(columns)
    down, across = grid.scale_shape(rows, columns)
    if (down * tall, across * wide) == (rows, columns):
        return band.to(torch.float32, copy=True).view(down, tall, across, wide)
    tiles = torch.zeros(down * tall, across * wide)
    tiles[:rows, :columns] = band
    return tiles.view(down, tall, across, wide)


def _fitted(bands: Iterable[Tensor], grid: Grid, clip: ClipSettings | None) -> Tensor:
    """The scales that all bands share, ``grid.scale_dtype`` [down, across]; of equally good ones the first tried.

    Args:
        bands: Tiles, gone through twice for a search.
        grid: The grid.
        clip: The search, None for none.
    """
    absmax = functools.reduce(torch.maximum, (tiles.abs().amax(3).amax(1) for tiles in bands))
    if clip is None:
        return storable(absmax / MAX, grid.scale_dtype)
    tried = torch.stack([storable(absmax / MAX * ratio, grid.scale_dtype) for ratio in scale_ratios(clip)])
    errors = functools.reduce(torch.add, (_errors(tiles, tried) for tiles in bands))
    best = errors.argmin(0, keepdim=True)
    if grid.scale_dtype.itemsize == 1:  # which torch gathers only as bytes
        return tried.view(torch.uint8).gather(0, best)[0].view(grid.scale_dtype)
    return tried.gather(0, best)[0]


def _errors(tiles: Tensor, tried: Tensor) -> Tensor:
    """Squared errors of tiles for each of their ``tried`` scales [ratios, down, across], float32 of that shape."""
    errors = torch.empty(tried.shape)
    for scales, out in zip(tried, errors, strict=True):
        spread = _spread(scales)
        rounded = E4M3(tiles / spread).mul_(spread)
        out.copy_(rounded.sub_(tiles).square_().sum(3).sum(1))
    return errors


def _encoded_(tiles: Tensor, scales: Tensor) -> Tensor:
    """Codes, float8_e4m3fn [down * tall, across * wide]; ``tiles`` is overwritten.

    Clamped first: what is beyond 448 after rounding would be NaN, and torch's conversion has given either.
    """
    down, tall, across, wide = tiles.shape
    values = tiles.div_(_spread(scales)).clamp_(-MAX, MAX)
    return values.to(torch.float8_e4m3fn).view(down * tall, across * wide)


def _spread(scales: Tensor) -> Tensor:
    """Scales [down, across] as float32 that broadcast over tiles."""
    return scales.float()[:, None, :, None]
