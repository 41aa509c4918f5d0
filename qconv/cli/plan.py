"""``qconv plan``: what a build will hold and cost, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from qconv.cli import gguf
from qconv.cli.console import (
    bits,
    plan_costs_values,
    print_engines,
    print_json,
    print_other_way,
    print_plan_costs,
    print_table,
    say,
    shape,
    short_names,
    size,
    stdout,
)
from qconv.cli.examples import examples
from qconv.cli.numbers import COUNT
from qconv.cli.options import json_option, model_argument, recipe_options
from qconv.cli.several import Builds, is_several, several, single
from qconv.cli.target import TargetOptions, plan_target, target_options
from qconv.errors import UsageError
from qconv.planning.recipe import Recipe

if TYPE_CHECKING:
    from qconv.planning.estimate import Estimate

_TOPOLOGY_FAILS = 1


@click.command(
    short_help="Show what a build will hold and cost, without reading a weight.",
    epilog=examples(
        "qconv plan Qwen/Qwen3-Coder-480B-A35B-Instruct --fmt w4a16 --tp 8",
        "qconv plan MODEL --fmt gguf --sensitivity S --target-bits 4.5",
    ),
)
@model_argument
@recipe_options
@click.option("--tp", type=COUNT, metavar="N", help="Check a tensor-parallel serving topology.")
@click.option(
    "--ep", type=COUNT, default=1, metavar="N", help="Experts spread over N ranks, for what engines make of it."
)
@target_options
@click.option("--devices", metavar="WHERE", help="Show what a calibration takes of each device's memory.")
@click.option("--units", is_flag=True, help="A row for each unit of work: embeddings, each layer, head.")
@json_option
def command(
    model: str,
    tp: int | None,
    ep: int,
    devices: str | None,
    units: bool,
    as_json: bool,
    fmt: Sequence[str],
    recipe: Sequence[str],
    **options: Any,
) -> int:
    """Show what quantizing MODEL, a folder or a Hub id, will make and take.

    Needs config.json alone, and looks at the index where there is one: no shard has to be there. Exits with 1 if the
    build does not fit the topology of --tp. With several --fmt or --recipe each build is shown, then what they share.
    With --target-size or --target-bits, the types of the best build of that size are chosen, by what qconv sensitivity
    has measured and by samples of the weights; --save makes a recipe of them. Without --sensitivity the costs of
    measuring it are shown.
    """
    target = TargetOptions.taken(options)
    if target is not None:
        if tp is not None or units:
            raise UsageError(
                f"--{'units' if tp is None else 'tp'}: has no meaning with --target-size or --target-bits."
            )
        plan_target(model, target.recipe(fmt, recipe, options), target, as_json)
        return 0
    if is_several(fmt, recipe):
        return _plan_several(model, several(fmt, recipe, options), tp, ep, devices, units, as_json)
    given = single(fmt, recipe, options)
    gguf_recipe = given.gguf()
    if gguf_recipe is not None:
        if tp is not None:
            raise UsageError("--tp: has no meaning for GGUF.")
        gguf.plan(model, gguf_recipe, as_json, devices)
        return 0
    loaded = given.load()
    from qconv.checkpoint.hub import least_disk_budget, resolve_model
    from qconv.planning.estimate import estimate

    folder = resolve_model(model, weights=False)
    result, least = estimate(folder, loaded), least_disk_budget(model, folder)
    topology = {**_topology(result, tp), **_engines(result, tp, ep)}
    if as_json:
        print_json({**_values(result, units, least), **topology})
    else:
        _print(result, units)
        print_plan_costs(result.costs, least, devices)
        print_other_way(loaded)
        _print_topology(topology)
        print_engines(topology["engines"])
    return _TOPOLOGY_FAILS if topology["topology_problems"] else 0


def _plan_several(
    model: str, builds: Builds, tp: int | None, ep: int, devices: str | None, units: bool, as_json: bool
) -> int:
    from qconv.checkpoint.hub import least_disk_budget, resolve_model
    from qconv.planning.gguf_outline import outline
    from qconv.planning.several import estimates

    folder = resolve_model(model, weights=False)
    planned, costs = estimates(folder, builds)
    least = least_disk_budget(model, folder)
    topologies = {name: {**_topology(result, tp), **_engines(result, tp, ep)} for name, result in planned.items()}
    outlines = {name: outline(folder, one) for name, one in builds.items() if not isinstance(one, Recipe)}
    fails = any(one["topology_problems"] for one in topologies.values())
    shown: dict[str, dict[str, Any]] = {
        name: gguf.plan_values(outlines[name])
        if name in outlines
        else {**_values(planned[name], units, least), **topologies[name]}
        for name in builds
    }
    total = sum(one["output_bytes"] for one in shown.values())
    if as_json:
        print_json({"builds": shown, "output_bytes": total, **plan_costs_values(costs, least)})
        return _TOPOLOGY_FAILS if fails else 0
    console = stdout()
    for name, one in builds.items():
        say(console, f"{name}/", style="bold")
        if isinstance(one, Recipe):
            _print(planned[name], units)
            _print_topology(topologies[name])
            print_engines(topologies[name]["engines"])
        else:
            gguf.print_plan(outlines[name], one)
        say(console, "")
    say(console, f"all together {size(total)} in {len(builds)} folders")
    print_plan_costs(costs, least, devices)
    return _TOPOLOGY_FAILS if fails else 0


def _topology(result: Estimate, tp: int | None) -> dict[str, Any]:
    """Whether a build fits a serving topology, if one is asked for, and the group sizes that would."""
    from qconv.planning.topology import topology_group_sizes, topology_problems

    problems = [] if tp is None else topology_problems(result.plan, tp)
    sizes = topology_group_sizes(result.plan, tp) if problems and tp is not None else []
    return {"tp": tp, "topology_problems": problems, "topology_group_sizes": sizes}


def _engines(result: Estimate, tp: int | None, ep: int) -> dict[str, Any]:
    """What engines will make of a build, by the rules that need no weights."""
    from qconv.engines.subject import Deployment
    from qconv.engines.table import judgements
    from qconv.planning.engines import engine_values

    return {"engines": engine_values(judgements(result.subject, (), Deployment(tp or 1, ep)))}


def _values(result: Estimate, units: bool, least: int | None) -> dict[str, Any]:
    values = {
        "path": str(result.path),
        "architecture": result.plan.architecture.family,
        "recipe": result.plan.recipe.model_dump(mode="json"),
        "source_dtype": result.dtype,
        "notices": result.notices,
        "parameters": result.weights,
        "source_bytes": result.source_bytes,
        "output_bytes": result.output_bytes,
        "shards": result.shards,
        "bits_per_weight": result.bits_per_weight,
        **plan_costs_values(result.costs, least),
        "classes": [
            {
                "name": row.name,
                "modules": row.modules,
                "shapes": row.shapes,
                "scheme": row.scheme,
                "weights": row.weights,
                "source_bytes": row.source_bytes,
                "output_bytes": row.output_bytes,
                "bits_per_weight": row.bits_per_weight,
            }
            for row in result.classes
        ],
    }
    if units:
        values["units"] = [
            {"key": unit.key, "bytes": unit.nbytes, "shards": [name for name, _ in unit.shards]}
            for unit in result.plan.units
        ]
    return values


def _print(result: Estimate, units: bool) -> None:
    console = stdout()
    plan = result.plan
    say(console, f"{result.path}: {plan.architecture.family}, {len(plan.architecture.layers)} layers", style="bold")
    for notice in result.notices:
        say(console, f"note: {notice}", style="yellow")
    say(console, "")
    if units:
        rows = [(unit.key, size(unit.nbytes), _span([name for name, _ in unit.shards])) for unit in plan.units]
        print_table(console, ("unit", "size", "shards"), rows)
    else:
        print_table(
            console,
            ("modules", "count", "shape", "scheme", "size", "bits"),
            [
                (
                    name,
                    f"{row.modules:,}",
                    "\n".join(map(shape, row.shapes)),
                    row.scheme,
                    size(row.output_bytes),
                    bits(row.bits_per_weight),
                )
                for name, row in zip(short_names([row.name for row in result.classes]), result.classes, strict=True)
            ],
        )
    say(console, "")
    say(console, f"source       {result.weights:,} parameters, {size(result.source_bytes)} as {result.dtype}")
    say(
        console,
        f"output       {size(result.output_bytes)} in {result.shards} shards of format {plan.format.name}, "
        f"{bits(result.bits_per_weight)} bits per weight",
    )


def _print_topology(topology: Mapping[str, Any]) -> None:
    from qconv.planning.fitting import shown_sizes

    console = stdout()
    ranks, problems, sizes = (topology[key] for key in ("tp", "topology_problems", "topology_group_sizes"))
    if ranks is None:
        return
    if not problems:
        say(console, f"topology     tensor parallel {ranks} can hold the build")
        return
    say(console, f"topology     tensor parallel {ranks} cannot hold the build:", style="bold red")
    for problem in problems:
        say(console, f"  {problem}")
    fits = f"--group-size {shown_sizes(sizes)} fits; or choose" if sizes else "No group size fits; choose"
    say(console, f"  {fits} another number of ranks, or expert parallelism.")


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
