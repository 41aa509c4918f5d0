"""The pretended accelerator: what it computes, what it refuses, what it counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests import accelerator

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def device() -> None:
    accelerator.load()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_operations_give_the_cpu_s_bits() -> None:
    """Products, factors, reductions, in-place operations on views, out= and indices are those of the CPU."""

    def computed(x: torch.Tensor) -> list[torch.Tensor]:
        moments = x.t() @ x
        moments.diagonal().add_(0.5)
        lower, _ = torch.linalg.cholesky_ex(moments)
        x = x.clone()
        x[::2, 1:].mul_(3.0).clamp_(-1.0, 1.0)
        out = x.new_empty(x.shape[1])
        torch.amax(x, 0, out=out)
        picked = x.index_select(1, torch.argsort(out, stable=True))
        masked = torch.where(x > 0.1, x, x.new_zeros(()))
        heads = x[:32].view(1, 2, 16, -1)
        attended = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return [moments, lower, x, out, picked, masked, attended, x.bfloat16(), x.sum(dtype=torch.float64)]

    x = drawn(64, 24)
    for ours, theirs in zip(computed(x.to("emu:1")), computed(x), strict=True):
        assert ours.device == torch.device("emu", 1)
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x.to("emu:0") + x.to("emu:1"),
        lambda x: x.to("emu:0") @ x,
        lambda x: torch.cat([x.to("emu:0"), x]),
        lambda x: x.to("emu:0").copy_(x).add_(x),
        lambda x: x.to("emu:0").index_select(0, torch.arange(2)),
        lambda x: torch.addmm(x.to("emu:0"), x, x.to("emu:0")),
    ],
)
def test_tensors_of_two_devices_are_refused(mixed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match="found at least two devices"):
        mixed(drawn(4, 4))


def test_what_cuda_allows_of_the_cpu_is_allowed() -> None:
    """A tensor without dimensions, and indices in brackets."""
    x = drawn(4, 4)
    there = x.to("emu:0")
    assert torch.equal((there * torch.tensor(2.0)).cpu(), x * 2.0)
    assert torch.equal(there[torch.tensor([2, 0])].cpu(), x[[2, 0]])


def test_a_generator_of_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator().manual_seed(0), device="emu:0")


def test_numpy_is_refused() -> None:
    with pytest.raises(TypeError, match="can't convert"):
        drawn(3).to("emu:0").numpy()


def test_fresh_memory_is_nan() -> None:
    assert bool(torch.empty(300, device="emu:0").isnan().all())


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="no emu:5"):
        torch.empty(3, device="emu:5")


def test_memory_is_counted_and_capped() -> None:
    before = torch.accelerator.memory_allocated(0)
    x = torch.empty(1000, device="emu:0")  # 4000 bytes are eight granules of 512
    assert torch.accelerator.memory_allocated(0) - before == 4096
    with accelerator.capped(0, before + 4096), pytest.raises(torch.OutOfMemoryError, match="emu:0"):
        torch.empty(1, device="emu:0")
    del x
    assert torch.accelerator.memory_allocated(0) == before


def test_views_hold_no_memory() -> None:
    x = torch.zeros(64, 64, device="emu:0")
    before = torch.accelerator.memory_allocated(0)
    views = [x[1:], x.t(), x.view(-1), x[:, ::2]]
    x.add_(1.0)
    assert torch.accelerator.memory_allocated(0) == before
    assert all(bool((view == 1.0).all()) for view in views)


def test_copies_waits_and_launches_are_counted() -> None:
    x, before = drawn(8, 8), accelerator.counters(1)
    there = x.to("emu:1")
    (there @ there).sum().item()
    there.to("emu:0").to("emu:1")
    found = accelerator.counters(1) - before
    assert (found.to_device, found.bytes_to_device, found.pageable) == (1, 256, 1)
    assert (found.to_host, found.bytes_to_host) == (1, 4)
    assert (found.peer, found.bytes_peer) == (1, 256)
    assert found.waits == 2  # the pageable copy, and the number
    assert found.launches == 3  # product, sum, the copy from emu:0


def test_what_is_on_its_way_is_not_there_yet() -> None:
    """A copy to pinned memory that does not block brings nothing before the device was waited for."""
    there = drawn(64).to("emu:0")
    here = torch.zeros(64, pin_memory=True)
    here.copy_(there, non_blocking=True)
    assert bool(here.isnan().all())
    torch.accelerator.synchronize(0)
    assert torch.equal(here, there.cpu())


def test_pinned_memory_must_not_change_while_it_is_copied() -> None:
    here = torch.zeros(64, pin_memory=True)
    here.to("emu:0", non_blocking=True)
    here.add_(1.0)
    with pytest.raises(RuntimeError, match="changed while"):
        torch.accelerator.synchronize(0)


def test_following_an_address_on_the_host_is_fatal() -> None:
    """As a C function would that takes ``data_ptr()`` for the host's: the process dies, by signal."""
    program = (
        "import ctypes, torch\n"
        "from tests import accelerator\n"
        "accelerator.load()\n"
        "address = torch.ones(4, device='emu:0').data_ptr()\n"
        "print('reading', flush=True)\n"
        "ctypes.string_at(address, 4)\n"
        "print('survived')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout == "reading\n", done.stderr
    assert done.returncode < 0
