"""NVRTC: what it makes, for which devices, and how failures are told. No GPU is needed."""

import sys
from types import ModuleType

import pytest

from qconv.errors import BackendError
from qconv.runtime.backends.cuda.compiler import (
    Source,
    compile_source,
    compiler_version,
    supported_architectures,
    target_architecture,
)

SMALL = Source("small.cu", 'extern "C" __global__ void small(float* p) { *p = FACTOR; }', defines={"FACTOR": "2.5f"})


@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_compiles_to_machine_code(architecture: int) -> None:
    cubin = compile_source(SMALL, architecture)
    assert cubin[:4] == b"\x7fELF"
    assert b"small" in cubin


def test_compiles_to_assembly_with_defines_and_headers() -> None:
    source = Source(
        "a.cu", '#include "b.cuh"\nextern "C" __global__ void k(int* p) { *p = VALUE; }', {"b.cuh": "#define VALUE 77"}
    )
    ptx = compile_source(source, 80, "ptx").decode()
    assert ".entry k" in ptx
    assert ", 77;" in ptx
    assert str(0x40200000) in compile_source(SMALL, 80, "ptx").decode()  # the bits of 2.5


def test_a_refused_source_is_told_with_the_log() -> None:
    with pytest.raises(
        BackendError, match=r'(?s)wrong\.cu does not compile for sm_80.*identifier "nothing" is undefined'
    ):
        compile_source(Source("wrong.cu", "__global__ void k() { nothing; }"), 80)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), 80), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((10, 3), 103), ((12, 1), 120)],
)
def test_the_nearest_architecture_of_the_same_generation(capability: tuple[int, int], expected: int) -> None:
    assert target_architecture(capability, (75, 80, 86, 89, 90, 100, 103, 120)) == expected


def test_a_device_newer_than_the_compiler() -> None:
    with pytest.raises(BackendError, match=r"compute capability 15\.0.*newer nvidia-cuda-nvrtc"):
        target_architecture((15, 0), (80, 90, 100))


def test_all_targets_are_supported_by_the_pinned_compiler() -> None:
    assert {80, 89, 90, 100, 120} <= set(supported_architectures())
    major, minor = compiler_version().split(".")
    assert (int(major), int(minor)) >= (12, 8)  # the first one with sm_100 and sm_120


def test_a_missing_compiler_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(BackendError, match=r"NVRTC.*pip install 'qconv\[cuda\]'"):
        compiler_version()


def test_a_missing_library_behind_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = ModuleType("cuda.bindings.nvrtc")

    def version() -> None:
        raise RuntimeError("libnvrtc.so.13 not found")

    monkeypatch.setattr(bindings, "nvrtcVersion", version, raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", bindings)
    with pytest.raises(BackendError, match=r"libnvrtc\.so\.13 not found"):
        compile_source(SMALL, 80)
