"""From the layouts of files to those that the CUDA kernels read (``kernels/README.md``, "Weight layouts").

AWQ's checkpoint layout is read as it is. All others become octet-major: the codes of eight inputs of one output are one
unit, units are stored [in_features / 8, out_features], and all parameters [.., out_features], so that neighbouring
threads read neighbouring memory, always 16 bytes at a time. Nothing is rounded: every layout stands for exactly the
float32 weights that the file does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.errors import UsageError
from qconv.formats.awq import ORDER
from qconv.qtensor import QTensor
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
    return KernelWeight(
        "int4",
        columns,
        depth,
        nibble_octets(codes),
        weight.scales.t().contiguous(),
        offsets=_words(zero_points.t(), range(8)),
        group_shift=_group_shift(depth, groups),
        gather=gather,
    )


def nibble_octets(codes: Tensor) -> Tensor:
    """uint8 [out, in] below 16 -> int32 [in/8, out]; nibble i of a word holds input ``ORDER[i]`` of its octet."""
    return _words(codes, ORDER).t().contiguous()


def _words(codes: Tensor, order: tuple[int, ...] | range) -> Tensor:
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
    size = depth // groups
    if groups == 1:
        return 31
    if size < 32 or size & (size - 1) or size * groups != depth:
        raise UsageError(f"no kernel for groups of {size} inputs: only powers of two from 32 up and whole rows")
    return size.bit_length() - 1


def _require_aligned(columns: int, depth: int, depth_multiple: int = ALIGNMENT) -> None:
    if columns % ALIGNMENT or depth % depth_multiple:
        raise UsageError(
            f"no kernel for a weight of {columns} outputs and {depth} inputs: "
            f"they must be multiples of {ALIGNMENT} and {depth_multiple}"
        )
