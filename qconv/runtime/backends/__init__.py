"""Backends: how packed weights are multiplied with. A module's name is its backend's registry key.

``create(device)`` of the module makes the backend; ``base`` says what it must be able to do.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from qconv.errors import UsageError
from qconv.runtime.backends.base import Backend

BACKENDS = ("cpu", "cuda", "reference")


def get_backend(name: str = "auto", device: torch.device | str | None = None) -> Backend:
    """A backend.

    Args:
        name: ``cpu``, ``cuda``, ``reference`` (torch's own operations, any device), or ``auto``: what suits the device.
        device: Where weights and activations are; by default a GPU where there is one, for the ``cpu`` backend never.

    Raises:
        UsageError: no such backend, or not for that device.
    """
    if name != "auto" and name not in BACKENDS:
        raise UsageError(f"backend: there is no {name!r}.", hint=f"Choose auto, {', '.join(BACKENDS)}.")
    place = _place(name, device)
    kind = place.type if name == "auto" and place.type in BACKENDS else "reference" if name == "auto" else name
    if kind != "reference" and place.type != kind:
        raise UsageError(f"backend {kind!r} does not run on device {str(place)!r}.", hint="Leave one of them out.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("backend 'cuda': torch sees no CUDA device.", hint="Choose backend cpu.")
    module = f"{__name__}.{kind}"
    if importlib.util.find_spec(module) is None:
        module = f"{__name__}.reference"
    backend: Backend = importlib.import_module(module).create(place)
    return backend


def _place(name: str, device: torch.device | str | None) -> torch.device:
    if device is None:
        wanted = "cuda" if name == "cuda" or (name != "cpu" and torch.cuda.is_available()) else "cpu"
        return torch.device(wanted)
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device: there is no {device!r}.", hint="Choose cpu or cuda.") from error


__all__ = ["BACKENDS", "Backend", "get_backend"]
