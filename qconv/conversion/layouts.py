"""Which format and grids take a build's numbers, and which linears have no place there, each with why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from qconv.conversion.dense import DTYPES, DenseFormat
from qconv.conversion.exact import grid_in, in_grid
from qconv.conversion.weights import CodedWeights
from qconv.core.architecture import Linear
from qconv.core.qtensor import Grid, Number, QTensor
from qconv.errors import QconvError, RecipeError, UsageError
from qconv.formats import detect, formats, get_format
from qconv.formats.base import Format
from qconv.formats.compressed_tensors import CompressedTensors
from qconv.planning.recipe import Recipe, load_recipe, packaged_recipes
from qconv.planning.schemes import LinearScheme

COMPRESSED = "compressed-tensors"
_KINDS = {"int": "integers", "e4m3": "E4M3 floats", "e2m1": "E2M1 floats"}


def layout_in(weights: CodedWeights, wanted: str | None) -> tuple[Format, dict[str, LinearScheme], dict[str, str]]:
    """The format that is asked for, the scheme of each linear in it, and those that must be rounded again, with why.

    Of compressed-tensors' formats it is the build's own, or the first that holds every number, or that of its codes.
    """
    own = weights.format
    if own is not None and (wanted is None or (wanted == COMPRESSED and isinstance(own, CompressedTensors))):
        return own, *_schemes(weights, own)
    if wanted in DTYPES:
        return DenseFormat(wanted), {}, {}
    if not weights.linears:
        raise _without_codes(weights)
    if wanted is not None and wanted != COMPRESSED:
        found = get_format(wanted.replace("-", "_"))
        return found, *_schemes(weights, found)
    number = _number(weights)
    problem: QconvError | None = None
    held: list[tuple[Format, dict[str, LinearScheme], dict[str, str]]] = []
    for one in map(get_format, formats()):
        if not isinstance(one, CompressedTensors) or one.number != number:
            continue
        try:
            held.append((one, *_schemes(weights, one)))
        except (RecipeError, UsageError) as error:
            problem = problem or error
            continue
        if not held[-1][2]:
            return held[-1]
    if not held:
        assert problem is not None
        raise problem
    return min(held, key=lambda one: len(one[2]))


def _schemes(weights: CodedWeights, output_format: Format) -> tuple[dict[str, LinearScheme], dict[str, str]]:
    """The scheme of each linear in the new layout, and those that must be rounded again, each with why.

    What the layout holds no codes of, whatever they are, has no scheme: it becomes plain.
    """
    coded = [linear for linear in weights.linears.values() if not output_format.is_skipped(linear.name, ())]
    of_grids = dict[Grid | str, list[Linear]]()
    for linear in coded:
        of_grids.setdefault(weights.grid_of(linear), []).append(linear)
    own = getattr(output_format, "number", None)
    strange = own is not None and all(isinstance(grid, str) or grid.number != own for grid in of_grids)
    kept = output_format.name == weights.layout
    schemes: dict[str, LinearScheme] = {}
    again: dict[str, str] = {}
    for grid, linears in of_grids.items():
        found: Grid | None
        if isinstance(grid, str):
            found, problems = None, dict.fromkeys((one.name for one in linears), grid)
        elif kept:
            found, problems = grid, dict[str, str]()
        elif strange:
            reason = f"format {output_format.name} holds {_KINDS.get(str(own), own)}"
            found, problems = None, dict.fromkeys((one.name for one in linears), reason)
        else:
            found, problems = _best(weights, output_format, grid, linears)
        again |= problems
        scheme = LinearScheme(_own_grid(output_format) if found is None else found, ("rtn",))
        schemes |= {one.name: scheme for one in linears}
    schemes = {linear.name: schemes[linear.name] for linear in coded}
    of = None if kept else _other_format(output_format, {scheme.grid for scheme in schemes.values()})
    if of is not None:
        scheme = LinearScheme(_own_grid(output_format), ("rtn",))
        return dict.fromkeys(schemes, scheme), dict.fromkeys(schemes, f"what format {of} holds")
    if len({scheme.grid for scheme in schemes.values()}) > 1 and not output_format.mixes:
        names = {scheme.grid: name for name, scheme in schemes.items()}
        raise RecipeError(
            f"--to {output_format.name}: holds one grid, and {' and '.join(list(names.values())[:2])} are on two.",
            hint=f"Take --to {COMPRESSED}, or a dense layout.",
        )
    return schemes, again


def _number(weights: CodedWeights) -> Number:
    """What codes are, by the first linear that has any.

    Raises:
        UsageError: none has.
    """
    grids = map(weights.grid_of, weights.linears.values())
    found = next((grid for grid in grids if isinstance(grid, Grid)), None)
    if found is None:
        raise _without_codes(weights)
    return found.number


def _without_codes(weights: CodedWeights) -> UsageError:
    return UsageError(
        f"{weights.files[0]}: holds no codes that a layout of safetensors has.",
        hint="Take --to bf16, or quantize the original model with --fmt.",
    )


def _other_format(output_format: Format, grids: Collection[Grid]) -> str | None:
    """The format of compressed-tensors that linears are in, by what config.json would say, where it is another one."""
    if not isinstance(output_format, CompressedTensors):
        return None
    found = [detect({"quantization_config": output_format.config({grid: ()}, ())}) for grid in grids]
    names = [one.name for one in found if one is not None]
    return None if output_format.name in names or not names else names[0]


def _best(
    weights: CodedWeights, output_format: Format, grid: Grid, linears: Sequence[Linear]
) -> tuple[Grid | None, dict[str, str]]:
    """The grid that takes a grid's values, and the linears that it does not hold, each with why.

    Scales are stored in the dtype of the model's other weights where they are numbers of it, and else as they are.
    """
    best: tuple[Grid | None, dict[str, str]] | None = None
    for dtype in dict.fromkeys((weights.scale_dtype, grid.scale_dtype)):
        scaled = replace(grid, scale_dtype=dtype if grid.number != "e2m1" else grid.scale_dtype)
        found = grid_in(output_format, scaled, {linear.in_features for linear in linears})
        if isinstance(found, str):
            return None, dict.fromkeys((one.name for one in linears), found)
        problems = {}
        for linear in linears:
            problem = output_format.check(linear.out_features, linear.in_features, found)
            if problem is None and (found != grid or grid.has_global_scale):
                problem = _held(output_format, linear, weights.qtensor(linear.weight), found)
            if problem is not None:
                problems[linear.name] = problem
        if not problems:
            return found, problems
        best = (found, problems) if best is None or len(problems) <= len(best[1]) else best
    assert best is not None
    return best


def _held(output_format: Format, linear: Linear, weight: QTensor, grid: Grid) -> str | None:
    """Why a weight has other numbers in the new layout; None if it has the same."""
    found = in_grid(weight, grid)
    if isinstance(found, str):
        return found
    if not grid.has_global_scale:
        return None
    # Files hold the scale of all scales or its inverse: what is read again must give the same steps.
    scales = torch.unique(weight.scales.flatten().view(torch.uint8)).view(weight.scales.dtype).unsqueeze(1)
    codes = torch.zeros(len(scales), grid.group_size, dtype=torch.uint8)
    few = QTensor(grid, codes, scales, None, input_scale=found.input_scale, global_scale=found.global_scale)
    packed = dict(output_format.pack(linear.name, few))
    again = output_format.unpack(linear.name, few.shape, packed.__getitem__, grid)
    return None if torch.equal(few.steps(), again.steps()) else "its scale of all scales is another number there"


def _own_grid(output_format: Format) -> Grid:
    """The grid that a format has by its own recipe."""
    name = output_format.name.replace("_", "-")
    recipe = load_recipe(name) if name in packaged_recipes() else Recipe(format=output_format.name)
    grid = output_format.grid(recipe.grid, torch.bfloat16)
    if grid.stores_inputs:
        raise UsageError(
            f"--to {name}: needs scales of inputs, which only calibration finds.",
            hint="Quantize the original model with --fmt.",
        )
    return grid
