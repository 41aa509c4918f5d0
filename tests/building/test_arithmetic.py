"""The digest of what a process computes with: the same for any number of threads, another for another arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from qconv.building import arithmetic
from tests.conftest import REPOSITORY


def digest_with(**environment: str) -> str:
    """The digest of a process of its own."""
    command = [sys.executable, "-c", "from qconv.building import arithmetic; print(arithmetic.digest())"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_threads_make_no_difference_and_are_as_before() -> None:
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.add(arithmetic.digest())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    assert len(found.pop()) == 16


def test_another_process_computes_the_same_and_compiled_rounding_too() -> None:
    assert digest_with(OMP_NUM_THREADS="3", QCONV_NATIVE="0") == arithmetic.digest()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this processor has no other kernels")
def test_other_kernels_of_the_same_torch_are_told_apart() -> None:
    # What torch does on a processor without AVX2: the same version, other sums and exponentials.
    assert digest_with(ATEN_CPU_CAPABILITY="default") != arithmetic.digest()


def test_every_operation_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = arithmetic.digest()
    for name in ("softmax", "exp", "sum", "bfloat16"):
        with monkeypatch.context() as patch:
            real = getattr(torch.Tensor, name)
            # One unit in the last place of one element.
            patch.setattr(torch.Tensor, name, lambda *given, real=real: _nudged(real(*given)))
            assert arithmetic.digest() != kept, name
    assert arithmetic.digest() == kept


def test_it_is_quick() -> None:
    arithmetic.digest()
    started = time.process_time()
    arithmetic.digest()
    assert time.process_time() - started < 0.3  # of processor time; a resume waits for it


def test_the_processor_has_a_name() -> None:
    assert torch.backends.cpu.get_cpu_capability() in arithmetic.processor()


def _nudged(result: torch.Tensor) -> torch.Tensor:
    result = result.clone()
    first = result.view(-1)[:1]
    first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
    return result
