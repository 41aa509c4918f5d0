"""Where each bit of a block stands, as the gguf package reads it."""

from __future__ import annotations

import pytest
import torch
from gguf.quants import Q4_K
from torch import Tensor

from qconv.grids.ggml.packing import (
    bit_fields,
    by_block,
    by_element,
    fifth_bits,
    six_bit_pairs,
    six_bit_scales,
    split_halves,
)


def random_codes(bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_blocks_survive_the_layout_of_the_searches() -> None:
    blocks = random_codes(8, 5, 256)
    arranged = by_element(blocks, 16, padding=3)
    assert arranged.shape == (16, 16, 8)
    assert arranged[3, 7, 2] == blocks[2, 7 * 16 + 3]
    assert bool((arranged[..., 5:] == 0.0).all())
    assert torch.equal(by_block(arranged.to(torch.uint8))[:5], blocks)


@pytest.mark.parametrize(
    ("bits", "stride", "shift"), [(4, 1, 0), (4, 4, 0), (2, 2, 0), (2, 2, 4), (1, 2, 2), (1, 1, 4)]
)
def test_a_byte_joins_the_codes_of_sub_blocks_a_stride_apart(bits: int, stride: int, shift: int) -> None:
    codes = random_codes(6, 16, 16, 8)
    packed = bit_fields(codes, bits, stride, shift)
    packed = packed.view(8, -1, stride, 16)  # [blocks, runs, sub-block of the run, element]
    per_byte = 8 // bits
    for subblock in range(16):
        run, place, first = subblock // (per_byte * stride), subblock // stride % per_byte, subblock % stride
        found = (packed[:, run, first] >> (bits * place)) & ((1 << bits) - 1)
        assert torch.equal(found.t(), (codes[:, subblock] >> shift) & ((1 << bits) - 1))


def test_halves_of_32_share_bytes() -> None:
    codes = random_codes(4, 32, 8, 8)
    packed = bit_fields(split_halves(codes), 4).view(8, 8, 16)
    for block in range(8):
        for subblock in range(8):
            assert torch.equal(packed[block, subblock] & 15, codes[:16, subblock, block])
            assert torch.equal(packed[block, subblock] >> 4, codes[16:, subblock, block])


def test_fifth_bits_are_one_little_endian_word() -> None:
    codes = random_codes(5, 32, 1, 8)
    words = fifth_bits(codes).contiguous().view(torch.int32)[:, 0]
    for element in range(32):
        assert torch.equal((words >> element) & 1, (codes[element, 0] >> 4).int())


def test_six_bit_pairs_are_read_back() -> None:
    scales, mins = random_codes(6, 8, 48), random_codes(6, 8, 48).flip(1)
    found = Q4_K.get_scale_min(six_bit_pairs(scales, mins).contiguous().numpy())
    assert torch.equal(torch.from_numpy(found[0]), scales.t())
    assert torch.equal(torch.from_numpy(found[1]), mins.t())


def test_six_bit_scales_put_low_nibbles_first() -> None:
    scales = random_codes(6, 16, 48)
    packed = six_bit_scales(scales).t()
    assert packed.shape == (12, 48)
    for number in range(16):
        low = packed[number % 8] >> (4 * (number // 8)) & 15
        high = packed[8 + number % 4] >> (2 * (number // 4)) & 3
        assert torch.equal(low | high << 4, scales[number])
