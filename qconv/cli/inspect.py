"""``qconv inspect``: what a checkpoint or build consists of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli import gguf
from qconv.cli.build_page import require_writable, write_page
from qconv.cli.console import bits, print_json, print_roles, print_table, say, shape, short_names, size, stdout
from qconv.cli.examples import examples
from qconv.cli.options import json_option
from qconv.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from qconv.artifacts.inspection import Inspection, ModuleClass

_SKIPPED_SHOWN = 8
_TELLING = (
    *("format", "fmt", "bits", "num_bits", "type", "group_size", "strategy", "weight_block_size", "block_structure"),
    *("symmetric", "sym", "zero_point", "activation_scheme", "version"),
)
"""Keys of a quantization_config that the summary shows."""


@click.command(
    short_help="Show what a checkpoint or build consists of.",
    epilog=examples(
        "qconv inspect BUILD --roles",
        "qconv inspect BUILD --html build.html",
        "qconv inspect model-Q4_K_M.gguf --tensors",
    ),
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--layers", "view", flag_value="layers", help="A row for each layer.")
@click.option("--roles", "view", flag_value="roles", help="Bits per weight by layer and role.")
@click.option("--tensors", "view", flag_value="tensors", help="A row for each tensor.")
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path),
    metavar="PAGE",
    help="Write one offline page instead: error by layer and role, coverage of every expert, bits by role.",
)
@json_option
def command(path: Path, view: str | None, page: Path | None, as_json: bool) -> None:
    """Show what PATH consists of: format, layers, types, shapes, sizes, bits per weight.

    PATH is the folder of any checkpoint or build in safetensors or GGUF, or one such file. Only headers are read, and
    for a page the build's own report.
    """
    from qconv.artifacts.inspection import inspect
    from qconv.boundary.content import is_gguf
    from qconv.folders.state import require_finished

    if not path.exists():
        raise UsageError(f"{path}: no such file or folder.", hint="inspect reads what is on this machine.")
    if page is not None:
        if view is not None or as_json:
            raise UsageError("--html writes a page of its own, with all views.", hint="Leave the other options out.")
        require_writable(page, path)
    if is_gguf(path):
        require_finished(path if path.is_dir() else path.parent)
        gguf.inspect(path, view, as_json, page)
        return

    inspection = inspect(path)
    if page is not None:
        write_page(page, path, inspection.nbytes, inspection.weights, inspection.bits_by_layer)
        return
    if as_json:
        print_json(_values(inspection, view))
        return
    console = stdout()
    _print_summary(console, inspection)
    say(console, "")
    if view == "layers":
        _print_layers(console, inspection)
    elif view == "roles":
        print_roles(console, inspection.bits_by_layer)
    elif view == "tensors":
        _print_tensors(console, inspection)
    else:
        _print_classes(console, inspection)


def _values(inspection: Inspection, view: str | None) -> dict[str, Any]:
    values = {
        "path": str(inspection.path),
        "architecture": inspection.architecture,
        "known_architecture": inspection.known,
        "format": inspection.format,
        "quantization": inspection.quantization,
        "skipped": inspection.skipped,
        "layers": inspection.layer_count,
        "tensors": len(inspection.entries),
        "shards": inspection.shards,
        "weights": inspection.weights,
        "bytes": inspection.nbytes,
        "bits_per_weight": inspection.bits_per_weight,
        "notices": inspection.notices,
        "classes": [_class_values(one) for one in inspection.classes],
    }
    from qconv.artifacts.inspection import OUTSIDE

    if view == "layers":
        values["by_layer"] = [
            {
                "name": None if layer.name == OUTSIDE else layer.name,
                "tensors": layer.tensors,
                "weights": layer.weights,
                "bytes": layer.nbytes,
                "bytes_by_dtype": dict(layer.dtypes),
            }
            for layer in inspection.layers
        ]
    if view == "roles":
        values["bits_by_layer"] = inspection.bits_by_layer.values()
    if view == "tensors":
        values["by_tensor"] = [
            {
                "name": entry.name,
                "dtype": dtype,
                "shape": entry.shape,
                "bytes": entry.nbytes,
                "file": entry.file.name,
                "offset": entry.offset,
            }
            for entry, dtype in _entries(inspection)
        ]
    return values


def _class_values(one: ModuleClass) -> dict[str, Any]:
    return {
        "name": one.name,
        "modules": one.modules,
        "weights": one.weights,
        "bytes": one.nbytes,
        "bits_per_weight": one.bits_per_weight,
        "tensors": [
            {"name": leaf, "dtype": dtype, "shape": dimensions, "count": count}
            for (leaf, dtype, dimensions), count in one.tensors.items()
        ],
    }


def _print_summary(console: Console, inspection: Inspection) -> None:
    known = "" if inspection.known or inspection.architecture is None else " (unknown to qconv)"
    say(console, str(inspection.path), style="bold")
    say(console, f"architecture  {inspection.architecture or 'not named'}{known}, {inspection.layer_count} layers")
    say(console, f"quantization  {_quantization(inspection)}")
    say(
        console,
        f"size          {inspection.weights:,} weights, {size(inspection.nbytes)}, "
        f"{bits(inspection.bits_per_weight)} bits per weight",
    )
    say(console, f"files         {len(inspection.entries):,} tensors in {inspection.shards} shards")
    if inspection.skipped:
        say(console, f"skip list     {_skip_summary(inspection.skipped)}")
    for notice in inspection.notices:
        say(console, f"note          {notice}")


def _quantization(inspection: Inspection) -> str:
    values = inspection.quantization
    if values is None:
        return "none"
    method = str(values.get("quant_method", "not named"))
    ours = f"format {inspection.format}" if inspection.format else "a layout that qconv does not read"
    groups = _groups(values)
    if len(groups) > 1:
        return f"{method} ({ours}), {len(groups)} groups: {'; '.join(groups)}"
    details = {key.rpartition(".")[2]: value for key, value in values.items() if "activations" not in key}
    shown = [f"{key} {details[key]}" for key in _TELLING if key in details]
    return ", ".join([f"{method} ({ours})", *shown])


def _groups(values: Mapping[str, Any]) -> list[str]:
    """How compressed-tensors' config groups quantize weights, in a few words each."""
    prefix = "config_groups."
    names = dict.fromkeys(key.removeprefix(prefix).partition(".")[0] for key in values if key.startswith(prefix))
    telling = ("num_bits", "type", "strategy", "group_size", "block_structure")
    said = ([values.get(f"{prefix}{name}.weights.{key}") for key in telling] for name in names)
    return [" ".join(str(value) for value in group if value is not None) for group in said]


def _skip_summary(skipped: tuple[str, ...]) -> str:
    from qconv.artifacts.inspection import name_class

    kinds = Counter(map(name_class, skipped))
    shown = [kind if count == 1 else f"{kind} ({count})" for kind, count in kinds.items()]
    more = f" and {len(shown) - _SKIPPED_SHOWN} more" if len(shown) > _SKIPPED_SHOWN else ""
    return f"{len(skipped)} entries: {', '.join(shown[:_SKIPPED_SHOWN])}{more}"


def _print_classes(console: Console, inspection: Inspection) -> None:
    rows = [
        (
            name,
            f"{one.modules:,}",
            _tensors(one),
            size(one.nbytes),
            bits(one.bits_per_weight),
        )
        for name, one in zip(short_names([one.name for one in inspection.classes]), inspection.classes, strict=True)
    ]
    print_table(console, ("modules", "count", "tensors", "size", "bits"), rows)


def _tensors(one: ModuleClass) -> str:
    """Leaf names with dtype and shape, a line each; the shapes of one leaf that differ are counted, not listed."""
    leaves: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for leaf, dtype, dimensions in one.tensors:
        leaves.setdefault((leaf, dtype), []).append(dimensions)
    return "\n".join(
        f"{leaf} {dtype} {shape(shapes[0]) if len(shapes) == 1 else f'in {len(shapes)} shapes'}"
        for (leaf, dtype), shapes in leaves.items()
    )


def _print_layers(console: Console, inspection: Inspection) -> None:
    from qconv.artifacts.inspection import OUTSIDE

    rows = [
        (
            "outside layers" if layer.name == OUTSIDE else layer.name,
            f"{layer.tensors:,}",
            f"{layer.weights:,}",
            size(layer.nbytes),
            bits(8.0 * layer.nbytes / layer.weights if layer.weights else None),
            "\n".join(f"{dtype} {100 * nbytes / layer.nbytes:.1f} %" for dtype, nbytes in layer.dtypes.most_common()),
        )
        for layer in inspection.layers
    ]
    print_table(console, ("layer", "tensors", "weights", "size", "bits", "types"), rows)


def _print_tensors(console: Console, inspection: Inspection) -> None:
    rows = [
        (entry.name, dtype, shape(entry.shape), size(entry.nbytes), entry.file.name)
        for entry, dtype in _entries(inspection)
    ]
    print_table(console, ("tensor", "type", "shape", "size", "file"), rows)


def _entries(inspection: Inspection) -> list[tuple[Any, str]]:
    from qconv.artifacts.inspection import natural_order

    ordered = sorted(inspection.entries.values(), key=lambda entry: natural_order(entry.name))
    return [(entry, entry.dtype_name) for entry in ordered]
