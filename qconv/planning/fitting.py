"""Whether a recipe and a format fit a model, and what would: checked before anything is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from qconv.core.architecture import Architecture, Linear
from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats.base import Format
from qconv.planning.schemes import LinearScheme, fused

GROUP_SIZES = (128, 64, 32, CHANNEL)
"""What is proposed instead of a group size that does not fit."""

_LAYER = re.compile(r"^.*?\blayers\.\d+\.")
_LAST_ROWS = ("kv_a_proj_with_mqa",)
"""Linears whose rows are the last of the matrix that engines hold them in, so that a block of theirs may be cut short:
DeepSeek's own FP8 releases have 576 rows there."""


def check_shapes(architecture: Architecture, schemes: Mapping[str, LinearScheme], output_format: Format) -> None:
    """Every linear that is quantized can be stored, and be read by an engine.

    Raises:
        RecipeError: one does not fit; says what would.
    """
    for linear in _quantized(architecture, schemes):
        grid = schemes[linear.name].grid
        problem = output_format.check(linear.out_features, linear.in_features, grid)
        if problem is not None:
            key = "grid.group_size" if "group size" in problem else "format"
            raise RecipeError(
                f"{key}: {linear.name} does not fit format {output_format.name}: {problem}.",
                hint=_remedy(architecture, schemes, output_format, grid),
            )
    _check_blocks(architecture, schemes)


def _quantized(architecture: Architecture, schemes: Mapping[str, LinearScheme]) -> list[Linear]:
    return [one for layer in architecture.layers for one in layer.linears() if one.name in schemes]


def group_sizes(linears: Sequence[Linear], output_format: Format, grid: Grid) -> list[int]:
    """Of :data:`GROUP_SIZES` those with which the format holds all of the linears, on an integer grid."""
    fitting = []
    for size in GROUP_SIZES if not grid.is_float else ():
        settings = GridSettings(bits=grid.bits, group_size=size, symmetric=grid.symmetric)
        try:
            tried = output_format.grid(settings, grid.scale_dtype, grid.number)
        except RecipeError:
            continue
        if all(output_format.check(one.out_features, one.in_features, tried) is None for one in linears):
            fitting.append(size)
    return fitting


def shown_sizes(sizes: Sequence[int]) -> str:
    """Group sizes in words."""
    return ", ".join("-1 (one scale a row)" if size == CHANNEL else str(size) for size in sizes)


def _remedy(architecture: Architecture, schemes: Mapping[str, LinearScheme], output_format: Format, grid: Grid) -> str:
    """What fits instead: other group sizes, and patterns that skip what does not."""
    linears = [one for one in _quantized(architecture, schemes) if schemes[one.name].grid == grid]
    sizes = group_sizes(linears, output_format, grid)
    misfits = {one.name for one in linears if output_format.check(one.out_features, one.in_features, grid) is not None}
    remedies = [f"Group sizes that fit every linear: {shown_sizes(sizes)}"] if sizes else []
    patterns = skip_patterns(architecture, misfits)
    if patterns is not None:
        remedies.append(f"Leave alone what does not fit: {patterns}")
    return "; or ".join(remedies) if remedies else "Take another format."


def _check_blocks(architecture: Architecture, schemes: Mapping[str, LinearScheme]) -> None:
    """Blocks of FP8 that engines can read.

    Engines hold q, k, v and gate, up as one matrix, whose scales they place by whole blocks of rows: vLLM 0.32 loads
    rows that no block divides and computes with others' scales (run: perplexity +27 %), and refuses them in experts
    (read). They quantize inputs in whole groups (vLLM 0.32 asserts it, read; transformers 5.23 refuses, run).
    """
    misfits: dict[str, tuple[Grid, str]] = {}
    for layer in architecture.layers:
        fused_ones = {one.name for _, linears in fused(layer) for one in linears}
        # down of an expert stands alone: its rows are no part of another matrix.
        fused_ones -= {mlp.down.name for mlp in layer.mlps()}
        fused_ones -= {f"{layer.attention.name}.{leaf}" for leaf in _LAST_ROWS}
        for one in layer.linears():
            grid = schemes[one.name].grid if one.name in schemes else None
            if grid is None or not grid.is_float or CHANNEL in (grid.block_rows, grid.group_size):
                continue
            if one.name in fused_ones and one.out_features % grid.block_rows:
                misfits[one.name] = grid, f"its {one.out_features} rows"
            elif one.in_features % grid.group_size:
                misfits[one.name] = grid, f"its {one.in_features} inputs"
    if not misfits:
        return
    first, (grid, what) = next(iter(misfits.items()))
    patterns = skip_patterns(architecture, misfits)
    other = "Take --fmt fp8-dynamic or fp8-channel in a rule, one scale a row, which holds every shape"
    raise RecipeError(
        f"format: {first} does not fit blocks of {grid.block_rows} x {grid.group_size}: {what} are no multiple "
        f"({len(misfits)} such linears). Engines that fuse linears compute with other scales there, or refuse them.",
        hint=f"{other}." if patterns is None else f"{other}; or leave them alone: {patterns}",
    )


def skip_patterns(architecture: Architecture, misfits: Iterable[str]) -> str | None:
    """``--skip`` options for some linears and what engines fuse with them; None if nothing would be left."""
    wanted = set(misfits)
    for layer in architecture.layers:
        for _, linears in fused(layer):
            whole = {linear.name for linear in linears}
            if whole & wanted:
                wanted |= whole
    everything = [linear.name for layer in architecture.layers for linear in layer.linears()]
    if wanted.issuperset(everything):
        return None
    classes: dict[str, list[str]] = {}
    for name in everything:
        classes.setdefault(_pattern(name), []).append(name)
    patterns: dict[str, None] = {}
    for pattern, names in classes.items():
        if wanted.issuperset(names):
            patterns[pattern] = None
        else:
            patterns |= dict.fromkeys(_in_layer(name) for name in names if name in wanted)
    return " ".join(f"--skip '{pattern}'" for pattern in patterns)


def _pattern(name: str) -> str:
    """What matches a linear in every layer; one pattern for all experts, which are skipped as one."""
    return f"*.{re.sub(r'experts[.].*', 'experts.*', _LAYER.sub('', name))}"


def _in_layer(name: str) -> str:
    """The same in its own layer."""
    layer = _LAYER.match(name)
    return f"{'' if layer is None else layer[0].removesuffix('.')}{_pattern(name)[1:]}"
