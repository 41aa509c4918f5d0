"""Where operations on tensors run: the processor, or devices beside it, which threads borrow.

A device serves few threads at a time, since each holds an expert's working set in its memory. One that runs out of
memory is asked once more when nobody else uses it.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from qconv.core.workers import AT_ONCE
from qconv.errors import ResourceError, UsageError

Result = TypeVar("Result")

CPU = torch.device("cpu")
_DETERMINISTIC_BLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""Without it cuBLAS may add up in another order from call to call
(https://docs.nvidia.com/cuda/cublas/#results-reproducibility)."""


def devices_of(asked: str) -> tuple[torch.device, ...]:
    """The devices that are asked for, the first being that of what is not spread over them.

    Args:
        asked: ``cpu``; ``cuda`` for every GPU, ``cuda:0,2`` for some; ``auto`` for every GPU, or the processor where
            there is none. Another type of device that torch knows in the place of ``cuda``.

    Raises:
        UsageError: no such device.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, numbers = asked.partition(":")
    if asked == "cpu":
        return (CPU,)
    if kind == "cpu" or (colon and not numbers):
        raise _unread(asked)
    there = _count(kind, asked)
    try:
        chosen = [int(number) for number in numbers.split(",")] if numbers else list(range(there))
    except ValueError:
        raise _unread(asked) from None
    if not there:
        raise UsageError(f"--devices {asked}: torch sees no {kind} device.", hint="Choose cpu or auto.")
    missing = [number for number in chosen if not 0 <= number < there]
    if missing:
        raise UsageError(
            f"--devices {asked}: there is no {kind}:{missing[0]}; torch sees {there}, counted from 0.",
            hint=f"Choose among {', '.join(f'{kind}:{number}' for number in range(there))}.",
        )
    if len({*chosen}) < len(chosen):
        raise UsageError(f"--devices {asked}: names a device twice.", hint="Name each once.")
    return tuple(torch.device(kind, number) for number in chosen)


def _unread(asked: str) -> UsageError:
    return UsageError(f"--devices: {asked!r} is not read.", hint="Write cpu, cuda, cuda:0,1 or auto.")


def _count(kind: str, asked: str) -> int:
    """How many devices of a type torch sees."""
    try:
        module: Any = torch.get_device_module(torch.device(kind))
        return int(module.device_count()) if module.is_available() else 0
    except (RuntimeError, AttributeError):
        hint = "Write cpu, cuda, cuda:0,1 or auto."
        raise UsageError(f"--devices: torch knows no device {asked!r}.", hint=hint) from None


def make_deterministic(devices: Sequence[torch.device]) -> None:
    """Have devices give the same bits each time: before the first operation on them.

    Products in float32 are left in it: TF32 keeps ten bits of a factor's fraction.
    """
    if all(device.type == "cpu" for device in devices):
        return
    os.environ.setdefault(*_DETERMINISTIC_BLAS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def name_of(device: torch.device) -> str:
    """A device for people: its model where torch tells it."""
    module: Any = torch.get_device_module(device)
    tell: Callable[[torch.device], str] | None = getattr(module, "get_device_name", None)
    return str(device) if tell is None else f"{tell(device)}, CUDA {torch.version.cuda}"


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that a device has left, and has in all."""
    free, total = torch.accelerator.get_memory_info(device)
    return free, total


class Lending:
    """Devices that threads borrow, each for so many at a time.

    Attributes:
        devices: What there is.
        home: The first: where is what is not spread over all.
    """

    def __init__(self, devices: Sequence[torch.device] = (CPU,), modelled: int | None = None) -> None:
        """Of devices.

        Args:
            devices: At least one.
            modelled: Bytes that the work is modelled to take of a device, for the message when it does not fit.
        """
        self.devices = tuple(devices)
        self.home = self.devices[0]
        self._modelled = modelled
        self._free = dict.fromkeys(self.devices, AT_ONCE)
        self._wanted = dict.fromkeys(self.devices, 0)
        self._lent = dict.fromkeys(self.devices, 0)
        self._changed = threading.Condition()

    def call(self, function: Callable[[torch.device], Result], what: str, *, home: bool = False) -> Result:
        """What ``function`` makes on a borrowed device, or on the processor.

        Args:
            function: Must be harmless to begin anew.
            what: Is at work, for messages.
            home: Only the first device will do.

        Raises:
            ResourceError: the device's memory does not suffice, nobody else using it.
        """
        if self.devices == (CPU,):
            return function(CPU)
        device = self._take((self.home,) if home else self.devices)
        try:
            return function(device)
        except torch.OutOfMemoryError:
            pass  # who holds the exception holds its frames, and they hold tensors
        finally:
            self._give(device, 1)
        return self._alone(function, device, what)

    def _alone(self, function: Callable[[torch.device], Result], device: torch.device, what: str) -> Result:
        with self._changed:
            self._wanted[device] += 1
            self._changed.wait_for(lambda: self._free[device] == AT_ONCE)
            self._wanted[device] -= 1
            self._free[device] = 0
        try:
            gc.collect()
            torch.accelerator.empty_cache()
            return function(device)
        except torch.OutOfMemoryError as error:
            raise self.out_of_memory(what, device) from error
        finally:
            self._give(device, AT_ONCE)

    def has_room(self, nbytes: int) -> bool:
        """Whether the first device's memory holds so much besides what the work is modelled to take of it."""
        if self.home == CPU:
            return False
        free, _ = free_memory(self.home)
        return nbytes <= free - (free // 2 if self._modelled is None else self._modelled)

    def out_of_memory(self, what: str, device: torch.device | None = None) -> ResourceError:
        """What is said when a device's memory, by default the first one's, does not suffice."""
        device = self.home if device is None else device
        _, total = free_memory(device)
        said = f"{what} does not fit into the memory of {device}: {_mib(total)} in all."
        if self._modelled is None:
            return ResourceError(said, hint="Choose --devices cpu.")
        needed = f"plan models {_mib(self._modelled)} a device for this build"
        return ResourceError(said, hint=f"{needed}: choose a device with more, fewer --tokens, or --devices cpu.")

    def _take(self, devices: Sequence[torch.device]) -> torch.device:
        """The one of some devices that serves the fewest now, and has served the fewest so far; waits for it."""

        def free() -> list[torch.device]:
            return [one for one in devices if self._free[one] and not self._wanted[one]]

        with self._changed:
            self._changed.wait_for(free)
            device = max(free(), key=lambda one: (self._free[one], -self._lent[one]))
            self._free[device] -= 1
            self._lent[device] += 1
            return device

    def _give(self, device: torch.device, places: int) -> None:
        with self._changed:
            self._free[device] += places
            self._changed.notify_all()


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
