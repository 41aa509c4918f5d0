"""What a backend must be able to do: make operators from packed weights.

An operator computes in the dtype of its inputs and accumulates in float32 or better; what it returns is rounded once to
that dtype. It may hold the weight's own tensors (mapped from the file), copies on a device, or another arrangement of
them, but nothing that grows with the weight beyond its packed size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qconv.runtime.packed import PackedMlp, PackedWeight

Activation = Callable[[Tensor], Tensor]


class LinearOperator(Protocol):
    """``inputs @ weight.T`` for one packed weight; the bias is not its business."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Multiply.

        Args:
            inputs: float32, float16 or bfloat16 [..., in_features] on the backend's device.

        Returns:
            [..., out_features] in the inputs' dtype.
        """

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the operator keeps in memory, for accounting."""


class ExpertsOperator(Protocol):
    """The experts of one sparse block: each token's chosen ones, weighted and summed."""

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Compute only the experts that some token chose.

        Args:
            inputs: float32, float16 or bfloat16 [tokens, hidden] on the backend's device.
            chosen: int64 [tokens, top_k], the experts of each token.
            weights: [tokens, top_k], how much each counts; any float dtype.

        Returns:
            ``sum_k weights[t, k] * expert[chosen[t, k]](inputs[t])``, [tokens, hidden] in the inputs' dtype.
        """

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the operator keeps in memory, for accounting."""


class Backend(Protocol):
    """Makes operators. Weights that it has no kernel for it hands to torch's own operations."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def device(self) -> torch.device:
        """Where weights and activations are."""

    def linear(self, weight: PackedWeight) -> LinearOperator:
        """The operator of one linear.

        Raises:
            CheckpointError: the weight's tensors contradict each other.
        """

    def experts(self, experts: Sequence[PackedMlp], act: Activation) -> ExpertsOperator:
        """The operator of a sparse block's experts, in their order.

        Args:
            experts: Their weights.
            act: The activation of the gate, elementwise.

        Raises:
            CheckpointError: a weight's tensors contradict each other.
        """
