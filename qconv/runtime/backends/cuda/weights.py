"""Packed weights as the kernels read them, one by one, side by side, or one expert after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qconv.errors import BackendError, UsageError
from qconv.runtime import repack
from qconv.runtime.kernel_interface import KernelWeight
from qconv.runtime.packed import BlockWeight, FloatWeight, IntegerWeight, PackedWeight


def pack(weight: PackedWeight) -> KernelWeight:
    """A weight in a kernel's layout, where its tensors are.

    Raises:
        BackendError: no kernel takes it.
        CheckpointError: its tensors contradict each other.
    """
    try:
        match weight:
            case IntegerWeight(format="awq", parts=parts):
                return repack.awq_weight(parts["qweight"], parts["qzeros"], parts["scales"])
            case IntegerWeight():
                return repack.int4_weight(weight.unpack())
            case FloatWeight():
                return repack.fp8_weight(weight.weight)
            case BlockWeight(type=GGMLQuantizationType.Q8_0):
                return repack.q8_0_weight(weight.rows)
            case BlockWeight(type=GGMLQuantizationType.Q4_K):
                return repack.q4_k_weight(weight.rows)
            case BlockWeight(type=GGMLQuantizationType.Q6_K):
                return repack.q6_k_weight(weight.rows)
            case BlockWeight():
                raise BackendError(f"no kernel for ggml's {weight.type.name}")
    except UsageError as error:
        raise BackendError(error.message) from error
    raise BackendError("no kernel for a weight that is not quantized")


def tensors(weight: KernelWeight) -> dict[str, Tensor]:
    """A weight's tensors by field."""
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def placed(weight: KernelWeight, device: torch.device) -> KernelWeight:
    """The same weight on a device, as kernels want their pointers."""
    return _replaced(weight, {name: aligned(value.to(device)) for name, value in tensors(weight).items()})


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is not contiguous or does not begin at a multiple of 16 bytes."""
    contiguous = tensor.contiguous()
    return contiguous.clone() if contiguous.data_ptr() % 16 else contiguous


def beside(first: KernelWeight, second: KernelWeight) -> KernelWeight | None:
    """Two weights of the same inputs as one with the outputs of both; None where they do not fit together."""
    if _kind(first) != _kind(second) or not _same_order(first, second):
        return None
    others = tensors(second)
    # Every layout has a weight's outputs along dimension 1.
    joined = {name: torch.cat([value, others[name]], 1) for name, value in tensors(first).items() if name != "gather"}
    return replace(_replaced(first, joined), columns=first.columns + second.columns)


def stacked(weights: Sequence[KernelWeight]) -> KernelWeight:
    """Experts' weights one after the other.

    Raises:
        BackendError: they are of different layouts, shapes or groups.
    """
    first = weights[0]
    parts = [tensors(each) for each in weights]
    same = all(_kind(each) == _kind(first) and each.columns == first.columns for each in weights)
    if not same or any(each.keys() != parts[0].keys() for each in parts):
        raise BackendError("no kernel for experts that are packed in different ways")
    return _replaced(first, {name: torch.stack([each[name] for each in parts]) for name in parts[0]})


def _replaced(weight: KernelWeight, values: Mapping[str, Tensor]) -> KernelWeight:
    """The weight with other tensors in the place of those named."""
    return replace(
        weight,
        weights=values.get("weights", weight.weights),
        weights_high=values.get("weights_high", weight.weights_high),
        scales=values.get("scales", weight.scales),
        offsets=values.get("offsets", weight.offsets),
        gather=values.get("gather", weight.gather),
    )


def _kind(weight: KernelWeight) -> tuple[str, int, int, int, torch.dtype]:
    return weight.layout, weight.depth, weight.group_shift, weight.zero_offset, weight.scales.dtype


def _same_order(first: KernelWeight, second: KernelWeight) -> bool:
    if first.gather is None or second.gather is None:
        return first.gather is second.gather
    return torch.equal(first.gather, second.gather)
