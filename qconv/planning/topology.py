"""Whether a tensor-parallel serving topology can hold a build, and which groups would let it."""

from __future__ import annotations

from dataclasses import replace

from qconv.core.architecture import Attention, Linear
from qconv.engines.topology import Part, uneven
from qconv.planning.fitting import GROUP_SIZES, group_sizes
from qconv.planning.plan import BuildPlan


def topology_problems(plan: BuildPlan, ranks: int) -> list[str]:
    """Why a tensor-parallel serving topology of that many ranks cannot hold the build; empty if it can.

    q, k, v, gate and up are split along their output, o and down along their input; a rank must own whole heads, whole
    packed words, and whole groups or blocks. Where there are fewer key-value heads than ranks, each rank owns one.
    """
    model, problems = plan.architecture, []
    if model.num_attention_heads % ranks:
        problems.append(f"{model.num_attention_heads} attention heads do not split over {ranks} ranks")
    if model.num_key_value_heads % ranks and ranks % model.num_key_value_heads:
        problems.append(f"{model.num_key_value_heads} key-value heads neither split over nor repeat on {ranks} ranks")
    owners = min(ranks, model.num_key_value_heads)
    seen: set[str] = set()
    for layer in model.layers:
        mlps, attention = layer.mlps(), layer.attention
        columns = [(linear, ranks) for mlp in mlps for linear in (mlp.gate, mlp.up)]
        if isinstance(attention, Attention):
            columns = [(attention.q, ranks), (attention.k, owners), (attention.v, owners), *columns]
        rows = [attention.linears()[-1], *(mlp.down for mlp in mlps)]
        for linear, parts, size, what in (
            *((one, parts, one.out_features, "output features") for one, parts in columns),
            *((one, ranks, one.in_features, "input features") for one in rows),
        ):
            why = uneven(Part(size, parts, _unit(plan, linear, along_output=what == "output features"), what))
            if why is None:
                continue
            problem = f"{linear.name.rpartition('.')[2]}: {why}"
            if problem not in seen:
                seen.add(problem)
                problems.append(f"{problem} (first in {linear.name})")
    return problems


def topology_group_sizes(plan: BuildPlan, ranks: int) -> list[int]:
    """The group sizes of integers with which that topology can hold the build; empty where none helps."""
    integers = {grid for grid in plan.grids() if not grid.is_float}
    by_grid = [
        group_sizes([one for one in plan.quantized if plan.schemes[one.name].grid == grid], plan.format, grid)
        for grid in integers
    ]
    sizes = [size for size in GROUP_SIZES if by_grid and all(size in fitting for fitting in by_grid)]
    return [size for size in sizes if not topology_problems(_with_group_size(plan, size), ranks)]


def _with_group_size(plan: BuildPlan, size: int) -> BuildPlan:
    """The plan with other groups of integers; its tensors are not made anew."""
    schemes = {
        name: one if one.grid.is_float else replace(one, grid=replace(one.grid, group_size=size))
        for name, one in plan.schemes.items()
    }
    return replace(plan, schemes=schemes)


def _unit(plan: BuildPlan, linear: Linear, *, along_output: bool) -> int:
    """Of how many features a rank's part of a linear is made up."""
    scheme = plan.schemes.get(linear.name)
    if scheme is None:
        return 1
    return max(plan.format.pack_columns, scheme.grid.block_rows) if along_output else max(scheme.grid.group_size, 1)
