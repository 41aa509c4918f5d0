"""The backend of NVIDIA's GPUs: qconv's kernels where they fit, torch's operations elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from qconv.errors import BackendError
from qconv.runtime.backends.base import Activation, ExpertsOperator, LinearOperator
from qconv.runtime.backends.cuda.launch import Launcher
from qconv.runtime.backends.cuda.operators import CudaExperts, CudaLinear
from qconv.runtime.backends.cuda.sources import source_of
from qconv.runtime.backends.cuda.weights import beside, pack, placed, stacked
from qconv.runtime.backends.reference import ReferenceBackend
from qconv.runtime.packed import DenseWeight, PackedMlp, PackedWeight


class CudaBackend:
    """Makes operators that launch kernels.

    A weight that no kernel takes goes to torch, and a warning says so, once for each reason.
    """

    name = "cuda"

    def __init__(self, device: torch.device, launcher: Launcher) -> None:
        self.device = device
        self._launcher = launcher
        self._torch = ReferenceBackend(device, "cuda")
        self._warned: set[str] = set()

    def linear(self, weight: PackedWeight) -> LinearOperator:
        """The operator of one linear.

        Raises:
            CheckpointError: the weight's tensors contradict each other.
        """
        if isinstance(weight, DenseWeight):
            return self._torch.linear(weight)
        try:
            packed = placed(pack(weight), self.device)
            self._launcher.load(source_of(packed.layout))
        except BackendError as error:
            self._warn(error)
            return self._torch.linear(weight)
        return CudaLinear(packed, self._launcher, weight, self._torch)

    def experts(self, experts: Sequence[PackedMlp], act: Activation) -> ExpertsOperator:
        """The operator of a sparse block's experts.

        Raises:
            CheckpointError: a weight's tensors contradict each other.
        """
        if any(isinstance(weight, DenseWeight) for mlp in experts for weight in mlp.weights()):
            return self._torch.experts(experts, act)
        try:
            gates, ups, downs = zip(*([pack(weight) for weight in mlp.weights()] for mlp in experts), strict=True)
            joined = [beside(gate, up) for gate, up in zip(gates, ups, strict=True)]
            both = [weight for weight in joined if weight is not None]
            inner = (stacked(both),) if len(both) == len(joined) else (stacked(gates), stacked(ups))
            down = stacked(downs)
            for weight in (*inner, down):
                self._launcher.load(source_of(weight.layout))
        except BackendError as error:
            self._warn(error)
            return self._torch.experts(experts, act)
        return CudaExperts(
            tuple(placed(weight, self.device) for weight in inner),
            placed(down, self.device),
            act,
            self._launcher,
            experts,
            self._torch,
        )

    def _warn(self, error: BackendError) -> None:
        if error.message not in self._warned:
            self._warned.add(error.message)
            warnings.warn(f"{error.message}; torch's own operations are used, which are slower", stacklevel=3)
