"""What the commands print: text, tables, JSON and errors, fitted to a terminal, a log or a pipe."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from qconv.boundary.printable import printable
from qconv.core.workers import AT_ONCE
from qconv.errors import QconvError

if TYPE_CHECKING:
    from qconv.artifacts.bits import BitsByLayer
    from qconv.planning.costs import Costs
    from qconv.planning.gguf_recipe import GgufRecipe
    from qconv.planning.recipe import Recipe

LOG_WIDTH = 120
"""Columns where there is no terminal to ask and COLUMNS is not set."""
_LINE_END = "\n"
"""Of the characters that act, the one that a paragraph or a cell may hold."""


class ReaderGone(Exception):
    """Whoever read our output went away, as ``head`` does. Not an OSError: click would exit with 1 for that."""


class _Console(Console):
    """rich's console, without markup or guessed highlights: what is printed are paths and numbers."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)
        if not self.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
            self.width = LOG_WIDTH

    def on_broken_pipe(self) -> NoReturn:
        raise ReaderGone


def stdout() -> Console:
    """Where results go."""
    return _Console()


def stderr() -> Console:
    """Where progress and errors go."""
    return _Console(stderr=True)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a paragraph. It is left to the terminal to wrap it, so that paths can be copied."""
    console.print(Text(printable(text, keep=_LINE_END), style=style), soft_wrap=True)


def print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header; columns of numbers are right-aligned. One block a row where the table is too wide."""
    rows = [[printable(cell, keep=_LINE_END) for cell in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for number, name in enumerate(header):
        right = all(_is_number(row[number]) for row in rows)
        table.add_column(Text(name), justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
        console.print(table)
        return
    for row in rows:
        say(console, row[0])
        for name, cell in zip(header[1:], row[1:], strict=True):
            if cell:
                say(console, f"  {name}: {', '.join(cell.splitlines())}")


def print_roles(console: Console, found: BitsByLayer) -> None:
    """Print bits per weight by layer and role."""
    roles = found.roles
    rows = [(str(layer), *(bits(of.get(role)) for role in roles)) for layer, of in found.rows().items()]
    print_table(console, ("layer", *roles), rows)


def print_engines(engines: Sequence[Mapping[str, Any]]) -> None:
    """A line on what engines make of a build, from the values of its report; none where it has none."""
    verdicts: dict[str, list[str]] = {}
    for one in engines:
        verdicts.setdefault(one["verdict"], []).append(one["engine"])
    if verdicts:
        told = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in verdicts.items())
        say(stdout(), f"engines      {told} (qconv check tells why)")


def print_json(value: Any) -> None:
    """Print one JSON document. Numbers that JSON cannot hold (infinity, NaN) become null."""
    try:
        sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGone from None


def print_error(error: QconvError, *, as_json: bool) -> None:
    """Print an error: two lines on stderr, or an object on stdout for whoever parses that."""
    if as_json:
        kind = type(error).__name__
        values = {"kind": kind, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        print_json({"error": values})
        return
    console = stderr()
    for label, style, text in (("error:", "bold red", error.message), ("hint:", "bold", error.hint)):
        if text:
            console.print(Text.assemble((label, style), f" {printable(text, keep=_LINE_END)}"), soft_wrap=True)


def size(nbytes: float) -> str:
    """Bytes in decimal units, as disks are sold: ``960.41 GB``."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: ``1:02:03``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def bits(value: float | None) -> str:
    """Bits per weight; empty where there are no weights."""
    return "" if value is None else f"{value:.2f}"


def shape(dimensions: Sequence[int]) -> str:
    """``6144x2560``."""
    return "x".join(map(str, dimensions)) or "scalar"


def short_names(names: Sequence[str]) -> list[str]:
    """Names of module classes without what all of those within layers begin with: ``model.layers.*.``."""
    prefixes = {name.partition(".*.")[0] for name in names if ".*." in name}
    if len(prefixes) != 1:
        return list(names)
    return [name.removeprefix(f"{next(iter(prefixes))}.*.") for name in names]


def _is_number(cell: str) -> bool:
    return not cell or cell.lstrip("-")[:1].isdigit()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def costs(start: float) -> dict[str, float]:
    """What a command has cost since ``start``, of ``time.monotonic``: its peak memory in bytes, and seconds."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_memory_bytes": peak, "seconds": round(time.monotonic() - start, 2)}


def print_costs(values: Mapping[str, Any]) -> None:
    """Print what :func:`costs` gave."""
    say(stdout(), f"peak memory  {size(values['peak_memory_bytes'])}")
    say(stdout(), f"time         {duration(values['seconds'])}")


def plan_costs_values(costs: Costs, least: int | None) -> dict[str, int | None]:
    """What a run is going to take, as JSON has it; of the disk budget the least, where the model is on the Hub."""
    return {
        "modelled_peak_memory_bytes": costs.memory,
        "modelled_workers": costs.workers,
        "modelled_device_bytes": costs.device,
        "modelled_scratch_bytes": costs.scratch,
        "least_disk_budget_bytes": least,
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
    }


def print_plan_costs(costs: Costs, least: int | None, devices: str | None = None) -> None:
    """Print what :func:`plan_costs_values` gives; of devices too where some are asked for."""
    console = stdout()
    at_once = f"{costs.workers} at once" if costs.workers > 1 else "one at a time"
    say(console, f"peak memory  {size(costs.memory)} (modelled, {at_once})")
    if devices is not None:
        say(console, f"device       {_of_devices(costs.device, devices)}")
    say(console, f"scratch disk {size(costs.scratch)} (modelled), besides the output")
    if least is not None:
        say(console, f"disk budget  at least {-(-least // 10**6):,}MB, or room for the whole source")
    say(console, f"free disk    {size(shutil.disk_usage(Path.cwd()).free)} in the current folder")


def _of_devices(needed: int, asked: str) -> str:
    """What a run takes of each device's memory, and whether those that are here have it."""
    if not needed:
        return "none: what is not calibrated is rounded on the processor"
    from qconv.core.devices import CPU, devices_of, free_memory

    said = f"{size(needed)} of each device's memory (modelled, {AT_ONCE} experts at once)"
    found = [one for one in devices_of(asked) if one != CPU]
    totals = {str(one): free_memory(one)[1] for one in found}
    small = [f"{name} has {size(total)}" for name, total in totals.items() if total < needed]
    return said if not small else f"{said}: {', '.join(small)}"


def print_other_way(recipe: Recipe | GgufRecipe) -> None:
    """Print what a build would gain and cost that is calibrated where this one is not, or the other way round."""
    from qconv.planning.alternatives import other_way

    said = other_way(recipe)
    if said is not None:
        say(stdout(), f"other way    {said}")


def corpus_line(one: Mapping[str, Any]) -> str:
    """What the experts saw of one corpus of a mixture."""
    return (
        f"of {one['corpus']}: least {one['least']:,}, median {one['median']:,}, most {one['most']:,}; "
        f"{one['without_tokens']} experts without"
    )
