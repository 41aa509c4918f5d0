"""The small kernels of ``helpers.cu`` on the emulator."""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.runtime.kernel_interface import ACTIVATIONS, GatherArgs, SumSlicesArgs, gather_grid, sum_grid
from tests.kernels.emulator import SCHEDULES, Schedule, emulator
from tests.kernels.products import Result, activations, route


def run_sum(
    slices: int, elements: int, dtype: torch.dtype, *, schedule: Schedule = SCHEDULES[0], bug: str = ""
) -> Result:
    """Random partial sums; the reference is their float64 sum."""
    partials = torch.randn(slices, elements, generator=torch.Generator().manual_seed(0))
    output = torch.full((elements,), float("nan"), dtype=dtype)
    args = SumSlicesArgs(partials=partials.data_ptr(), output=output.data_ptr(), elements=elements, slices=slices)
    report = emulator("helpers").launch(
        f"qconv_sum_slices_{ACTIVATIONS[dtype]}",
        sum_grid(elements),
        args,
        {"partials": partials},
        {"output": output},
        schedule=schedule,
        bug=bug,
    )
    return Result(output, partials.double().sum(0), report)


def run_gather(
    experts: Tensor | None, depth: int, *, schedule: Schedule = SCHEDULES[0], bug: str = "", row_tile: int = 8
) -> Result:
    """Five rows in orders of their experts' own, or in one order."""
    generator = torch.Generator().manual_seed(0)
    count = 1 if experts is None else int(experts.max()) + 1
    orders = torch.stack([torch.randperm(depth, generator=generator) for _ in range(count)]).to(torch.int32)
    tokens = activations(5, depth, torch.float16)
    output = torch.full_like(tokens, float("nan"))
    routing = None if experts is None else route(experts, row_tile)
    args = GatherArgs(
        activations=tokens.data_ptr(),
        gather=orders.data_ptr(),
        output=output.data_ptr(),
        row_ids=None if routing is None else routing.row_ids.data_ptr(),
        tile_experts=None if routing is None else routing.tile_experts.data_ptr(),
        rows=5,
        depth=depth,
        rows_per_input=1,
        row_tile=1 if routing is None else row_tile,
    )
    tiles = 5 if routing is None else len(routing.tile_experts)
    inputs = {"activations": tokens, "gather": orders}
    if routing is not None:
        inputs |= {"row_ids": routing.row_ids, "tile_experts": routing.tile_experts}
    report = emulator("helpers").launch(
        "qconv_gather_columns", gather_grid(depth, tiles), args, inputs, {"output": output}, schedule=schedule, bug=bug
    )
    order = orders[torch.zeros(5, dtype=torch.long) if experts is None else experts].long()
    return Result(output, tokens.double().gather(1, order), report)
