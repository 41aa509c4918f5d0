"""From the layouts of files to those that the CUDA kernels read (``kernels/README.md``, "Weight layouts").

AWQ's checkpoint layout is read as it is. All others become octet-major: the codes of eight inputs of one output are one
unit, units are stored [in_features / 8, out_features], and all parameters [.., out_features], so that neighbouring
threads read neighbouring memory, always 16 bytes at a time. Nothing is rounded: every layout stands for exactly the
float32 weights that the file does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.core.qtensor import E2M1_VALUES, Grid, QTensor
from qconv.errors import UsageError
from qconv.formats.awq import ORDER
from qconv.runtime.kernel_interface import ALIGNMENT, KernelWeight


def awq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> KernelWeight:
    """AutoAWQ's tensors of a linear, or stacks of them [experts, ...], as they are in the file.

    Args:
        qweight: int32 [in, out/8].
        qzeros: int32 [groups, out/8].
        scales: float16 or bfloat16 [groups, out].

    Raises:
        UsageError: the kernels do not cover the shape.
    """
    depth, columns = qweight.shape[-2], scales.shape[-1]
    _require_aligned(columns, depth)
    return KernelWeight(
        "awq", columns, depth, qweight, scales, offsets=qzeros, group_shift=_group_shift(depth, scales.shape[-2])
    )


def int4_weight(weight: QTensor) -> KernelWeight:
    """A four-bit integer weight: GPTQ's or compressed-tensors', with or without zero points and act-order.

    Inputs of an act-order weight are sorted by group; ``gather`` says where each came from.

    Raises:
        UsageError: the kernels do not cover the shape, the groups or the dtype of the scales.
    """
    columns, depth = weight.shape
    _require_aligned(columns, depth)
    if weight.grid.based:
        raise UsageError("no kernel for groups with biases")
    if weight.grid.bits != 4 or weight.scales.dtype not in (torch.float16, torch.bfloat16):
        raise UsageError(f"no kernel for {weight.grid.bits}-bit integers with {weight.scales.dtype} scales")
    groups = weight.scales.shape[1]
    codes, gather = weight.codes, None
    if weight.group_index is not None:
        counts = torch.bincount(weight.group_index, minlength=groups)
        if len(counts) != groups or bool((counts != depth // groups).any()):
            raise UsageError("no kernel for an act-order weight whose groups differ in size")
        gather = torch.argsort(weight.group_index, stable=True).to(torch.int32)
        codes = codes[:, gather]
    zero_points = weight.zero_points
    if zero_points is None:
        zero_points = torch.full((columns, groups), weight.grid.mid, dtype=torch.uint8)
    zero_offset = int(zero_points.max() > 15)  # 16 is a zero point in files that store one less
    if int(zero_points.min()) < zero_offset:
        raise UsageError("no kernel for zero points from 0 to 16")
    return KernelWeight(
        "int4",
        columns,
        depth,
        nibble_octets(codes),
        weight.scales.t().contiguous(),
        offsets=_words((zero_points - zero_offset).t(), ORDER),
        group_shift=_group_shift(depth, groups),
        zero_offset=zero_offset,
        gather=gather,
    )


def fp8_weight(weight: QTensor) -> KernelWeight:
    """A weight of floats, whatever shares a scale: groups, blocks, rows or all of it; every output gets its own copy.

    Raises:
        UsageError: the kernels do not cover the shape or the blocks, or a code is NaN.
    """
    columns, depth = weight.shape
    _require_aligned(columns, depth)
    weight = as_e4m3(weight)
    codes = weight.codes.view(torch.uint8)
    if bool(((codes & 0x7F) == 0x7F).any()):
        raise UsageError("no kernel for an E4M3 weight with NaN among its codes")
    scales = weight.scales.float().repeat_interleave(weight.grid.rows_sharing(columns), 0)[:columns]
    shift = 31 if scales.shape[1] == 1 else _shift(weight.grid.group_size)
    return KernelWeight("fp8", columns, depth, byte_octets(codes), scales.t().contiguous(), group_shift=shift)


def as_e4m3(weight: QTensor) -> QTensor:
    """A weight of floats as E4M3 with the scales that its codes are multiplied by: E4M3 has all numbers of E2M1."""
    if weight.grid.number == "e4m3" and weight.grid.scale_dtype.itemsize > 1:
        return weight
    codes = weight.codes
    if weight.grid.number == "e2m1":
        table = torch.tensor(E2M1_VALUES).to(torch.float8_e4m3fn).view(torch.uint8)
        codes = table.index_select(0, codes.flatten().int()).view(codes.shape).view(torch.float8_e4m3fn)
    grid = Grid(8, weight.grid.group_size, True, torch.float32, "e4m3", weight.grid.block_rows)
    return QTensor(grid, codes, weight.steps(), None)


def q8_0_weight(blocks: Tensor) -> KernelWeight:
    """ggml's Q8_0: uint8 [out, in/32 * 34], as in the file.

    Raises:
        UsageError: the kernels do not cover the shape.
    """
    columns, grouped = _blocks(blocks, 34)
    depth = grouped.shape[1] * 32
    _require_aligned(columns, depth)
    codes = grouped[..., 2:].reshape(columns, depth)
    return KernelWeight("q8_0", columns, depth, byte_octets(codes), _halves(grouped[..., :2]).t().contiguous())


def q4_k_weight(blocks: Tensor) -> KernelWeight:
    """ggml's Q4_K: uint8 [out, in/256 * 144], as in the file.

    Raises:
        UsageError: the kernels do not cover the shape.
    """
    columns, grouped = _blocks(blocks, 144)
    depth = grouped.shape[1] * 256
    _require_aligned(columns, depth)
    packed = grouped[..., 4:16].to(torch.int32)
    low, high, mixed = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat([low & 63, (mixed & 15) | (low >> 6 << 4)], -1)
    minimums = torch.cat([high & 63, (mixed >> 4) | (high >> 6 << 4)], -1)
    runs = torch.stack([scales, minimums], -1).to(torch.uint8).view(columns, -1, 2)
    factors = grouped[..., :4].contiguous().view(torch.int32).view(columns, -1)  # d and dmin, two float16
    quarters = grouped[..., 16:].reshape(columns, -1, 4, 32)
    codes = torch.stack([quarters & 15, quarters >> 4], 3).view(columns, depth)
    return KernelWeight(
        "q4_k",
        columns,
        depth,
        nibble_octets(codes),
        runs.transpose(0, 1).contiguous(),
        offsets=factors.t().contiguous(),
    )


def q6_k_weight(blocks: Tensor) -> KernelWeight:
    """ggml's Q6_K: uint8 [out, in/256 * 210], as in the file.

    Raises:
        UsageError: the kernels do not cover the shape.
    """
    columns, grouped = _blocks(blocks, 210)
    depth = grouped.shape[1] * 256
    _require_aligned(columns, depth)
    lower = grouped[..., :128].reshape(columns, -1, 2, 1, 64)
    lower = torch.cat([lower & 15, lower >> 4], 3).view(columns, depth)
    upper = grouped[..., 128:192].reshape(columns, -1, 2, 1, 32)
    upper = torch.cat([upper >> shift & 3 for shift in (0, 2, 4, 6)], 3).view(columns, depth)
    octets = [codes.view(columns, -1, 2, 4, 4).transpose(2, 3).reshape(columns, depth) for codes in (lower, upper)]
    return KernelWeight(
        "q6_k",
        columns,
        depth,
        nibble_octets(octets[0]),
        (grouped[..., 192:208] ^ 128).reshape(columns, -1).t().contiguous(),
        offsets=_halves(grouped[..., 208:]).t().contiguous(),
        weights_high=upper_bits(octets[1]),
    )


def byte_octets(codes: Tensor) -> Tensor:
    """uint8 [out, in] -> uint8 [in/8, out, 8]."""
    return codes.view(len(codes), -1, 8).transpose(0, 1).contiguous()


def nibble_octets(codes: Tensor) -> Tensor:
    """uint8 [out, in] below 16 -> int32 [in/8, out/8, 8]: squares of eight inputs by eight outputs.

    Word i of the first four holds inputs 2i (lower half) and 2i + 1 (upper half) of outputs 0, 2, 4, 6, lowest bits
    first, word i of the last four those of outputs 1, 3, 5, 7.
    """
    return _packed(_squares(codes).view(-1, len(codes) // 8, 4, 2, 4, 2).permute(0, 1, 5, 2, 3, 4), 4).flatten(2)


def upper_bits(codes: Tensor) -> Tensor:
    """uint8 [out, in] below 4 -> int32 [in/8, out/8, 4]: word i holds inputs 2i and 2i + 1 of all eight outputs."""
    return _packed(_squares(codes).view(-1, len(codes) // 8, 4, 2, 8), 2)


def _squares(codes: Tensor) -> Tensor:
    """[out, in] -> [in/8, out/8, 8 inputs, 8 outputs]."""
    columns, depth = codes.shape
    return codes.view(columns // 8, 8, depth // 8, 8).permute(2, 0, 3, 1).contiguous()


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., 2, 16 / bits] -> int32 [...]: both halves of words, lowest bits first."""
    fields = codes.contiguous().view(*codes.shape[:-2], 4, 8 // bits)
    packed = torch.zeros(fields.shape[:-1], dtype=torch.uint8)
    for place in range(8 // bits):
        packed |= fields[..., place] << (bits * place)
    return packed.view(torch.int32).squeeze(-1)


def _blocks(blocks: Tensor, size: int) -> tuple[int, Tensor]:
    """Rows, and uint8 [rows, blocks, size]."""
    return len(blocks), blocks.contiguous().view(len(blocks), -1, size)


def _halves(values: Tensor) -> Tensor:
    """uint8 [rows, blocks, 2] -> float16 [rows, blocks]."""
    return values.contiguous().view(torch.float16).squeeze(-1)


def _words(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """uint8 [rows, columns] below 16 -> int32 [rows, columns/8]; nibble i of a word holds column ``order[i]``."""
    rows, columns = codes.shape
    octets = codes.contiguous().view(rows, columns // 8, 8)
    packed = octets[..., list(order[0::2])] | octets[..., list(order[1::2])] << 4
    return packed.view(torch.int32).view(rows, columns // 8)


def _group_shift(depth: int, groups: int) -> int:
    """log2 of the inputs that share a scale; 31 where all do.

    Raises:
        UsageError: the group size is not a power of two from 32 up.
    """
    return 31 if groups == 1 else _shift(depth // groups)


def _shift(size: int) -> int:
    if size < 32 or size & (size - 1):
        raise UsageError(f"no kernel for groups of {size} inputs: only powers of two from 32 up and whole rows")
    return size.bit_length() - 1


def _require_aligned(columns: int, depth: int, depth_multiple: int = ALIGNMENT) -> None:
    if columns % ALIGNMENT or depth % depth_multiple:
        raise UsageError(
            f"no kernel for a weight of {columns} outputs and {depth} inputs: "
            f"they must be multiples of {ALIGNMENT} and {depth_multiple}"
        )
