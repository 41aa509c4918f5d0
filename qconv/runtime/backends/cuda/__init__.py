"""The backend of NVIDIA's GPUs: kernels compiled at first use by NVRTC, launched on torch's stream."""

from __future__ import annotations

import warnings

import torch

from qconv.errors import BackendError
from qconv.runtime.backends.cuda.backend import CudaBackend
from qconv.runtime.backends.cuda.driver import DriverLauncher, load_driver
from qconv.runtime.backends.reference import ReferenceBackend


def create(device: torch.device) -> CudaBackend | ReferenceBackend:
    """The backend on a device; where its compiler or the driver's bindings are missing, torch's, and a warning."""
    try:
        return CudaBackend(device, DriverLauncher(device, load_driver()))
    except BackendError as error:
        warnings.warn(f"{error}; torch's own operations are used, which are slower", stacklevel=3)
        return ReferenceBackend(device, "cuda")
