"""A pretended accelerator: ``load()`` gives torch the devices ``emu:0`` and ``emu:1``, which compute as the CPU does.

What a real device refuses is refused: tensors of two devices in one operation, a generator of the CPU, numpy. Who
follows a device's address on the host dies of a segmentation fault. Fresh memory is NaN; memory is counted and can be
capped; copies, waits and operations are counted. Not pretended: that operations take time, the order of streams,
libraries' workspaces and fragmentation, operations and dtypes that CUDA lacks, CUDA's other last bits.

The system's C++ compiler makes the library at first use; it stays in qconv's cache, named by what it was made of.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qconv import native

NAME = "emu"
_FOLDER = Path(__file__).parent
_SOURCES = ("device.cpp", "memory.h", "registration.h")


@dataclass(frozen=True, slots=True)
class Counters:
    """What one device was asked for.

    Attributes:
        to_device, bytes_to_device: Copies from the host.
        pageable: Those of them that did not come from pinned memory.
        to_host, bytes_to_host: Copies to the host, single numbers included.
        peer, bytes_peer: Copies from other devices.
        waits: How often the host waited for the device.
        launches: Operations, copies within the device included.
    """

    to_device: int
    bytes_to_device: int
    pageable: int
    to_host: int
    bytes_to_host: int
    peer: int
    bytes_peer: int
    waits: int
    launches: int

    def __sub__(self, before: Counters) -> Counters:
        return Counters(*(getattr(self, one.name) - getattr(before, one.name) for one in fields(self)))


class _Module(ModuleType):
    """What ``torch.emu`` is: what torch asks of the module of a device's type."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return int(torch.ops.emu.devices())

    def current_device(self) -> int:
        return torch.accelerator.current_device_index()

    def set_device(self, device: Any) -> None:
        torch.accelerator.set_device_index(device)

    def synchronize(self, device: Any = None) -> None:
        torch.accelerator.synchronize(device)

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing draws from a device's own generator."""


@functools.cache
def load() -> None:
    """Compile the device or find it in the cache, and make it known to torch; skips the test without a compiler."""
    untyped: Any = torch
    untyped.ops.load_library(str(_built()))
    untyped.utils.rename_privateuse1_backend(NAME)
    module = _Module(f"torch.{NAME}")
    untyped._register_device_module(NAME, module)
    untyped.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    sys.modules[f"torch.{NAME}"] = module


def counters(device: int = 0) -> Counters:
    """What the device was asked for since the process began."""
    return Counters(*torch.ops.emu.counters(device))


@contextlib.contextmanager
def capped(device: int, nbytes: int) -> Iterator[None]:
    """Within the context the device has so much memory; more raises ``torch.OutOfMemoryError``."""
    torch.ops.emu.cap(device, nbytes)
    try:
        yield
    finally:
        torch.ops.emu.cap(device, -1)


def peak(device: int = 0) -> int:
    """Bytes that the device held at most since :func:`reset_peak`."""
    return torch.accelerator.max_memory_allocated(device)


def reset_peak(device: int = 0) -> None:
    """Begin to look for the most anew."""
    torch.accelerator.reset_peak_memory_stats(device)


def _built() -> Path:
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX") or next(filter(shutil.which, native.COMPILERS), None)
    if compiler is None:
        pytest.skip("the pretended accelerator needs a C++ compiler")
    libraries = cpp_extension.library_paths()
    flags = [
        *("-std=c++20", "-O1", "-fPIC", "-shared", "-w"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in cpp_extension.include_paths()),
    ]
    links = [flag for path in libraries for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    digest = hashlib.sha256(" ".join([torch.__version__, compiler, *flags]).encode())
    for name in _SOURCES:
        digest.update((_FOLDER / name).read_bytes())
    made = native.cache_folder() / f"emu-{digest.hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            partial = Path(folder) / made.name
            command = [compiler, *flags, str(_FOLDER / _SOURCES[0]), "-o", str(partial), *links]
            command += ["-lc10", "-ltorch_cpu", "-ltorch"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the pretended accelerator does not compile:\n{done.stderr[-4000:]}")
            os.replace(partial, made)
    return made
