"""The types whose formula leaves nothing to search. Their bytes are those of ``ggml_quantize_chunk``.

Every function takes finite float32 [blocks, block_elements] and gives uint8 [blocks, block_bytes].
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.grids.ggml.numeric import as_half, reciprocal
from qconv.grids.ggml.packing import by_block, half_bytes
from qconv.grids.ggml.scaled import Encoded

_BELOW_HALF = 0.49999997  # the float32 before 0.5

MXFP4_MAGNITUDES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""Of an MXFP4 element, doubled (OCP Microscaling Formats 1.0, table 5)."""


def f32(blocks: Tensor) -> Tensor:
    """The numbers as they are."""
    return blocks.contiguous().view(torch.uint8)


def f16(blocks: Tensor) -> Tensor:
    """The nearest float16, ties to even."""
    return blocks.to(torch.float16).view(torch.uint8)


def bf16(blocks: Tensor) -> Tensor:
    """The nearest bfloat16, ties to even."""
    return blocks.to(torch.bfloat16).view(torch.uint8)


def q8_0(blocks: Tensor) -> Tensor:
    """Codes ``round(x / d)`` with ``d = max|x| / 127``; halves are rounded away from zero."""
    scale = blocks.abs().amax(1, keepdim=True) / 127.0
    codes = blocks * reciprocal(scale)
    # Truncating after adding the number before a half rounds like C's roundf; torch.round takes halves to even.
    codes.add_(torch.copysign(torch.tensor(_BELOW_HALF, device=blocks.device), codes))
    return _join(scale, _truncated(codes))


def q4_0(blocks: Tensor) -> Tensor:
    """Codes ``floor(x / d + 8.5)`` with ``d = x_max / -8``, x_max being the weight of the largest magnitude."""
    scale = _signed_maximum(blocks) / -8.0
    codes = _truncated((blocks * reciprocal(scale)).add_(8.5).clamp_(max=15.0))
    return _join(scale, _nibbles(codes))


def q4_1(blocks: Tensor) -> Tensor:
    """Codes ``floor((x - min) / d + 0.5)`` with ``d = (max - min) / 15``."""
    scale, low, codes = _affine(blocks, 15)
    return _join(scale, low, _nibbles(codes))


def q5_0(blocks: Tensor) -> Tensor:
    """Codes ``floor(x / d + 16.5)`` with ``d = x_max / -16``."""
    scale = _signed_maximum(blocks) / -16.0
    codes = _truncated((blocks * reciprocal(scale)).add_(16.5).clamp_(max=31.0))
    return _join(scale, _fifth_bits(codes), _nibbles(codes))


def q5_1(blocks: Tensor) -> Tensor:
    """Codes ``floor((x - min) / d + 0.5)`` with ``d = (max - min) / 31``."""
    scale, low, codes = _affine(blocks, 31)
    return _join(scale, low, _fifth_bits(codes), _nibbles(codes))


def mxfp4(blocks: Tensor) -> Tensor:
    """A power of two for the block; of each weight its sign and the nearest of eight magnitudes (ties: the smaller)."""
    largest = blocks.abs().amax(1, keepdim=True)
    # log2 in float64, rounded: just below a power of two the float32 functions of different libraries differ.
    exponent = torch.log2(largest.double()).float().floor_().add_(125.0).clamp_(0.0, 254.0)  # of 0: -inf
    # The magnitudes are doubled, so the scale is half of what the exponent says. The boundaries between magnitudes are
    # multiples of a half: how many half steps a weight reaches decides, a fraction of one counted as one.
    half_steps = blocks * _power_of_two(129 - exponent.to(torch.int32).clamp_(min=2))
    index = torch.copysign(half_steps.abs().ceil_().clamp_(max=32.0), half_steps).add_(32.0).to(torch.int32)
    codes = _mxfp4_codes(blocks.device).index_select(0, index.view(-1)).view(blocks.shape)
    return torch.cat([exponent.to(torch.uint8), _nibbles(codes)], dim=1)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent, exactly: int32 from -126 to 127 -> float32."""
    return (exponent + 127 << 23).view(torch.float32)


def _mxfp4_codes(device: torch.device) -> Tensor:
    """The code of each count of half steps from -32 to 32: uint8 [65]."""
    magnitudes = torch.tensor(MXFP4_MAGNITUDES, device=device)
    boundaries = magnitudes[1:] + magnitudes[:-1]  # in half steps
    codes = torch.bucketize(torch.arange(33, device=device).float(), boundaries)
    negative = torch.where(codes > 0, codes + 8, codes).flip(0)
    return torch.cat([negative[:-1], codes]).to(torch.uint8)


def _signed_maximum(blocks: Tensor) -> Tensor:
    """The element of the largest magnitude, with its sign, the first of equals; 0 is positive: float32 [blocks, 1]."""
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)  # aminmax takes five times as long
    largest = torch.where(high >= -low, high, low)
    tied = (high == -low).squeeze(1).nonzero().squeeze(1)
    if len(tied):
        rows = blocks[tied]
        largest[tied] = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return largest.add_(0.0)


def _affine(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = (high - low).add_(0.0) / levels
    signless = (low == 0.0).squeeze(1).nonzero().squeeze(1)
    if len(signless):  # its sign is stored: that of the first zero
        rows = blocks[signless]
        low[signless] = rows.gather(1, (rows == 0.0).int().argmax(dim=1, keepdim=True))
    codes = (blocks - low).mul_(reciprocal(scale)).add_(0.5).clamp_(max=levels)
    return scale, low, _truncated(codes)


def _truncated(codes: Tensor) -> Tensor:
    return codes.to(torch.int8).view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """The low four bits of elements i and i + 16 in one byte: uint8 [blocks, 32] -> [blocks, 16]."""
    words = codes.view(torch.int64) & 0x0F0F0F0F0F0F0F0F  # eight codes at a time
    return (words[:, :2] | (words[:, 2:] << 4)).view(torch.uint8)


def _fifth_bits(codes: Tensor) -> Tensor:
    """Bit 4 of each code as a little-endian word: uint8 [blocks, 32] -> [blocks, 4]."""
    bits = (codes.view(torch.int64) >> 4) & 0x0101010101010101
    # The product moves the bit of byte i to bit 56 + i.
    return ((bits * 0x0102040810204080 >> 56) & 255).to(torch.uint8)


def _join(*parts: Tensor) -> Tensor:
    """Float scales [blocks, 1] as float16, and bytes, side by side."""
    columns = [part if part.dtype == torch.uint8 else as_half(part).half().view(torch.uint8) for part in parts]
    return torch.cat(columns, dim=1)


def pack_q8_0(found: Encoded) -> Tensor:
    """d; codes. Of values from -127 to 127, uint8 [blocks, block_bytes]."""
    codes = found.values.to(torch.int8).view(torch.uint8)
    return torch.cat([half_bytes(found.scales[0]), by_block(codes)], dim=1)


def pack_mxfp4(found: Encoded) -> Tensor:
    """The exponent; codes. Of doubled magnitudes with signs and scales that are powers of two."""
    exponents = torch.log2(found.scales[0].double()).add_(128.0).clamp_(0.0, 254.0).to(torch.uint8).unsqueeze(1)
    magnitudes = torch.tensor(MXFP4_MAGNITUDES, device=found.values.device)
    codes = torch.bucketize(found.values.abs(), magnitudes)
    codes = torch.where((codes > 0) & (found.values < 0.0), codes + 8, codes).to(torch.uint8)
    return torch.cat([exponents, _nibbles(by_block(codes).contiguous())], dim=1)
