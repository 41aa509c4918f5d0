"""What the commands do where the format is GGUF: ``--fmt gguf:Q4_K_M``, and files that end in ``.gguf``."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconv.cli.build_page import error_values, print_error, write_page
from qconv.cli.console import (
    bits,
    corpus_line,
    costs,
    plan_costs_values,
    print_costs,
    print_engines,
    print_json,
    print_other_way,
    print_plan_costs,
    print_roles,
    print_table,
    say,
    shape,
    size,
    stdout,
)
from qconv.cli.parts import print_share
from qconv.cli.running import Running
from qconv.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from qconv.building.output import Outcome
    from qconv.formats.gguf.reader import GgufModel
    from qconv.planning.gguf_outline import Outline
    from qconv.planning.gguf_recipe import GgufRecipe

_SHOWN_VALUES = 64


def quantize(model: str, out: Path, recipe: GgufRecipe, running: Running, part: tuple[int, int] | None) -> None:
    """``qconv quantize`` of a GGUF recipe."""
    start = time.monotonic()
    with running.reading(model, out) as (folder, means):
        from qconv.building.gguf_pipeline import quantize_gguf

        outcome = quantize_gguf(folder, out, recipe, part=part, **means)
    if outcome.share is not None:
        print_share(outcome.share, outcome.out, out, start, running.as_json)
        return
    result = build_values(outcome) | costs(start)
    if running.as_json:
        print_json(result)
    else:
        print_build(result)
        print_costs(result)
        print_other_way(recipe)


def build_values(outcome: Outcome) -> dict[str, Any]:
    """What a finished run says of its build."""
    out, report = outcome.out, outcome.report
    figures = {name: one["snr_db"] for name, one in report["tensors"].items() if one["snr_db"] is not None}
    worst = min(figures, key=lambda name: figures[name], default=None)
    return {
        "path": str(out),
        "already_complete": outcome.already_complete,
        "format": report["format"],
        "files": report["files"],
        "types": Counter(one["type"] for one in report["tensors"].values()),
        "parameters": report["parameters"],
        "bits_per_weight": report["bits_per_weight"],
        "bytes": sum((out / name).stat().st_size for name in report["files"]),
        "method": report.get("method", "rtn"),
        "imatrix": report["imatrix"],
        "left_out": report.get("left_out", []),
        "engines": report.get("engines", []),
        "least_snr": None if worst is None else {"tensor": worst, "snr_db": figures[worst]},
        **error_values(report),
    }


def print_build(result: Mapping[str, Any]) -> None:
    """Print what :func:`build_values` gave."""
    console = stdout()
    done = "already complete; nothing to do" if result["already_complete"] else "done, read back and checked"
    say(console, f"{result['path']}: {done}")
    say(console, f"files        {len(result['files'])}, the first {result['files'][0]}")
    say(console, f"size         {size(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight")
    say(console, f"types        {', '.join(f'{count} {name}' for name, count in result['types'].items())}")
    for part in result["left_out"]:
        say(console, f"left out     {part['tensors']:,} tensors of {part['part']}, {size(part['nbytes'])}")
    if result["method"] != "rtn":
        say(console, f"method       {result['method']}: layers calibrated, each linear on its own type's grid")
    if result["imatrix"] is not None:
        _print_imatrix(result["imatrix"])
    if result["least_snr"] is not None:
        say(console, f"least SNR    {result['least_snr']['snr_db']:.1f} dB, {result['least_snr']['tensor']}")
    print_error(result)
    print_engines(result["engines"])


def _print_imatrix(imatrix: Mapping[str, Any]) -> None:
    console, coverage = stdout(), imatrix["coverage"]
    where = "" if imatrix["file"] is None else f", kept as {imatrix['file']}"
    say(console, f"imatrix      {coverage['covered']} of {coverage['weights']} weights in layers{where}")
    print_coverage(coverage)


def print_coverage(coverage: Mapping[str, Any]) -> None:
    """A line about the experts' tokens, if there are experts."""
    if coverage["experts"]:
        say(
            stdout(),
            f"coverage     tokens per expert: least {coverage['least']:,}, median {coverage['median']:,}, most "
            f"{coverage['most']:,}; {coverage['without_tokens']} of {coverage['experts']} experts without tokens",
        )
        for one in coverage.get("by_corpus", ()):
            say(stdout(), f"             {corpus_line(one)}")


def plan(model: str, recipe: GgufRecipe, as_json: bool, devices: str | None = None) -> None:
    """``qconv plan`` of a GGUF recipe: sizes by type, from config.json and the tokenizer alone."""
    from qconv.checkpoint.hub import least_disk_budget, resolve_model
    from qconv.planning.gguf_outline import outline

    folder = resolve_model(model, weights=False)
    planned, least = outline(folder, recipe), least_disk_budget(model, folder)
    if as_json:
        print_json(plan_values(planned) | plan_costs_values(planned.costs, least))
    else:
        print_plan(planned, recipe)
        print_plan_costs(planned.costs, least, devices)
        print_other_way(recipe)


def plan_values(planned: Outline) -> dict[str, Any]:
    """What a build would hold."""
    infos = planned.tensors
    numel, nbytes = sum(math.prod(info.shape) for info in infos), sum(info.nbytes for info in infos)
    tensors = [
        {"name": info.name, "type": info.type.name, "shape": list(info.shape), "bytes": info.nbytes} for info in infos
    ]
    return {
        "parameters": numel,
        "output_bytes": nbytes,
        "bits_per_weight": 8.0 * nbytes / numel,
        "notices": planned.notices,
        "tensors": tensors,
    }


def print_plan(planned: Outline, recipe: GgufRecipe) -> None:
    """Print it by type."""
    console, infos = stdout(), planned.tensors
    numel, nbytes = sum(math.prod(info.shape) for info in infos), sum(info.nbytes for info in infos)
    _print_types(console, [(info.type.name, math.prod(info.shape), info.nbytes) for info in infos])
    say(console, "")
    say(
        console,
        f"output       {size(nbytes)} ({nbytes / 2**30:.1f} GiB) as gguf:{recipe.type}, "
        f"{8 * nbytes / numel:.2f} bits per weight",
    )
    for notice in planned.notices:
        say(console, f"notice       {notice}")


def inspect(path: Path, view: str | None, as_json: bool, page: Path | None = None) -> None:
    """``qconv inspect`` of a GGUF file or set; ``view`` is ``tensors``, ``roles``, or None for types."""
    from qconv.artifacts.bits import gguf_bits
    from qconv.formats.gguf.reader import IMATRIX_TYPE, GgufModel

    made = GgufModel.open(path)
    if made.metadata.get("general.type") == IMATRIX_TYPE:
        if page is not None:
            raise UsageError(f"--html: {path} is an importance matrix, no build.", hint="Give the build's folder.")
        _inspect_imatrix(path, as_json)
        return
    numel = sum(entry.numel for entry in made.entries.values())
    nbytes = sum(entry.nbytes for entry in made.entries.values())
    if page is not None:
        write_page(page, path, nbytes, numel, gguf_bits(_matrices(made)))
        return
    if as_json:
        print_json(_values(made, numel, nbytes, view))
        return
    console = stdout()
    say(console, str(path))
    say(console, f"architecture  {made.metadata.get('general.architecture')}, {made.metadata.get('general.name')}")
    say(console, f"size          {numel:,} weights, {size(nbytes)}, {8 * nbytes / numel:.2f} bits per weight")
    say(console, f"files         {len(made.entries)} tensors in {len(made.files)} files")
    say(console, "")
    if view == "roles":
        print_roles(console, gguf_bits(_matrices(made)))
    elif view == "tensors":
        rows = [(name, one.type.name, shape(one.shape), size(one.nbytes)) for name, one in made.entries.items()]
        print_table(console, ("tensor", "type", "shape", "size"), rows)
    else:
        _print_types(console, [(one.type.name, one.numel, one.nbytes) for one in made.entries.values()])


def _inspect_imatrix(path: Path, as_json: bool) -> None:
    """What an importance matrix was collected on, and how many tokens its entries saw."""
    from qconv.formats.gguf.imatrix import read_imatrix

    matrix = read_imatrix(path / "imatrix.gguf" if path.is_dir() else path)
    rows = []
    for name, entry in matrix.entries.items():
        seen = entry.seen
        rows.append(
            {
                "name": name,
                "experts": len(seen),
                "columns": entry.sums.shape[1],
                "least_tokens": int(seen.min()),
                "most_tokens": int(seen.max()),
                "without_tokens": int((seen == 0).sum()),
            }
        )
    if as_json:
        print_json({"datasets": matrix.datasets, "chunk_size": matrix.chunk_size, "entries": rows})
        return
    console = stdout()
    say(console, f"{path}: an importance matrix of {len(rows)} weights")
    say(console, f"text  {'; '.join(matrix.datasets) or 'not said'}")
    say(console, "")
    cells = [tuple(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()) for row in rows]
    print_table(console, ("weight", "experts", "columns", "least tokens", "most", "experts without"), cells)


def _print_types(console: Console, tensors: Sequence[tuple[str, int, int]]) -> None:
    """A row for each type of tensors given as type, elements and bytes."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for name, numel, nbytes in tensors:
        groups.setdefault(name, []).append((numel, nbytes))
    rows = []
    for name, sizes in groups.items():
        numel, nbytes = (sum(column) for column in zip(*sizes, strict=True))
        rows.append((name, f"{len(sizes):,}", f"{numel:,}", size(nbytes), bits(8.0 * nbytes / numel)))
    print_table(console, ("type", "tensors", "weights", "size", "bits"), rows)


def _matrices(made: GgufModel) -> dict[str, tuple[int, int]]:
    """Bytes and weights by name of what is no vector."""
    return {name: (one.nbytes, one.numel) for name, one in made.entries.items() if len(one.shape) > 1}


def _values(made: GgufModel, numel: int, nbytes: int, view: str | None) -> dict[str, Any]:
    from qconv.artifacts.bits import gguf_bits

    values: dict[str, Any] = {
        "files": [str(file) for file in made.files],
        "metadata": {key: _plain(value) for key, value in made.metadata.items()},
        "parameters": numel,
        "bytes": nbytes,
        "bits_per_weight": 8.0 * nbytes / numel if numel else math.nan,
        "types": Counter(entry.type.name for entry in made.entries.values()),
    }
    if view == "roles":
        values["bits_by_layer"] = gguf_bits(_matrices(made)).values()
    if view == "tensors":
        values["tensors"] = [
            {"name": name, "type": one.type.name, "shape": list(one.shape), "bytes": one.nbytes}
            for name, one in made.entries.items()
        ]
    return values


def _plain(value: Any) -> Any:
    """A metadata value as JSON shows it: of a long list (a vocabulary) its length alone."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        return value
    if len(value) > _SHOWN_VALUES:
        return f"{len(value)} values"
    return value.tolist() if hasattr(value, "tolist") else list(value)
