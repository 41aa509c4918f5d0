"""``qconv quantize``: make a build, or continue one."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli import gguf
from qconv.cli.console import duration, print_json, say, size, stdout
from qconv.cli.numbers import THREADS
from qconv.cli.options import RecipeOptions, json_option, model_argument, out_option, recipe_options
from qconv.cli.progress import reporting

if TYPE_CHECKING:
    from qconv.planning.plan import BuildPlan


@click.command(short_help="Make a quantized build, or continue one.")
@model_argument
@out_option("The build's folder.")
@recipe_options
@click.option("--restart", is_flag=True, help="Discard what the folder holds, if qconv made all of it.")
@click.option(
    "--threads",
    type=THREADS,
    help="Experts and matrices worked on at once; the bytes do not depend on it.",
)
@json_option
def command(model: str, out: Path, restart: bool, threads: int | None, as_json: bool, **options: Any) -> None:
    """Quantize MODEL, a folder or a Hub id, into a folder that engines load.

    Works layer by layer. Interrupted or killed at any moment, the same command continues and ends with the same bytes.
    """
    given = RecipeOptions(**options)
    gguf_recipe = given.gguf()
    if gguf_recipe is not None:
        gguf.quantize(model, out, gguf_recipe, restart=restart, threads=threads, as_json=as_json)
        return
    recipe = given.load()
    start = time.monotonic()
    with reporting(quiet=as_json, remedy=f"Run the same command again to continue {out}.") as reporter:
        reporter.log(f"{model}: reading")
        from qconv.artifacts.source import Source
        from qconv.building.pipeline import quantize
        from qconv.checkpoint.hub import resolve_model
        from qconv.planning.plan import make_plan

        folder = resolve_model(model)
        source = Source.open(folder)
        plan = make_plan(source.architecture, recipe, lambda name: source.checkpoint.entry(name).dtype)
        reporter.log(f"plan: {plan_summary(plan)}")
        outcome = quantize(
            folder, out, recipe, restart=restart, threads=threads, progress=reporter.progress, log=reporter.log
        )
    result = {
        "path": str(out),
        "already_complete": outcome.already_complete,
        "renewed": outcome.renewed,
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "seconds": round(time.monotonic() - start, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **results(outcome.report),
    }
    if as_json:
        print_json(result)
    else:
        _print(result)


def plan_summary(plan: BuildPlan) -> str:
    """What will be written, in a line."""
    shards = sum(len(unit.shards) for unit in plan.units)
    return (
        f"{plan.recipe.method_name} to {plan.format.name}, {plan.scheme}: {plan.weights:,} weights, "
        f"{len(plan.quantized):,} linears quantized; {size(plan.output_bytes)} in {shards} shards, "
        f"{plan.bits_per_weight:.2f} bits per weight"
    )


def results(report: dict[str, Any]) -> dict[str, Any]:
    """What one wants to know of a build first, from its report."""
    layers = report["layers"]
    figures = {name: value for layer in layers for name, value in layer["snr_db"].items() if value is not None}
    finite = {name: value for name, value in figures.items() if math.isfinite(value)}
    worst = min(finite, key=lambda name: finite[name], default=None)
    searches = [search for layer in layers for search in layer["searches"].values()]
    coverage = report["coverage"]
    return {
        "format": report["format"],
        "method": report["recipe"]["method"],
        "degenerate": len(report["degenerate"]),
        "parameters": report["parameters"],
        "bits_per_weight": report["bits_per_weight"],
        "quantized_bits_per_weight": report["quantized_bits_per_weight"],
        "least_snr": None if worst is None else {"module": worst, "snr_db": finite[worst]},
        "searches": len(searches),
        "searches_kept_rtn": sum(bool(search["kept_rtn"]) for search in searches),
        "coverage": None if coverage is None else {key: coverage[key] for key in coverage if key != "weakest"},
    }


def _print(result: dict[str, Any]) -> None:
    console = stdout()
    if result["renewed"]:
        say(console, f"{result['path']}: already complete; made again: {', '.join(result['renewed'])}")
    elif result["already_complete"]:
        say(console, f"{result['path']}: already complete; nothing to do")
    else:
        say(console, f"{result['path']}: done, checked against the source")
    say(
        console,
        f"size         {size(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight, "
        f"{result['quantized_bits_per_weight']:.2f} in the quantized linears",
    )
    if result["least_snr"] is not None:
        least = result["least_snr"]
        say(console, f"least SNR    {least['snr_db']:.1f} dB, {least['module']}")
    coverage = result["coverage"]
    if coverage is not None:
        say(
            console,
            f"coverage     tokens per expert: least {coverage['least']:,}, median {coverage['median']:,}, most "
            f"{coverage['most']:,}; {coverage['without_tokens']} of {coverage['experts']} experts without tokens",
        )
    if result["searches"]:
        say(console, f"searches     {result['searches_kept_rtn']} of {result['searches']} kept plain rounding")
    if result["degenerate"]:
        say(console, f"degenerate   {result['degenerate']} modules with little to go by; qconv-report.json names them")
    say(console, f"peak memory  {size(result['peak_memory_bytes'])}")
    say(console, f"time         {duration(result['seconds'])}")
