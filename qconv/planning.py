"""A plan from config.json and the index alone, and its sizes by class of module: what ``qconv plan`` shows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qconv.checkpoint.header import DTYPE_NAMES
from qconv.checkpoint.reader import INDEX_NAME, read_json
from qconv.errors import CheckpointError
from qconv.inspection import name_class
from qconv.models import Architecture, architecture
from qconv.plan import BuildPlan, Costs, Item, make_plan, modelled_costs
from qconv.recipe import Recipe
from qconv.source import WEIGHT_DTYPES, require_unquantized

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}


@dataclass(slots=True)
class PlannedClass:
    """Modules whose names differ in numbers alone, and that are treated alike.

    Attributes:
        name: The common name, ``*`` for each number.
        scheme: What they become: bits and group size of the grid, or their own dtype.
        shapes: The distinct shapes of their weights, in order of appearance.
        modules: How many there are.
        weights: How many weights they hold together, biases included.
        source_bytes: Bytes of their source tensors.
        output_bytes: Bytes of what they become.
    """

    name: str
    scheme: str
    shapes: list[tuple[int, ...]]
    modules: int = 0
    weights: int = 0
    source_bytes: int = 0
    output_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Bits of what they become over weights."""
        return 8.0 * self.output_bytes / self.weights


@dataclass(frozen=True, slots=True)
class Estimate:
    """A plan with its totals.

    Attributes:
        path: The model's folder.
        plan: The plan.
        dtype: The source's dtype by config.json, as safetensors spells it.
        notices: What does not fit together, as sentences.
        classes: Sizes by class, in file order.
        source_bytes: Bytes of the source's tensors.
        output_bytes: Bytes of the build's shards, headers included.
        costs: Modelled memory and scratch disk.
    """

    path: Path
    plan: BuildPlan
    dtype: str
    notices: tuple[str, ...]
    classes: tuple[PlannedClass, ...]
    source_bytes: int
    output_bytes: int
    costs: Costs

    @property
    def weights(self) -> int:
        """The number of parameters of the source."""
        return sum(row.weights for row in self.classes)

    @property
    def shards(self) -> int:
        """The number of the build's shards."""
        return sum(len(unit.shards) for unit in self.plan.units)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the build's tensors over the source's parameters."""
        return 8.0 * sum(row.output_bytes for row in self.classes) / self.weights


def estimate(path: Path, recipe: Recipe) -> Estimate:
    """Plan a build of the model in a folder; no shard needs to be there.

    Raises:
        CheckpointError: config.json is missing, damaged, of unknown architecture or of a quantized model.
        RecipeError: the recipe does not fit the model.
    """
    config = read_json(path / "config.json")
    require_unquantized(path, config)
    model = architecture(config)
    dtype = _dtype(path, config)
    plan = make_plan(model, recipe, lambda name: dtype)
    classes = _classes(plan, dtype)
    return Estimate(
        path=path,
        plan=plan,
        dtype=DTYPE_NAMES[dtype],
        notices=tuple(_notices(path, model)),
        classes=classes,
        source_bytes=sum(row.source_bytes for row in classes),
        output_bytes=plan.output_bytes,
        costs=modelled_costs(plan),
    )


def _dtype(path: Path, config: dict[str, Any]) -> torch.dtype:
    name = config.get("dtype", config.get("torch_dtype", "bfloat16"))
    if name not in _DTYPES:
        raise CheckpointError(
            f"{path / 'config.json'}: dtype {name!r} is none of {', '.join(_DTYPES)}.",
            hint="Give the original, unquantized checkpoint.",
        )
    return _DTYPES[name]


def _classes(plan: BuildPlan, dtype: torch.dtype) -> tuple[PlannedClass, ...]:
    grid = plan.grid
    group = "channel" if grid.group_size == -1 else f"g{grid.group_size}"
    quantized = f"{grid.bits}-bit {group}"
    rows: dict[tuple[str, bool], PlannedClass] = {}
    for item in plan.items():
        name = name_class(item.module.name)
        row = rows.get((name, item.quantized))
        if row is None:
            row = PlannedClass(name, quantized if item.quantized else DTYPE_NAMES[dtype], [])
            rows[name, item.quantized] = row
        _add(row, item, dtype)
    return tuple(rows.values())


def _add(row: PlannedClass, item: Item, dtype: torch.dtype) -> None:
    row.modules += 1
    for number, (_, dimensions) in enumerate(item.module.tensors()):
        if number == 0 and dimensions not in row.shapes:
            row.shapes.append(dimensions)
        elements = math.prod(dimensions)
        row.weights += elements
        row.source_bytes += elements * dtype.itemsize
    row.output_bytes += sum(spec.nbytes for spec in item.specs)


def _notices(path: Path, model: Architecture) -> Iterator[str]:
    """Whether index and config.json are of one model, as far as names tell."""
    if not (path / INDEX_NAME).exists():
        yield f"no {INDEX_NAME}: planned from config.json alone"
        return
    listed = read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path / INDEX_NAME}: no weight_map.", hint="Download the index again.")
    expected = {name for name, _ in model.tensors()}
    for names, fault in (
        (sorted(expected - listed.keys()), "tensors of the model are not in the index"),
        (sorted(listed.keys() - expected - model.ignorable()), "tensors of the index are not part of the model"),
    ):
        if names:
            yield f"{len(names)} {fault}, the first {names[0]!r}: quantize will refuse"
    absent = sorted(shard for shard in set(listed.values()) if not (path / str(shard)).is_file())
    if absent:
        yield f"{len(absent)} of {len(set(listed.values()))} shards are not here, the first {absent[0]}"
