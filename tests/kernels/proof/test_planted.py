"""Mistakes inside inline assembly, which the emulator cannot see: the interpreted PTX differs from it or is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from kernels.proof.launcher import PtxLauncher
from kernels.proof.ptx import PtxError
from qconv.runtime.backends.cuda import products
from qconv.runtime.backends.cuda.compiler import Source
from qconv.runtime.backends.cuda.products import Rows, multiply
from qconv.runtime.backends.cuda.sources import source_of
from tests.kernels.launchers import EmulatorLauncher
from tests.kernels.products import case

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++"),
]

NUMBERS: dict[str, tuple[str, str]] = {
    "halves of a pack swapped": ("cvt.rn.f16x2.f32 %0, %1, %2;", "cvt.rn.f16x2.f32 %0, %2, %1;"),
    "words of a permutation swapped": ("prmt.b32 %0, %1, %2, %3;", "prmt.b32 %0, %2, %1, %3;"),
    "another truth table": ("lop3.b32 %0, %1, %2, %3, 0xEA;", "lop3.b32 %0, %1, %2, %3, 0xE8;"),
    "registers of the left matrix swapped": ("{%4,%5,%6,%7}", "{%4,%6,%5,%7}"),
    "registers of the right matrix swapped": ("{%8,%9}", "{%9,%8}"),
    "a product without its sum": ("fma.rn.f32 %0, %1, %2, %3;", "fma.rn.f32 %0, %1, %2, %2;"),
    "parts of a store swapped": (
        "st.global.v4.b32 [%0], {%1,%2,%3,%4};",
        "st.global.v4.b32 [%0], {%2,%1,%3,%4};",
    ),
}
ELSEWHERE = {
    "another rotation": ("shf.r.wrap.b32 %0, %1, %1, %2;", "shf.l.wrap.b32 %0, %1, %1, %2;", 80, "BF16"),
    "sums of a pair swapped": ("mov.b64 {%0, %1}, %2;", "mov.b64 {%1, %0}, %2;", 100, "F16"),
    "factors of a pair swapped": ("fma.rn.f32x2 %0, %1, %2, %3;", "fma.rn.f32x2 %0, %3, %2, %1;", 100, "F16"),
}
"""What only bfloat16 activations or newer architectures run."""
REFUSED = {
    "a copy not waited for": ('"n"(PENDING)', '"n"(PENDING + 1)', "still being copied"),
    "copies never committed": ("cp.async.commit_group;", "", "still being copied"),
    "a wider load": ("ld.shared.b32 %0, [%1];", "ld.shared.b32 %0, [%1+2];", "misaligned"),
}


def mutated(old: str, new: str, act: str = "F16") -> Source:
    """One of the AWQ kernels with one change in intrinsics.cuh."""
    source = replace(source_of("awq"), text=f'#include "int4.cuh"\nQC_GEMM(Awq, awq, 1, 8, {act}, {act.lower()})\n')
    text = source.headers["intrinsics.cuh"]
    assert old in text
    return replace(source, headers={**source.headers, "intrinsics.cuh": text.replace(old, new)})


def product(launcher: PtxLauncher | EmulatorLauncher, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    weight = case("awq", 160, 352, 32)
    inputs = torch.randint(-8, 9, (7, 352), generator=torch.Generator().manual_seed(0)).to(dtype)
    return multiply(launcher, weight.packed, inputs, Rows(7, 1, 8))


@pytest.mark.parametrize("mistake", NUMBERS)
def test_wrong_numbers_differ_from_the_emulator(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = product(EmulatorLauncher(1))
    source = mutated(*NUMBERS[mistake])
    monkeypatch.setattr(products, "source_of", lambda layout: source)
    assert not torch.equal(product(PtxLauncher(80, 1)), right)


@pytest.mark.parametrize("mistake", ELSEWHERE)
def test_wrong_numbers_of_other_builds_differ_from_the_emulator(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, architecture, act = ELSEWHERE[mistake]
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[act]
    right = product(EmulatorLauncher(1), dtype)
    for replaced, same in ((old, True), (new, False)):
        source = mutated(old, replaced, act)
        monkeypatch.setattr(products, "source_of", lambda layout, source=source: source)
        assert torch.equal(product(PtxLauncher(architecture, 1), dtype), right) == same


@pytest.mark.parametrize("mistake", REFUSED)
def test_undefined_programs_are_refused(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, message = REFUSED[mistake]
    source = mutated(old, new)
    monkeypatch.setattr(products, "source_of", lambda layout: source)
    with pytest.raises(PtxError, match=message):
        product(PtxLauncher(80, 1))
