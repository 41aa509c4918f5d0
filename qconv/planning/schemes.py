"""What becomes of each linear: its grid and method by the recipe's rules, agreed among what engines fuse."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from qconv.core.architecture import Architecture, Layer, Linear, Moe
from qconv.core.qtensor import CHANNEL, Grid
from qconv.errors import RecipeError
from qconv.formats import mixing_formats
from qconv.formats.base import Format
from qconv.grids import grids
from qconv.methods import rounding_of
from qconv.planning.recipe import Recipe
from qconv.planning.rules import SKIP, RuleGrid


@dataclass(frozen=True, slots=True)
class LinearScheme:
    """What becomes of a linear that is quantized.

    Attributes:
        grid: The values that it can take.
        method: How they are chosen: a member of :data:`qconv.planning.steps.METHODS`.
        values: The module of :mod:`qconv.grids` that says which of the grid's values; None for all of them.
    """

    grid: Grid
    method: tuple[str, ...]
    values: str | None = None

    @property
    def method_name(self) -> str:
        """The method as one word."""
        return "+".join(self.method)

    @property
    def rounding(self) -> str | None:
        """What chooses its codes by second moments: ``gptq`` or another; None where it is rounded by itself."""
        return rounding_of(self.method)


def resolve(
    architecture: Architecture, recipe: Recipe, output_format: Format, weight_dtype: torch.dtype
) -> dict[str, LinearScheme]:
    """The scheme of each linear that is quantized, by name, in the order of the layers.

    Raises:
        RecipeError: the format cannot hold a grid or all of them, a rule or pattern fits nothing, a method does not go
            with a grid, nothing is left to quantize, or linears that engines fuse do not agree.
    """
    _check_patterns(architecture, recipe)
    default, cache = output_format.grid(recipe.grid, weight_dtype), dict[RuleGrid, Grid]()
    found: dict[str, LinearScheme] = {}
    for linear in (one for layer in architecture.layers for one in layer.linears()):
        if recipe.skips(linear.name):
            continue
        rule, grid = recipe.rule(linear.name), default
        if rule is not None and isinstance(rule.grid, RuleGrid):
            if rule.grid not in cache:
                cache[rule.grid] = _grid(linear, rule.grid, recipe, output_format, weight_dtype)
            grid = cache[rule.grid]
        method = recipe.method if rule is None or rule.method is None else rule.method
        values = recipe.grid.values
        if rule is not None and isinstance(rule.grid, RuleGrid) and (rule.grid.values or rule.grid.number):
            values = rule.grid.values
        found[linear.name] = LinearScheme(grid, method, _known_values(values))
    if not found:
        raise RecipeError("skip: leaves no linear to quantize.", hint="Skip less.")
    for scheme, name in {scheme: name for name, scheme in reversed(found.items())}.items():
        _check_method(scheme, name, recipe, output_format)
    found = _in_act_order(found, recipe, output_format)
    _check_mixture(found, output_format)
    for layer in architecture.layers:
        _check_fused(layer, found, output_format)
    return found


def in_words(grid: Grid) -> str:
    """What weights on a grid become: ``4 bits in groups of 128``."""
    if not grid.is_float:
        spread = ", one scale a row" if grid.group_size == CHANNEL else f" in groups of {grid.group_size}"
        inputs = {"int": "8-bit integers", "e4m3": "E4M3", "e2m1": "E2M1"}[grid.activation_number]
        return f"{grid.bits} bits{spread}{'' if grid.activations == 'none' else f', inputs in {inputs}'}"
    inputs = {"none": "16-bit", "local": "4-bit"}.get(grid.activations, grid.activations)
    if grid.has_global_scale or grid.scale_dtype is torch.float8_e8m0fnu:
        return f"{microscaling_name(grid)} in groups of {grid.group_size}, {inputs} activations"
    if grid.group_size != CHANNEL:
        spread = f" in blocks of {grid.block_rows} x {grid.group_size}"
    else:
        spread = f", one scale a {'weight' if grid.block_rows == CHANNEL else 'row'}"
    return f"FP8 (E4M3){spread}, {inputs} activations"


def microscaling_name(grid: Grid) -> str:
    """NVFP4, MXFP4 or MXFP8."""
    return f"{'NV' if grid.has_global_scale else 'MX'}FP{grid.bits}"


def in_full(grid: Grid) -> str:
    """The same, so that grids of one build can be told apart."""
    ends = "" if grid.symmetric else ", with biases" if grid.based else ", with zero points"
    return f"{in_words(grid)}{ends}"


def fused(layer: Layer) -> Iterator[tuple[str, tuple[Linear, ...]]]:
    """What engines hold as one tensor: q, k, v; gate, up; a layer's experts as a whole. Each with what it is called."""
    for linears in (group.linears for group in layer.groups() if len(group.linears) > 1):
        leaves = [linear.name.rpartition(".")[2].removesuffix("_proj") for linear in linears]
        yield f"{', '.join(leaves[:-1])} and {leaves[-1]}", linears
    if not isinstance(layer.mlp, Moe):
        yield "gate and up", (layer.mlp.gate, layer.mlp.up)
        return
    yield "the experts", tuple(linear for mlp in layer.mlp.experts for linear in mlp.linears())
    shared = layer.mlp.shared_expert
    if shared is not None:
        yield "the shared expert's gate and up", (shared.gate, shared.up)


def matrices(layer: Layer) -> Iterator[tuple[Linear, ...]]:
    """What engines hold as one matrix, an expert's gate and up for themselves: it shares a global scale."""
    yield from (group.linears for group in layer.groups() if len(group.linears) > 1)
    yield from ((mlp.gate, mlp.up) for mlp in layer.mlps())


def _check_patterns(architecture: Architecture, recipe: Recipe) -> None:
    """Every pattern of ``skip`` names a module, and every rule a linear, or if it skips a module.

    Raises:
        RecipeError: it is not so.
    """
    modules = [*(name.rpartition(".")[0] for name, _ in architecture.tensors()), architecture.head_name]
    example = architecture.layers[-1].attention.linears()[0].name
    for pattern in recipe.skip:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            raise RecipeError(
                f"skip: {pattern!r} matches no module of the model.",
                hint=f"Patterns match whole names, such as {example!r}.",
            )
    linears = [linear.name for layer in architecture.layers for linear in layer.linears()]
    for rule in recipe.rules:
        if not any(map(rule.fits, modules if rule.grid == SKIP else linears)):
            raise RecipeError(
                f"rules: {rule.match!r} matches no {'module' if rule.grid == SKIP else 'linear'} of the model"
                f"{'' if rule.grid == SKIP or not any(map(rule.fits, modules)) else ' that is quantized'}.",
                hint=f"Patterns match names from any dot on, such as {example!r}.",
            )


def _grid(linear: Linear, wanted: RuleGrid, recipe: Recipe, output_format: Format, weight_dtype: torch.dtype) -> Grid:
    try:
        return output_format.grid(wanted.over(recipe.grid), weight_dtype, wanted.number)
    except RecipeError as error:
        raise RecipeError(f"rules: for {linear.name}: {error.message}", hint=error.hint or _mixing()) from error


def _mixing() -> str:
    *others, last = mixing_formats()
    return f"Formats {', '.join(others)} and {last} hold integers, FP8 and FP4 on different grids, gguf any type."


def _known_values(name: str | None) -> str | None:
    if name is not None and name not in grids():
        known = ", ".join(grids()) or "none"
        raise RecipeError(
            f"grid.values: there are no {name!r}; known are {known}.", hint="A new grid is a file in qconv/grids/."
        )
    return name


def _check_method(scheme: LinearScheme, name: str, recipe: Recipe, output_format: Format) -> None:
    """A method that goes with its grid.

    Raises:
        RecipeError: it does not.
    """
    grid = scheme.grid
    if grid.is_float and "awq" in scheme.method:
        if recipe.rule(name) is not None:
            raise RecipeError(
                f"rules: {scheme.method_name} searches scales for integers, and {name} is to hold floats.",
                hint="Give its rule a method of its own: rtn or gptq.",
            )
        raise RecipeError(
            f"method: {scheme.method_name} searches scales for integers, and format {output_format.name} holds floats.",
            hint="Take method rtn or gptq, or an integer format.",
        )
    if grid.is_float and grid.activations == "static" and scheme.method != ("rtn",):
        raise RecipeError(
            f"method: {output_format.name} is rounded to nearest, with one scale for all linears that engines fuse.",
            hint="Take method rtn, or format fp8_dynamic.",
        )
    if grid.is_float and recipe.gptq.ordering == "desc_act":
        raise RecipeError(
            "gptq.ordering: desc_act orders the groups of integers, and this format has blocks of floats."
        )


def _in_act_order(found: dict[str, LinearScheme], recipe: Recipe, output_format: Format) -> dict[str, LinearScheme]:
    """The schemes with grids of groups in the order of GPTQ, where that is asked for: a build has it or has it not."""
    if recipe.gptq.ordering != "desc_act" or all(scheme.rounding is None for scheme in found.values()):
        return found
    if not output_format.act_order:
        raise RecipeError(
            f"gptq.ordering: format {output_format.name} has no place for desc_act's column order.",
            hint="Take ordering static, which needs none and is about as good, or format gptq.",
        )
    return {name: replace(one, grid=replace(one.grid, act_order=True)) for name, one in found.items()}


def _check_mixture(found: Mapping[str, LinearScheme], output_format: Format) -> None:
    """One grid, unless the format holds several.

    Raises:
        RecipeError: it does not.
    """
    firsts: dict[Grid, str] = {}
    for name, scheme in found.items():
        firsts.setdefault(scheme.grid, name)
    if len(firsts) > 1 and not output_format.mixes:
        (one, first), (other, second), *_ = firsts.items()
        raise RecipeError(
            f"rules: {first} is to have {in_full(one)}, {second} {in_full(other)}: format {output_format.name} holds "
            "one grid, and what is skipped.",
            hint=_mixing(),
        )


def _stacked(layer: Layer, output_format: Format) -> Iterator[tuple[str, tuple[Linear, ...]]]:
    """What files of a format hold as one tensor: the same linear of all experts."""
    places: dict[str, list[Linear]] = {}
    for linear in layer.linears():
        place = output_format.place(linear.weight)
        if place is not None:
            places.setdefault(place.name.removesuffix(".weight"), []).append(linear)
    yield from ((name, tuple(linears)) for name, linears in places.items())


def _check_fused(layer: Layer, found: Mapping[str, LinearScheme], output_format: Format) -> None:
    """What engines hold as one tensor is skipped as one, and on one grid.

    Raises:
        RecipeError: it is not.
    """
    for what, linears in fused(layer) if output_format.fuses else _stacked(layer, output_format):
        skipped = [linear.name for linear in linears if linear.name not in found]
        if skipped and len(skipped) != len(linears):
            raise RecipeError(
                f"skip: {skipped[0]} is skipped but others of {what} of layer {layer.index} are not; engines load "
                "them as one.",
                hint="Skip all of them or none.",
            )
        grids = {} if skipped else {found[linear.name].grid: linear.name for linear in reversed(linears)}
        if len(grids) > 1:
            (one, first), (other, second), *_ = reversed(grids.items())
            raise RecipeError(
                f"rules: {first} is to have {in_full(one)}, but {second} {in_full(other)}; engines load {what} of "
                f"layer {layer.index} as one.",
                hint=f"Give {what} of a layer one grid.",
            )
