"""The products that are checked and timed; the tests run the same functions without a GPU, on the PTX interpreter."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qconv.runtime.backends.cuda.products import Rows, multiply, row_tile
from qconv.runtime.backends.cuda.routing import route
from qconv.runtime.backends.cuda.weights import placed, tensors
from qconv.runtime.kernel_interface import KernelWeight, entry_name
from tests.gpu.bench import Correctness, Machine, Peaks, Timing, nbytes, rotated
from tests.kernels.products import case

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place: the relative error of the output's one rounding is below it."""


def check_dense(machine: Machine, layout: str, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> Correctness:
    """One weight times random tokens, against float64."""
    weight = case(layout, *shape, 128)
    inputs = _tokens(rows, shape[1], dtype).to(machine.device)
    output = multiply(machine.launcher, placed(weight.packed, machine.device), inputs, Rows(rows, 1, row_tile(rows)))
    exact = inputs.double() @ weight.exact[0].to(machine.device).t()
    kernel = entry_name(layout, row_tile(rows), dtype)
    return Correctness(kernel, f"{shape[0]} x {shape[1]}, {rows} rows", _error(output, exact), ROUNDING[dtype])


def check_codes(machine: Machine, layout: str, shape: tuple[int, int], tile: int, dtype: torch.dtype) -> Correctness:
    """One weight times the unit matrix: the output is the dequantized weight, rounded once, bit for bit."""
    weight, depth = case(layout, *shape, 128), shape[1]
    inputs = torch.eye(depth, dtype=dtype, device=machine.device)
    output = multiply(machine.launcher, placed(weight.packed, machine.device), inputs, Rows(depth, 1, tile))
    rounded = weight.exact[0].to(machine.device, dtype).t().double()
    kernel = entry_name(layout, tile, dtype)
    return Correctness(kernel, f"codes of {shape[0]} x {depth}", _error(output, rounded), 0.0)


def check_experts(
    machine: Machine, layout: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype
) -> Correctness:
    """Five experts of which one gets no token and one gets most, two for each token."""
    weight = case(layout, *shape, 128, experts=5)
    generator = torch.Generator().manual_seed(tokens)
    second = torch.tensor([0, 1, 4])[torch.randint(0, 3, (tokens,), generator=generator)]
    chosen = torch.stack([torch.full((tokens,), 2), second], 1)  # expert 3 gets none
    inputs = _tokens(tokens, shape[1], dtype).to(machine.device)
    rows = route(chosen.to(machine.device), 5)
    output = multiply(machine.launcher, placed(weight.packed, machine.device), inputs, rows)
    exact = torch.stack(
        [
            inputs[token].double() @ weight.exact[expert].to(machine.device).t()
            for token in range(tokens)
            for expert in chosen[token]
        ]
    )
    kernel = entry_name(layout, rows.tile, dtype)
    return Correctness(
        kernel, f"5 experts of {shape[0]} x {shape[1]}, {tokens} tokens", _error(output, exact), ROUNDING[dtype]
    )


def time_dense(machine: Machine, peaks: Peaks, layout: str, shape: tuple[int, int], rows: int, cache: int) -> Timing:
    """One weight of that shape, read from memory and not from caches of ``cache`` bytes."""
    columns, depth = shape
    weight = placed(case(layout, *shape, 128).packed, machine.device)
    copies = _copies(weight, copies_of(nbytes(list(tensors(weight).values())), cache))
    inputs = _tokens(rows, depth, torch.bfloat16).to(machine.device)
    plan = Rows(rows, 1, row_tile(rows))
    ours = rotated(machine, [partial(multiply, machine.launcher, each, inputs, plan) for each in copies])
    dense = torch.empty(
        copies_of(2 * columns * depth, cache), columns, depth, dtype=torch.bfloat16, device=machine.device
    ).normal_()
    bf16 = rotated(machine, [partial(torch.nn.functional.linear, inputs, each) for each in dense])
    moved = nbytes([*tensors(weight).values(), inputs]) + 2 * rows * columns
    least = peaks.seconds(moved, 2.0 * rows * columns * depth)
    return Timing(layout, f"{columns} x {depth}", rows, 1e6 * ours, 1e6 * least, 1e6 * bf16)


def time_experts(
    machine: Machine,
    peaks: Peaks,
    layout: str,
    shape: tuple[int, int],
    experts: int,
    top_k: int,
    tokens: int,
    cache: int,
) -> Timing:
    """One of the two products of a sparse block, with tokens that choose experts at random.

    So few experts as a token chooses may fit a cache: others are chosen each time.
    """
    columns, depth = shape
    one = case(layout, *shape, 128).packed
    values = {
        name: tensor.to(machine.device).repeat(experts, *[1] * (tensor.ndim - 1))
        for name, tensor in tensors(one).items()
    }
    weight = replace(
        one,
        weights=values["weights"],
        scales=values["scales"],
        offsets=values.get("offsets"),
        weights_high=values.get("weights_high"),
    )
    generator = torch.Generator().manual_seed(tokens)
    expert_bytes = nbytes(list(tensors(weight).values())) // experts
    choices = [
        torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        for _ in range(copies_of(expert_bytes * min(experts, tokens * top_k), cache))
    ]
    inputs = _tokens(tokens, depth, torch.bfloat16).to(machine.device)
    plans = [route(chosen.to(machine.device), experts) for chosen in choices]
    seconds = rotated(machine, [partial(multiply, machine.launcher, weight, inputs, each) for each in plans])
    hit = sum(len(set(chosen.flatten().tolist())) for chosen in choices) / len(choices)
    moved = round(expert_bytes * hit) + inputs.nbytes + 2 * tokens * top_k * columns
    least = peaks.seconds(moved, 2.0 * tokens * top_k * columns * depth)
    return Timing(
        layout, f"{hit:.1f} of {experts} experts of {columns} x {depth}", tokens, 1e6 * seconds, 1e6 * least, None
    )


def copies_of(size: int, cache: int) -> int:
    """How many pieces of ``size`` bytes to take in turn, so that a cache of ``cache`` bytes keeps next to nothing.

    Sixteen times the cache: it may keep a sixteenth of them even if it does not forget the oldest first.
    """
    return max(1, -(-16 * cache // size))


def _tokens(rows: int, depth: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, depth, generator=torch.Generator().manual_seed(rows)).to(dtype)


def _error(output: Tensor, exact: Tensor) -> float:
    return float((output.double() - exact).norm() / exact.norm())


def _copies(weight: KernelWeight, count: int) -> list[KernelWeight]:
    """The weight in memory of its own, so many times: all of it, or what is shared would come from a cache."""
    clones = [{name: tensor.clone() for name, tensor in tensors(weight).items()} for _ in range(count - 1)]
    return [weight, *(replace(weight, **each) for each in clones)]  # type: ignore[arg-type]  # fields by name
