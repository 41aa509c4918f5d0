"""What this process computes with, as far as bytes depend on it: found out by computing.

The same torch takes other kernels on another processor (AVX2, AVX-512), or by other environment variables of its
libraries, and adds up in another order. What is calibrated then differs in its last bits, and a run that is continued
there would mix both. Names do not tell: so a fixed set of operations, those of which calibration is made, is run on
fixed numbers, and what comes out is hashed. Equal digests do not prove equal arithmetic for every shape; other digests
disprove it.

Rounding without calibration needs no such digest: it is elementwise, or adds up in an order of its own, in torch and in
C++ alike (``tests/core/test_integer_grid.py``, ``tests/ggml``).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from qconv.core.devices import CPU
from qconv.core.qtensor import Grid
from qconv.core.settings import ClipSettings
from qconv.executors.threads import single_threaded_operations
from qconv.grids import integers

SHAPES = ((5, 96, 48), (64, 512, 192), (129, 1536, 64), (260, 384, 320))
"""Tokens, inputs and outputs of the products: libraries choose kernels by size. Inputs are multiples of 32."""
_GROUP = 32
_SEED = 20


def digest(device: torch.device = CPU) -> str:
    """What a device's arithmetic comes to, 16 hexadecimal digits; of the processor the same for any number of threads.

    The same numbers go through the same operations everywhere.
    """
    found = hashlib.sha256()
    with torch.no_grad(), single_threaded_operations():
        for result in _results(device):
            found.update(result.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def processor() -> str:
    """The processor for people: its model, and the vectors that torch uses on it."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = " ".join(value.split())
            break
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _results(device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(_SEED)

    def numbers(*shape: int) -> Tensor:
        # Integers are drawn alike everywhere, and fill a float32's 24 bits: no product of two of them is exact.
        drawn = torch.randint(-(2**24) + 1, 2**24, shape, generator=generator, device=CPU)
        return (drawn.float() * 2.0**-23).to(device)

    for tokens, inputs, outputs in SHAPES:
        yield from _layer(numbers(tokens, inputs), numbers(outputs, inputs))
    heads = numbers(2, 4, 40, 64)
    yield functional.scaled_dot_product_attention(heads, heads[:, :2], heads[:, 2:], is_causal=True, enable_gqa=True)
    yield from _rounded(numbers(32, 256))


def _layer(x: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """What calibration does with inputs [tokens, inputs] and a weight [outputs, inputs]."""
    outputs, inputs = weight.shape
    yield functional.linear(x, weight)
    yield x[:1] @ weight.t()
    # Second moments and their factor, as of GPTQ and of AWQ's groups.
    moments = torch.zeros(outputs, outputs, device=x.device).addmm_(weight, weight.t(), alpha=1.0 / inputs)
    moments.diagonal().add_(0.1)
    lower = torch.linalg.cholesky_ex(moments)[0]
    yield lower
    yield torch.linalg.solve_triangular(lower, weight, upper=False)
    groups = x.view(len(x), -1, _GROUP).transpose(0, 1)
    yield torch.zeros(len(groups), _GROUP, _GROUP, device=x.device).baddbmm_(
        groups.transpose(1, 2), groups, alpha=1.0 / len(x)
    )
    # Norms, router, activation, rotary embedding.
    yield x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    yield x.softmax(-1)
    yield from (functional.silu(x), x.sigmoid(), x.cos(), x.sin(), x.exp())
    # Statistics and scale searches.
    yield from (x.sum(0), x.abs().mean(0), x.square().sum(-1), x.double().square_().sum(0), torch.linalg.vector_norm(x))
    yield from (x.abs() ** 0.35, x / weight[:1], x.bfloat16(), (x @ weight.t()).bfloat16())


def _rounded(weight: Tensor) -> Iterator[Tensor]:
    """A weight on a grid of four bits, clipping searched; compiled where there is a compiler."""
    grid = Grid(bits=4, group_size=_GROUP, symmetric=False, scale_dtype=torch.float16)
    made = integers.quantize(weight, grid, ClipSettings())
    yield made.codes
    yield made.scales
