"""The modules of our own in transformers' models."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qconv.runtime.modules import DenseLinear


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's base has no types
    """The names of what torch does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_dense_weight_is_not_copied_for_the_last_token() -> None:
    linear = DenseLinear((24, 16), bias=False)
    weight = torch.randn(24, 16)
    linear.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    last = torch.randn(1, 5, 16)[:, -1:]  # strides that torch does not fold
    with Operations() as ours:
        output = linear(last)
    with Operations() as torchs:
        wanted = functional.linear(last, linear.weight)
    torch.testing.assert_close(output, wanted)
    assert output.shape == (1, 1, 24)
    assert "mm" in ours.names
    assert "bmm" in torchs.names  # where this ends, DenseLinear has no reason any more
    assert "bmm" not in ours.names
