"""The launcher's calls of the CUDA driver, against a driver that writes down what it is told."""

import ctypes
from contextlib import nullcontext
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qconv.errors import BackendError
from qconv.runtime.backends import cuda
from qconv.runtime.backends.cuda.compiler import Source
from qconv.runtime.backends.cuda.driver import DriverLauncher, load_driver
from qconv.runtime.backends.cuda.launch import Launch
from qconv.runtime.backends.reference import ReferenceBackend

SOURCE = Source("k.cu", "text")
OUTPUT = torch.zeros(4)


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_IMAGE = 200


class FakeDriver(ModuleType):
    """Answers as cuda.bindings.driver does, and reads arguments from where a real driver would."""

    CUresult = CUresult
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self, fails: str = "") -> None:
        super().__init__("driver")
        self.calls: list[tuple[object, ...]] = []
        self.fails = fails

    def _result(self, name: str, *rest: object) -> tuple[object, ...]:
        status = CUresult.CUDA_ERROR_INVALID_IMAGE if name == self.fails else CUresult.CUDA_SUCCESS
        return status, *rest

    def cuModuleLoadData(self, image: bytes) -> tuple[object, ...]:
        self.calls.append(("load", image))
        return self._result("cuModuleLoadData", f"module of {image.decode()}")

    def cuModuleGetFunction(self, module: object, name: bytes) -> tuple[object, ...]:
        self.calls.append(("function", module, name))
        return self._result("cuModuleGetFunction", f"{name.decode()} in {module}")

    def cuFuncSetAttribute(self, function: object, attribute: object, value: int) -> tuple[object, ...]:
        self.calls.append(("attribute", function, attribute, value))
        return self._result("cuFuncSetAttribute")

    def cuLaunchKernel(self, function: object, *rest: int) -> tuple[object, ...]:
        *geometry, parameters, extra = rest
        pointer = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        assert pointer is not None
        self.calls.append(("launch", function, tuple(geometry), ctypes.string_at(pointer, 5), extra))
        return self._result("cuLaunchKernel")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """torch as it is where there is an H100."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1234))
    return torch.device("cuda", 0)


def cubin(source: Source, architecture: int) -> bytes:
    return f"{source.name} for {architecture}".encode()


def launch(**changes: object) -> Launch:
    values: dict[str, object] = {
        "source": SOURCE,
        "kernel": "kernel",
        "grid": (2, 3, 4),
        "threads": 128,
        "shared_bytes": 50000,
        "arguments": b"12345",
        "inputs": {},
        "output": OUTPUT,
    }
    return Launch(**{**values, **changes})  # type: ignore[arg-type]  # fields by name


def test_tells_the_driver_everything_once(device: torch.device) -> None:
    driver = FakeDriver()
    launcher = DriverLauncher(device, driver, cubin)
    assert launcher.multiprocessors == 132
    launcher.launch(launch())
    launcher.launch(launch(arguments=b"67890", grid=(1, 1, 1)))
    function = "kernel in module of k.cu for 90"
    assert driver.calls == [
        ("load", b"k.cu for 90"),
        ("function", "module of k.cu for 90", b"kernel"),
        ("attribute", function, "shared", 50000),
        ("launch", function, (2, 3, 4, 128, 1, 1, 50000, 1234), b"12345", 0),
        ("launch", function, (1, 1, 1, 128, 1, 1, 50000, 1234), b"67890", 0),
    ]


def test_loading_beforehand_spares_the_launch_the_work(device: torch.device) -> None:
    driver = FakeDriver()
    launcher = DriverLauncher(device, driver, cubin)
    launcher.load(SOURCE)
    launcher.load(SOURCE)
    assert driver.calls == [("load", b"k.cu for 90")]


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"])
def test_failures_name_the_call(device: torch.device, call: str) -> None:
    launcher = DriverLauncher(device, FakeDriver(fails=call), cubin)
    with pytest.raises(BackendError, match=f"{call} failed.*200"):
        launcher.launch(launch())


def test_no_driver_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(BackendError, match=r"libcuda\.so\.1 is not on this machine"):
        load_driver()


def test_without_a_driver_the_backend_is_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.warns(UserWarning, match="libcuda") as caught:
        backend = cuda.create(torch.device("cuda", 0))
    assert isinstance(backend, ReferenceBackend)
    assert len(caught) == 1
