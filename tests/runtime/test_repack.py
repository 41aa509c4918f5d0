"""What the kernels' layouts refuse, and the parts of them that can be read without a kernel."""

from __future__ import annotations

import pytest
import torch

from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.errors import UsageError
from qconv.formats.awq import pack_words
from qconv.runtime import repack

INT4 = Grid(4, 32, False, torch.float16)
FP8 = Grid(8, 128, True, torch.float32, "e4m3", 128)


def integers(columns: int, depth: int, group_size: int = 32, **changes: object) -> QTensor:
    """A weight of zeros."""
    groups = depth // group_size
    values = {
        "grid": INT4,
        "codes": torch.zeros(columns, depth, dtype=torch.uint8),
        "scales": torch.ones(columns, groups, dtype=torch.float16),
        "zero_points": torch.zeros(columns, groups, dtype=torch.uint8),
    }
    return QTensor(**values | changes)  # type: ignore[arg-type]  # a mapping of mixed values


def test_nibbles() -> None:
    """Word i of square [k / 8, n / 8] holds inputs 2i and 2i + 1 of the even outputs, word 4 + i of the odd ones."""
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = repack.nibble_octets(codes).to(torch.int64)
    assert words.shape == (8, 4, 8)
    for word in range(8):
        for nibble in range(8):
            place, output = 2 * (word % 4) + nibble // 4, 2 * (nibble % 4) + word // 4
            assert torch.equal(words[..., word] >> (4 * nibble) & 15, codes[output::8, place::8].t().to(torch.int64))


def test_nibbles_are_packed_as_autoawq_packs_them() -> None:
    """The halves of a square's words are those of AWQ's words [k, n / 8]."""
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    halves = repack.nibble_octets(codes).view(torch.int16).view(8, 4, 2, 4, 2)  # [k / 8, n / 8, odd, pair, input of it]
    words = pack_words(codes.t().contiguous()).view(8, 4, 2, 4).contiguous().view(torch.int16).view(8, 4, 2, 4, 2)
    assert torch.equal(halves.permute(0, 3, 4, 1, 2), words)  # [k / 8, pair, input, n / 8, odd]


def test_upper_bits() -> None:
    """Word i of square [k / 8, n / 8] holds inputs 2i (lower half) and 2i + 1 of the eight outputs."""
    codes = torch.randint(0, 4, (32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = repack.upper_bits(codes).to(torch.int64)
    assert words.shape == (8, 4, 4)
    for word in range(4):
        for field in range(16):
            place, output = 2 * word + field // 8, field % 8
            assert torch.equal(words[..., word] >> (2 * field) & 3, codes[output::8, place::8].t().to(torch.int64))


def test_bytes() -> None:
    """Byte i of unit [k / 8, n] is input i of the octet."""
    codes = torch.arange(32 * 64, dtype=torch.int32).to(torch.uint8).view(32, 64)
    units = repack.byte_octets(codes)
    assert units.shape == (8, 32, 8)
    assert torch.equal(units[3, 5], codes[5, 24:32])


def test_act_order_gathers_by_group() -> None:
    """Inputs of a group stand together, each group's in their own order."""
    index = torch.tensor([1, 0] * 32, dtype=torch.int32)
    gather = repack.int4_weight(integers(32, 64, group_index=index)).gather
    assert gather is not None
    assert gather.tolist() == [*range(1, 64, 2), *range(0, 64, 2)]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (integers(40, 64), "multiples of 32"),
        (integers(32, 48, 16), "multiples of 32"),
        (integers(32, 192, 96), "powers of two"),
        (integers(32, 64, 16), "powers of two"),
        (integers(32, 64, grid=Grid(8, 32, False, torch.float16)), "8-bit"),
        (integers(32, 64, scales=torch.ones(32, 2)), "float32 scales"),
        (integers(32, 64, group_index=torch.tensor([0] * 40 + [1] * 24, dtype=torch.int32)), "differ in size"),
    ],
    ids=["outputs", "inputs", "group of 96", "group of 16", "bits", "scales", "act-order"],
)
def test_refused_integers(weight: QTensor, reason: str) -> None:
    """With the reason."""
    with pytest.raises(UsageError, match=reason):
        repack.int4_weight(weight)


def test_refused_floats() -> None:
    """NaN codes, which the kernels would read as numbers."""
    codes = torch.zeros(128, 128, dtype=torch.uint8)
    codes[5, 7] = 0xFF
    with pytest.raises(UsageError, match="NaN"):
        repack.fp8_weight(QTensor(FP8, codes.view(torch.float8_e4m3fn), torch.ones(1, 1), None))


def test_fp8_scales_by_output() -> None:
    """Every output has the scale of its block, the ragged last block too; a whole row has one group."""
    scales = torch.arange(4.0).view(2, 2)
    codes = torch.zeros(160, 192, dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed = repack.fp8_weight(QTensor(FP8, codes, scales, None))
    assert packed.group_shift == 7
    assert packed.scales.shape == (2, 160)
    assert packed.scales[1].tolist() == [1.0] * 128 + [3.0] * 32
    rows = Grid(8, CHANNEL, True, torch.bfloat16, "e4m3", 1)
    packed = repack.fp8_weight(QTensor(rows, codes, torch.ones(160, 1, dtype=torch.bfloat16), None))
    assert (packed.group_shift, packed.scales.shape, packed.scales.dtype) == (31, (1, 160), torch.float32)


@pytest.mark.parametrize("size", [34, 144, 210])
def test_refused_blocks(size: int) -> None:
    """ggml blocks of 24 rows."""
    make = {34: repack.q8_0_weight, 144: repack.q4_k_weight, 210: repack.q6_k_weight}[size]
    with pytest.raises(UsageError, match="multiples of 32"):
        make(torch.zeros(24, size, dtype=torch.uint8))
