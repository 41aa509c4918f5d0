"""The backend of machines without a GPU."""

from __future__ import annotations

import torch

from qconv.runtime.backends.reference import ReferenceBackend


def create(device: torch.device) -> ReferenceBackend:
    """The backend."""
    return ReferenceBackend(device, "cpu")
