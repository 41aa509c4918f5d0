"""CUDA C++ to machine code through NVRTC, which needs neither a CUDA toolkit nor a GPU, nor a driver."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

from qconv.errors import BackendError

OPTIONS = ("-std=c++17", "-default-device")
"""Options of every compilation. Never ``--use_fast_math``: it would flush subnormal scales to zero."""


@dataclass(frozen=True, slots=True)
class Source:
    """One translation unit.

    Attributes:
        name: Its file's name, for messages.
        text: Its text.
        headers: What it may include, by the name that it includes it by.
        defines: Preprocessor macros.
    """

    name: str
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)
    defines: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """Options of this compilation beside the architecture."""
        return (*OPTIONS, *(f"-D{name}={value}" for name, value in self.defines.items()))


def compiler_version() -> str:
    """NVRTC's version, ``13.5``.

    Raises:
        BackendError: NVRTC or its Python bindings are not installed.
    """
    nvrtc = _nvrtc()
    status, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, status)
    return f"{major}.{minor}"


def supported_architectures() -> tuple[int, ...]:
    """Compute capabilities, times ten, that NVRTC makes code for.

    Raises:
        BackendError: NVRTC or its Python bindings are not installed.
    """
    nvrtc = _nvrtc()
    status, architectures = nvrtc.nvrtcGetSupportedArchs()
    _check(nvrtc, status)
    return tuple(sorted(architectures))


def target_architecture(capability: tuple[int, int], supported: tuple[int, ...]) -> int:
    """The architecture to compile for: machine code runs on its own major version and the same or a later minor one.

    Raises:
        BackendError: the compiler is too old for the device.
    """
    major, minor = capability
    fitting = [each for each in supported if each // 10 == major and each % 10 <= minor]
    if not fitting:
        raise BackendError(
            f"NVRTC makes no code for compute capability {major}.{minor}.", hint="Install a newer nvidia-cuda-nvrtc."
        )
    return max(fitting)


def compile_source(source: Source, architecture: int, output: Literal["cubin", "ptx"] = "cubin") -> bytes:
    """Compile one translation unit.

    Args:
        source: What to compile.
        architecture: Compute capability times ten.
        output: Machine code, or the assembly that it is made from.

    Raises:
        BackendError: NVRTC is not installed, or refuses; the message has its log.
    """
    nvrtc = _nvrtc()
    names, texts = list(source.headers), [text.encode() for text in source.headers.values()]
    encoded = [name.encode() for name in names]
    status, program = nvrtc.nvrtcCreateProgram(source.text.encode(), source.name.encode(), len(names), texts, encoded)
    _check(nvrtc, status)
    try:
        target = "sm" if output == "cubin" else "compute"  # the latter ends before machine code, which takes longest
        options = [option.encode() for option in (f"-arch={target}_{architecture}", *source.options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _fetch(nvrtc, program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            raise BackendError(f"{source.name} does not compile for sm_{architecture}:\n{log.decode(errors='replace')}")
        what = "CUBIN" if output == "cubin" else "PTX"
        return _fetch(nvrtc, program, f"nvrtcGet{what}Size", f"nvrtcGet{what}")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _fetch(nvrtc: ModuleType, program: object, size_of: str, get: str) -> bytes:
    status, size = getattr(nvrtc, size_of)(program)
    _check(nvrtc, status)
    # Size includes a text's final zero. The bindings fill the bytes object in place.
    data = bytes(bytearray(size))
    (status,) = getattr(nvrtc, get)(program, data)
    _check(nvrtc, status)
    return data


def _nvrtc() -> ModuleType:
    """The bindings, with the library behind them loaded."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendError(
            f"NVRTC, the compiler of the CUDA kernels, is not usable: {error}", hint="pip install 'qconv[cuda]'"
        ) from error
    return nvrtc


def _check(nvrtc: ModuleType, status: object) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC failed: {status}")
