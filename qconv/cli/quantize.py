"""``qconv quantize``: make a build, or continue one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli import gguf
from qconv.cli.build_page import error_values, print_error
from qconv.cli.console import (
    corpus_line,
    costs,
    print_costs,
    print_engines,
    print_json,
    print_other_way,
    say,
    size,
    stdout,
)
from qconv.cli.examples import examples
from qconv.cli.options import model_argument, out_option, recipe_options
from qconv.cli.parts import part_option, print_share
from qconv.cli.running import Running, restart_option, running_options
from qconv.cli.several import Builds, is_several, several, single
from qconv.cli.target import TargetOptions, print_choice, require_savable, save_recipe, target_options
from qconv.errors import UsageError

if TYPE_CHECKING:
    from qconv.building.output import Outcome
    from qconv.planning.gguf_recipe import GgufRecipe
    from qconv.planning.plan import BuildPlan
    from qconv.planning.recipe import Recipe


@click.command(
    short_help="Make a quantized build, or continue one.",
    epilog=examples(
        "qconv quantize MODEL --fmt w4a16 -o OUT",
        "qconv quantize MODEL --fmt fp8 -o OUT",
        "qconv quantize MODEL --fmt gguf:Q4_K_M --calib python-stdlib -o OUT",
        "qconv quantize MODEL --fmt gguf --target-size 240GB -o OUT",
        "qconv quantize MODEL --fmt awq --fmt gguf:Q4_K_M --tokens 32768 -o OUT",
        "qconv quantize MODEL --fmt w4a16 --calib 0.6*python-stdlib --calib 0.4*agent -o OUT",
        "qconv quantize MODEL --fmt w4a16 --rope yarn:4 -o OUT",
        "qconv quantize MODEL --fmt fp8 --part 3/16 -o OUT",
    ),
)
@model_argument
@out_option("The build's folder.")
@recipe_options
@target_options
@restart_option
@part_option
@running_options("Experts and matrices")
def command(
    model: str,
    out: Path,
    part: tuple[int, int] | None,
    fmt: Sequence[str],
    recipe: Sequence[str],
    **options: Any,
) -> None:
    """Quantize MODEL, a folder or a Hub id, into a folder that engines load.

    Works layer by layer. Interrupted or killed at any moment, the same command continues and ends with the same bytes.
    With several --fmt or --recipe each build gets a folder in OUT, and all come from one calibration, whose layers see
    the outputs of unquantized ones. With --target-size or --target-bits the types of the best build of that size are
    chosen first, by what the model's output cares about (--sensitivity, or measured here), for GGUF and w4a16. With
    --part a machine makes its share of a build that needs no calibration; qconv collect makes the build of all.
    """
    running, target = Running.taken(options), TargetOptions.taken(options)
    if part is not None and (target is not None or is_several(fmt, recipe)):
        raise UsageError("--part: makes a share of one build, whose types are chosen.", hint="Choose them with --save.")
    if target is not None:
        _quantize_to_size(model, out, target.recipe(fmt, recipe, options), target, running)
        return
    if is_several(fmt, recipe):
        _quantize_several(model, out, several(fmt, recipe, options), running)
        return
    given = single(fmt, recipe, options)
    gguf_recipe = given.gguf()
    if gguf_recipe is not None:
        gguf.quantize(model, out, gguf_recipe, running, part)
        return
    loaded = given.load()
    start = time.monotonic()
    with running.reading(model, out) as (folder, means):
        from qconv.artifacts.source import Source
        from qconv.building.pipeline import quantize
        from qconv.planning.plan import plan_of

        plan = plan_of(Source.open(folder), loaded)
        means["log"](f"plan: {plan_summary(plan)}")
        outcome = quantize(folder, out, loaded, part=part, **means)
    if outcome.share is not None:
        print_share(outcome.share, outcome.out, out, start, running.as_json)
        return
    result = build_values(outcome) | costs(start)
    if running.as_json:
        print_json(result)
    else:
        print_build(result)
        print_costs(result)
        print_other_way(loaded)


def _quantize_to_size(
    model: str, out: Path, recipe: Recipe | GgufRecipe, target: TargetOptions, running: Running
) -> None:
    start = time.monotonic()
    with running.reading(model, out) as (folder, means):
        from qconv.building.sized_pipeline import quantize_to_size

        if target.save is not None:
            require_savable(target.save, folder, out)
        outcome = quantize_to_size(folder, out, recipe, target.request(), sensitivity=target.sensitivity, **means)
    if target.save is not None:
        save_recipe(target.save, outcome.report["recipe"], outcome.report["allocation"])
    result = values_of(outcome) | {"allocation": outcome.report["allocation"]} | costs(start)
    if running.as_json:
        print_json(result)
        return
    print_values(result)
    print_choice(outcome.report)
    print_costs(result)


def _quantize_several(model: str, out: Path, builds: Builds, running: Running) -> None:
    start = time.monotonic()
    with running.reading(model, out) as (folder, means):
        from qconv.building.several_pipeline import quantize_several

        outcomes = quantize_several(folder, out, builds, **means)
    made = {name: values_of(outcome) for name, outcome in outcomes.items()}
    result: dict[str, Any] = {"path": str(out), "builds": made, **costs(start)}
    if running.as_json:
        print_json(result)
        return
    for values in made.values():
        print_values(values)
        say(stdout(), "")
    print_costs(result)


def values_of(outcome: Outcome) -> dict[str, Any]:
    """What a finished run says of its build, of safetensors or GGUF."""
    is_gguf = str(outcome.report["format"]).startswith("gguf:")
    return gguf.build_values(outcome) if is_gguf else build_values(outcome)


def print_values(values: dict[str, Any]) -> None:
    """Print what :func:`values_of` gave."""
    (print_build if "quantized_bits_per_weight" in values else gguf.print_build)(values)


def build_values(outcome: Outcome) -> dict[str, Any]:
    """What a finished run says of its build."""
    return {
        "path": str(outcome.out),
        "already_complete": outcome.already_complete,
        "renewed": outcome.renewed,
        "bytes": sum(file.stat().st_size for file in outcome.out.rglob("*") if file.is_file()),
        **results(outcome.report),
        **error_values(outcome.report),
    }


def plan_summary(plan: BuildPlan) -> str:
    """What will be written, in a line."""
    shards = sum(len(unit.shards) for unit in plan.units)
    return (
        f"{plan.method_name} to {plan.format.name}, {plan.scheme}: {plan.weights:,} weights, "
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
        "verbatim": report.get("verbatim", []),
        "engines": report.get("engines", []),
        "least_snr": None if worst is None else {"module": worst, "snr_db": finite[worst]},
        "searches": len(searches),
        "searches_kept_rtn": sum(bool(search["kept_rtn"]) for search in searches),
        "coverage": None if coverage is None else {key: coverage[key] for key in coverage if key != "weakest"},
    }


def print_build(result: dict[str, Any]) -> None:
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
    for part in result["verbatim"]:
        say(console, f"copied       {part['tensors']:,} tensors of {part['part']}, {size(part['nbytes'])}")
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
        for one in coverage.get("by_corpus", ()):
            say(console, f"             {corpus_line(one)}")
    if result["searches"]:
        say(console, f"searches     {result['searches_kept_rtn']} of {result['searches']} kept plain rounding")
    if result["degenerate"]:
        say(console, f"degenerate   {result['degenerate']} modules with little to go by; qconv-report.json names them")
    print_error(result)
    print_engines(result["engines"])
