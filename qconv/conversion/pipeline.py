"""``qconv convert``: a build in one layout becomes one in another, with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.artifacts.verbatim import not_taken, parts_of
from qconv.boundary.content import is_gguf
from qconv.building.output import Outcome, require_apart
from qconv.building.run import make_builds
from qconv.building.target import Log, Target
from qconv.conversion.dense import DTYPES
from qconv.conversion.exact import stored_as
from qconv.conversion.gguf import split_anew
from qconv.conversion.gguf_weights import gguf_source
from qconv.conversion.layouts import COMPRESSED, layout_in
from qconv.conversion.target import ConvertedTarget
from qconv.conversion.to_gguf import PLAIN, ConvertedGgufTarget, Types, gguf_layouts, gguf_target, types_of
from qconv.conversion.weights import BuildWeights, CodedWeights, source_of
from qconv.errors import CheckpointError, QconvError, UsageError
from qconv.executors import DEFAULT
from qconv.formats import formats
from qconv.formats.base import Format
from qconv.planning.plan import lay_out
from qconv.planning.recipe import Recipe, parse_recipe
from qconv.planning.schemes import LinearScheme
from qconv.verification.outcome import Progress, Verification
from qconv.verification.structure import check_structure

SHARDED = "sharded"
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
    return [*(name.replace("_", "-") for name in formats()), COMPRESSED, *DTYPES, *gguf_layouts()]


def convert(
    path: Path,
    out: Path,
    wanted: Wanted,
    *,
    like: Path | None = None,
    requantize: bool = False,
    restart: bool = False,
    threads: int | None = None,
    progress: Progress,
    log: Log,
) -> Outcome:
    """Convert a build, or go on with it.

    Args:
        path: The build's folder, or a GGUF file, any of a set, or a folder that holds one model.
        out: The new one's; made if absent.
        wanted: What it is to become.
        like: Of GGUF the folder of the model that it was made from, for config.json, tokenizer and the like; None to
            make those from the file's keys.
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
    plain = DTYPES.get(wanted.format or "")
    if not is_gguf(path):
        if like is not None:
            raise UsageError("--like: is for GGUF; other builds bring their config.json.", hint="Leave it out.")
        build = Build.open(path)
        _require_whole(build)
        source = source_of(build, plain or torch.float32)
        return _convert(source, out, wanted, requantize, restart, threads, progress, log)
    if wanted.shard_bytes is not None:
        return split_anew(path, out, wanted.shard_bytes, restart=restart, progress=progress, log=log)
    with gguf_source(path, like, plain) as source:
        return _convert(source, out, wanted, requantize, restart, threads, progress, log)


def _convert(
    source: Source,
    out: Path,
    wanted: Wanted,
    requantize: bool,
    restart: bool,
    threads: int | None,
    progress: Progress,
    log: Log,
) -> Outcome:
    """Of an open model."""
    progress("reading scales", 0, 1)
    if wanted.format in gguf_layouts():
        target: Target = _gguf_target(source, out, wanted, requantize, log)
    else:
        target = _safetensors_target(source, out, wanted, requantize, log)
    (outcome,) = make_builds(
        source, [target], out, restart=restart, threads=threads, executor=DEFAULT, progress=progress, log=log
    )
    return outcome


def _gguf_target(source: Source, out: Path, wanted: Wanted, requantize: bool, log: Log) -> ConvertedGgufTarget:
    weights = source.checkpoint
    assert isinstance(weights, CodedWeights)
    assert wanted.format is not None
    type = wanted.format.partition(":")[2] or None
    types = Types({}, {}, PLAIN[type]) if type in PLAIN else types_of(weights, type)
    if types.again and not requantize:
        raise _cannot(types.again, wanted)
    if types.again:
        log(f"{len(types.again)} linears are rounded again to {types.rounded.name}: {_told(types.again)}")
    if source.verbatim:
        log(not_taken(parts_of(source.verbatim)))
    return gguf_target(source, out, types, type, wanted.shard_bytes)


def _safetensors_target(source: Source, out: Path, wanted: Wanted, requantize: bool, log: Log) -> ConvertedTarget:
    weights, plain = source.checkpoint, DTYPES.get(wanted.format or "")
    assert isinstance(weights, CodedWeights)
    output_format, schemes, again = layout_in(weights, wanted.format)
    if plain is torch.float16:
        _require_range(weights)
    if again and not requantize:
        raise _cannot(again, wanted)
    if again:
        log(f"{len(again)} linears are rounded again: {_told(again)}")
    if plain is not None:
        log(f"{len(weights.linears):,} weights become {output_format.name}: code times scale, rounded once")
    uncoded = [name for name, linear in weights.linears.items() if linear.name not in schemes]
    if uncoded and plain is None:
        weights = weights.plainly(uncoded)
        source = replace(source, checkpoint=weights)
        log(f"{len(uncoded):,} weights, of which {output_format.name} holds no codes, become plain: code times scale")
    caches = _keeps_cache(weights, output_format, log)
    recipe = _recipe(output_format, schemes, wanted, caches)
    plan = lay_out(
        source.architecture, recipe, output_format, schemes, lambda name: weights.entry(name).dtype, source.verbatim
    )
    return ConvertedTarget(source, plan, out, "", again=again)


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


def _keeps_cache(weights: CodedWeights, output_format: Format, log: Log) -> bool:
    """Whether scales of a cache are stored, and have a place.

    Raises:
        UsageError: they are, and have none.
    """
    if not isinstance(weights, BuildWeights) or not weights.build.described.cache:
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
    for layer in weights.architecture.layers:
        for spec, one in zip(
            naming.specs(layer.attention.name, torch.bfloat16), weights.cache_scales(layer.attention.name), strict=True
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


def _require_range(weights: CodedWeights) -> None:
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
