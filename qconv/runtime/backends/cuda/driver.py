"""Launches on a real device, through the CUDA driver's bindings, on torch's current stream."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from qconv.errors import BackendError
from qconv.runtime.backends.cuda.cache import cached_cubin
from qconv.runtime.backends.cuda.compiler import Source, supported_architectures, target_architecture
from qconv.runtime.backends.cuda.launch import Launch


def load_driver() -> ModuleType:
    """The driver's bindings.

    Raises:
        BackendError: they or the driver itself are not installed.
    """
    # Looked for before the bindings are touched: without a driver some of their calls hang instead of failing.
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError("libcuda.so.1 is not on this machine.", hint="Install NVIDIA's driver.") from error
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise BackendError(f"the CUDA driver's bindings: {error}", hint="pip install 'qconv[cuda]'") from error


class DriverLauncher:
    """Compiles at first use, keeps what is loaded, and launches.

    torch owns the device's primary context; by the time that a launch has tensors on the device, it exists.
    """

    def __init__(
        self, device: torch.device, driver: ModuleType, cubin: Callable[[Source, int], bytes] = cached_cubin
    ) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.multiprocessors: int = properties.multi_processor_count
        self.architecture = target_architecture((properties.major, properties.minor), supported_architectures())
        self._driver = driver
        self._cubin = cubin
        self._modules: dict[int, object] = {}
        self._sources: list[Source] = []
        self._functions: dict[tuple[int, str, int], object] = {}

    def load(self, source: Source) -> None:
        """Compile a translation unit, or find it in the cache, and load it onto the device.

        Raises:
            BackendError: it cannot be compiled or loaded.
        """
        with torch.cuda.device(self.device):
            self._module(source)

    def launch(self, launch: Launch) -> None:
        """Queue one launch on torch's current stream of the device.

        Raises:
            BackendError: it cannot be compiled, loaded or launched.
        """
        with torch.cuda.device(self.device):
            function = self._function(launch)
            stream = torch.cuda.current_stream(self.device).cuda_stream
            # The driver takes pointers to parameters and copies what they point to; the kernels have one, a struct.
            block = ctypes.create_string_buffer(launch.arguments, len(launch.arguments))
            parameters = (ctypes.c_void_p * 1)(ctypes.addressof(block))
            self._call(
                "cuLaunchKernel",
                function,
                *launch.grid,
                launch.threads,
                1,
                1,
                launch.shared_bytes,
                stream,
                ctypes.addressof(parameters),
                0,
            )

    def _function(self, launch: Launch) -> object:
        key = (id(launch.source), launch.kernel, launch.shared_bytes)
        if key not in self._functions:
            function = self._call("cuModuleGetFunction", self._module(launch.source), launch.kernel.encode())
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, attribute, launch.shared_bytes)
            self._functions[key] = function
        return self._functions[key]

    def _module(self, source: Source) -> object:
        if id(source) not in self._modules:
            self._sources.append(source)  # keeps its id its own
            self._modules[id(source)] = self._call("cuModuleLoadData", self._cubin(source, self.architecture))
        return self._modules[id(source)]

    def _call(self, name: str, *arguments: object) -> object:
        status, *results = getattr(self._driver, name)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"{name} failed: {status}")
        return results[0] if results else None
