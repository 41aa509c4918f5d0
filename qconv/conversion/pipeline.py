"""``qconv convert``: a build in one layout becomes one in another, with the same numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.boundary.content import is_gguf
from qconv.building.output import Outcome, require_apart
from qconv.building.run import make_builds
from qconv.building.target import Log
from qconv.conversion.dense import DTYPES, DenseFormat
from qconv.conversion.exact import grid_in, in_grid, stored_as
from qconv.conversion.target import ConvertedTarget, cache_scales
from qconv.conversion.weights import BuildWeights, source_of
from qconv.core.architecture import Linear
from qconv.core.qtensor import Grid, QTensor
from qconv.errors import CheckpointError, QconvError, RecipeError, UsageError
from qconv.executors import DEFAULT
from qconv.formats import detect, formats, get_format
from qconv.formats.base import Format
from qconv.formats.compressed_tensors import CompressedTensors
from qconv.planning.plan import lay_out
from qconv.planning.recipe import Recipe, load_recipe, packaged_recipes, parse_recipe
from qconv.planning.schemes import LinearScheme
from qconv.verification.outcome import Progress, Verification
from qconv.verification.structure import check_structure

COMPRESSED, SHARDED = "compressed-tensors", "sharded"
_KINDS = {"int": "integers", "e4m3": "E4M3 floats", "e2m1": "E2M1 floats"}
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a build is to become.

    Attributes:
        format: The layout; None to keep the one that there is.
        shard_bytes: The largest file; None for the usual one.
    """

    format: str | None
    shard_bytes: int | None = None


def target_names() -> list[str]:
    """What ``--to`` takes besides ``sharded:SIZE``."""
    return [*(name.replace("_", "-") for name in formats()), COMPRESSED, *DTYPES]


def convert(
    path: Path,
    out: Path,
    wanted: Wanted,
    *,
    requantize: bool = False,
    restart: bool = False,
    threads: int | None = None,
    progress: Progress,
    log: Log,
) -> Outcome:
    """Convert a build, or go on with it.

    Args:
        path: The build's folder.
        out: The new one's; made if absent.
        wanted: What it is to become.
        requantize: Round again what the new layout cannot hold, instead of doing nothing.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Matrices worked on at once.
        progress: Told what is at work, the weights done and the weights in all.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError, RecipeError: the layout cannot hold the build's numbers; names the first linears and why.
        CheckpointError: the build is damaged or of a layout that is not read.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        VerificationError: what was written has other numbers.
    """
    require_apart(path, out)
    _require_safetensors(path)
    build = Build.open(path)
    _require_whole(build)
    plain = DTYPES.get(wanted.format or "")
    source = source_of(build, plain or torch.float32)
    weights = source.checkpoint
    assert isinstance(weights, BuildWeights)
    progress("reading scales", 0, 1)
    output_format, schemes, again = _layout(weights, wanted)
    if plain is torch.float16:
        _require_range(weights)
    if again and not requantize:
        raise _cannot(again, wanted)
    if again:
        log(f"{len(again)} linears are rounded again: {_told(again)}")
    if plain is not None:
        log(f"{len(weights.linears):,} weights become {output_format.name}: code times scale, rounded once")
    caches = _keeps_cache(build, output_format, log)
    recipe = _recipe(output_format, schemes, wanted, caches)
    plan = lay_out(
        build.architecture, recipe, output_format, schemes, lambda name: weights.entry(name).dtype, source.verbatim
    )
    target = ConvertedTarget(source, plan, out, "", again=again)
    (outcome,) = make_builds(
        source, [target], out, restart=restart, threads=threads, executor=DEFAULT, progress=progress, log=log
    )
    return outcome


def _require_safetensors(path: Path) -> None:
    """Check that a build is no GGUF.

    Raises:
        UsageError: it is.
    """
    if is_gguf(path):
        raise UsageError(
            f"{path}: is GGUF, whose blocks no other layout holds.", hint="Quantize the original model with --fmt."
        )


def _require_whole(build: Build) -> None:
    """Check that every tensor is there once, of its shape.

    Raises:
        CheckpointError: the first that is not.
    """
    found = Verification()
    check_structure(build, found)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise CheckpointError(
            f"{build.path}: {found.problems[0]}{more}.",
            hint="The build is damaged, or config.json belongs to another one; qconv verify names everything.",
        )


def _layout(weights: BuildWeights, wanted: Wanted) -> tuple[Format, dict[str, LinearScheme], dict[str, str]]:
    """The format that is asked for, the scheme of each linear in it, and those that must be rounded again, with why.

    Of compressed-tensors' formats it is the build's own, or the first that holds every number, or that of its codes.
    """
    own = weights.build.format
    if wanted.format is None or (wanted.format == COMPRESSED and isinstance(own, CompressedTensors)):
        return own, *_schemes(weights, own)
    if wanted.format in DTYPES:
        return DenseFormat(wanted.format), {}, {}
    if wanted.format != COMPRESSED:
        found = get_format(wanted.format.replace("-", "_"))
        return found, *_schemes(weights, found)
    number = weights.build.described.grid.number
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


def _schemes(weights: BuildWeights, output_format: Format) -> tuple[dict[str, LinearScheme], dict[str, str]]:
    """The scheme of each linear in the new layout, and those that must be rounded again, each with why."""
    build, of_grids = weights.build, dict[Grid, list[Linear]]()
    for linear in weights.linears.values():
        of_grids.setdefault(build.grid_of(linear), []).append(linear)
    own = getattr(output_format, "number", None)
    strange = own is not None and all(grid.number != own for grid in of_grids)
    kept = output_format.name == build.format.name
    schemes: dict[str, LinearScheme] = {}
    again: dict[str, str] = {}
    for grid, linears in of_grids.items():
        if kept:
            found, problems = grid, dict[str, str]()
        elif strange:
            reason = f"format {output_format.name} holds {_KINDS.get(str(own), own)}"
            found, problems = None, dict.fromkeys((one.name for one in linears), reason)
        else:
            found, problems = _best(weights, output_format, grid, linears)
        again |= problems
        scheme = LinearScheme(_own_grid(output_format) if found is None else found, ("rtn",))
        schemes |= {one.name: scheme for one in linears}
    schemes = {linear.name: schemes[linear.name] for linear in weights.linears.values()}
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


def _other_format(output_format: Format, grids: Collection[Grid]) -> str | None:
    """The format of compressed-tensors that linears are in, by what config.json would say, where it is another one."""
    if not isinstance(output_format, CompressedTensors):
        return None
    found = [detect({"quantization_config": output_format.config({grid: ()}, ())}) for grid in grids]
    names = [one.name for one in found if one is not None]
    return None if output_format.name in names or not names else names[0]


def _best(
    weights: BuildWeights, output_format: Format, grid: Grid, linears: Sequence[Linear]
) -> tuple[Grid | None, dict[str, str]]:
    """The grid that takes a grid's values, and the linears that it does not hold, each with why.

    Scales are stored in the dtype of the model's other weights where they are numbers of it, and else as they are.
    """
    best: tuple[Grid | None, dict[str, str]] | None = None
    plain = weights.entry(weights.build.architecture.embedding.weight).dtype
    for dtype in dict.fromkeys((plain, grid.scale_dtype)):
        scaled = replace(grid, scale_dtype=dtype if grid.number != "e2m1" else grid.scale_dtype)
        found = grid_in(output_format, scaled)
        if isinstance(found, str):
            return None, dict.fromkeys((one.name for one in linears), found)
        problems = {}
        for linear in linears:
            problem = output_format.check(linear.out_features, linear.in_features, found)
            if problem is None and found != grid:
                problem = _held(output_format, linear, weights.build.qtensor(linear), found)
            if problem is not None:
                problems[linear.name] = problem
        if not problems:
            return found, problems
        best = (found, problems) if best is None or len(problems) < len(best[1]) else best
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


def _keeps_cache(build: Build, output_format: Format, log: Log) -> bool:
    """Whether scales of a cache are stored, and have a place.

    Raises:
        UsageError: they are, and have none.
    """
    if not build.described.cache:
        return False
    if output_format.name in DTYPES:
        log("the stored scales of the cache are left out: plain weights have no words for them")
        return False
    naming = output_format.cache
    if naming is None:
        raise UsageError(
            f"--to {output_format.name.replace('_', '-')}: has no place for the stored scales of the cache.",
            hint=f"Take --to {COMPRESSED}.",
        )
    for layer in build.architecture.layers:
        for spec, one in zip(
            naming.specs(layer.attention.name, torch.bfloat16), cache_scales(build, layer.attention.name), strict=True
        ):
            if stored_as(one, spec.dtype) is None:
                raise UsageError(
                    f"--to {output_format.name.replace('_', '-')}: {spec.name} is no number of "
                    f"{str(spec.dtype).removeprefix('torch.')}.",
                    hint="Quantize the original model with --kv-cache fp8.",
                )
    return True


def _recipe(output_format: Format, schemes: Mapping[str, LinearScheme], wanted: Wanted, caches: bool) -> Recipe:
    """What the plan is made by: the layout, its grid, the size of files."""
    values: dict[str, Any] = {"format": output_format.name, "method": "rtn"}
    grid = next((scheme.grid for scheme in schemes.values()), None)
    if grid is not None:
        values["grid"] = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    if caches:
        values["kv_cache"] = "fp8"
    if wanted.shard_bytes is not None:
        values["output"] = {"max_shard_size": wanted.shard_bytes}
    return parse_recipe(values, f"--to {wanted.format or SHARDED}")


def _require_range(weights: BuildWeights) -> None:
    """Check that float16 holds every number.

    Raises:
        UsageError: it does not.
    """
    most = torch.finfo(torch.float16).max
    beyond = [name for name in weights.linears if float(weights.read(name).abs().max()) > most]
    if beyond:
        raise UsageError(
            f"--to f16: {len(beyond)} weights are beyond float16's {most:,.0f}, the first {beyond[0]}.",
            hint="Take --to bf16 or f32.",
        )


def _cannot(again: Mapping[str, str], wanted: Wanted) -> QconvError:
    library = "" if wanted.format == COMPRESSED else f", and {COMPRESSED} those of every grid that it has"
    return UsageError(
        f"--to {wanted.format}: {len(again)} linears would be other numbers there: {_told(again)}. "
        "Nothing was written.",
        hint=f"--requantize rounds them again, which costs quality; --to bf16 keeps their numbers{library}.",
    )


def _told(again: Mapping[str, str]) -> str:
    """The first linear of each reason, how many more there are, and the reason."""
    of_reasons: dict[str, list[str]] = {}
    for name, why in again.items():
        of_reasons.setdefault(why, []).append(name)
    shown = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({why})"
        for why, names in list(of_reasons.items())[:_SHOWN]
    ]
    rest = sum(map(len, list(of_reasons.values())[_SHOWN:]))
    return "; ".join(shown) + (f"; and {rest} others" if rest else "")


__all__ = ["Source", "Wanted", "convert", "target_names"]
