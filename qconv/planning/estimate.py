"""A plan from config.json and the index alone, and its sizes by class of module: what ``qconv plan`` shows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qconv.artifacts.dtypes import weight_dtype
from qconv.artifacts.inspection import SKIP_KEYS, name_class
from qconv.artifacts.opening import viewed_names
from qconv.artifacts.separation import require_readable_experts
from qconv.artifacts.source import listed_files
from qconv.artifacts.storage import Storage, bytes_a_weight, storage_of
from qconv.boundary.content import misplaced_files
from qconv.boundary.printable import name_of
from qconv.checkpoint.config import quantization_of
from qconv.checkpoint.fp8 import is_cache_scale
from qconv.checkpoint.header import DTYPE_NAMES
from qconv.checkpoint.reader import INDEX_NAME, in_config, read_json, read_weight_map
from qconv.checkpoint.rope import in_both_spellings
from qconv.core.architecture import Architecture
from qconv.core.qtensor import CHANNEL, Grid, Number
from qconv.engines.subject import Deployment, Subject
from qconv.engines.table import judgements
from qconv.formats.base import skip_list
from qconv.models import architecture
from qconv.planning.beside import Beside
from qconv.planning.costs import Costs, modelled_costs
from qconv.planning.engines import sentences, subject_of_plan
from qconv.planning.plan import BuildPlan, Item, make_plan
from qconv.planning.recipe import Recipe
from qconv.planning.schemes import LinearScheme, microscaling_name

_INPUTS: dict[Number, str] = {"int": "int8", "e4m3": "FP8", "e2m1": "FP4"}


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
        return 8.0 * self.output_bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A plan with its totals.

    Attributes:
        path: The model's folder.
        plan: The plan.
        dtype: The source's dtypes by config.json, as safetensors spells them.
        notices: What does not fit together, as sentences.
        classes: Sizes by class, in file order.
        source_bytes: Bytes of the source's tensors.
        output_bytes: Bytes of the build's shards, headers included; about, where shards of the source are not here that
            hold more than the model.
        costs: Modelled memory and scratch disk.
        subject: The build as engines will look at it.
    """

    path: Path
    plan: BuildPlan
    dtype: str
    notices: tuple[str, ...]
    classes: tuple[PlannedClass, ...]
    source_bytes: int
    output_bytes: int
    costs: Costs
    subject: Subject

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
        CheckpointError: config.json is missing, damaged, of unknown architecture, or of a quantization that is not
            read.
        RecipeError: the recipe does not fit the model.
        UsageError: experts are joined and quantized; config.json says two things of rotary embeddings.
    """
    config = read_json(path / "config.json")
    with in_config(path):
        storage = storage_of(path, config)
        model = architecture(config)
        in_both_spellings(config)
        dtype = weight_dtype(path, config)
    indexed, files = read_weight_map(path), listed_files(path)
    require_readable_experts(path, files, config, model)
    listed = viewed_names(config, model, files)
    stored = _Stored.of(dtype, storage, model, config, listed or None)
    beside = Beside.of(path, config, model, storage, dtype)
    plan = make_plan(model, recipe, lambda name: dtype, beside.verbatim)
    subject = subject_of_plan(plan, config, path)
    engines = sentences(judgements(subject, (), Deployment()), plan.format.name)
    classes = _classes(plan, stored, beside)
    guessed = beside.guessed_bytes(sum(row.source_bytes for row in classes))
    if guessed:
        classes = (*classes, _guessed_class(stored, beside, guessed))
    return Estimate(
        path=path,
        plan=plan,
        dtype=stored.dtypes,
        notices=(*_notices(path, model, stored, indexed, listed, beside, guessed), *plan.notices(), *engines),
        classes=classes,
        source_bytes=sum(row.source_bytes for row in classes),
        output_bytes=plan.output_bytes + (classes[-1].output_bytes if guessed else 0),
        costs=modelled_costs(plan),
        subject=subject,
    )


@dataclass(frozen=True, slots=True)
class _Stored:
    """How the source stores its tensors: plain ones as ``dtype``, the weights named in ``quantized`` by ``storage``."""

    dtype: torch.dtype
    storage: Storage | None
    quantized: frozenset[str]

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        storage: Storage | None,
        model: Architecture,
        config: dict[str, Any],
        listed: Collection[str] | None,
    ) -> _Stored:
        names = () if storage is None else _quantized(storage, model, config, listed)
        return cls(dtype, storage, frozenset(names))

    @property
    def dtypes(self) -> str:
        plain = DTYPE_NAMES[self.dtype]
        return plain if self.storage is None else f"{self.storage.name} and {plain}"

    def nbytes(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor, with its scales."""
        if self.storage is None or name not in self.quantized:
            return math.prod(shape) * self.dtype.itemsize
        return self.storage.nbytes(shape, name)

    def expected(self, model: Architecture) -> set[str]:
        """The tensors that an index must list, as far as names tell."""
        names = {name for name, _ in model.tensors()}
        if self.storage is None:
            return names
        codes = {self.storage.codes(name) for name in self.quantized}
        return (names - self.quantized) | codes

    def extras(self, listed: Iterable[str]) -> set[str]:
        """Names of the tensors that may stand beside quantized weights: their scales, those of activations, a cache."""
        if self.storage is None:
            return set()
        modules = [name.removesuffix("weight") for name in self.quantized]
        caches = {name for name in listed if is_cache_scale(name)} if self.quantized else set()
        return caches | {f"{module}{leaf}" for module in modules for leaf in self.storage.leaves}


def _quantized(
    storage: Storage, model: Architecture, config: dict[str, Any], listed: Collection[str] | None
) -> Iterator[str]:
    """Names of the weights that are quantized: those beside which the index lists what tells; else by the skip list."""
    if listed is not None:
        for name, shape in model.tensors():
            if len(shape) == 2 and any(name.removesuffix("weight") + leaf in listed for leaf in storage.marks):
                yield name
        return
    section = quantization_of(config)
    skipped = {entry for key in SKIP_KEYS for entry in skip_list(section, key)}
    for linear in (linear for layer in model.layers for linear in layer.linears()):
        parts = linear.name.split(".")
        if skipped.isdisjoint(".".join(parts[:count]) for count in range(1, len(parts) + 1)):
            yield linear.weight


def _classes(plan: BuildPlan, stored: _Stored, beside: Beside) -> tuple[PlannedClass, ...]:
    methods = {scheme.method for scheme in plan.schemes.values()}
    rows: dict[tuple[str, LinearScheme | None], PlannedClass] = {}
    for item in plan.items():
        name = name_class(item.module.name)
        row = rows.get((name, item.scheme))
        if row is None:
            said = DTYPE_NAMES[item.specs[0].dtype] if item.scheme is None else _scheme(item.scheme)
            if item.scheme is not None and len(methods) > 1:
                said = f"{said}, {item.scheme.method_name}"
            row = rows[name, item.scheme] = PlannedClass(name, said, [])
        _add(row, item, stored, beside)
    return tuple(rows.values())


def _guessed_class(stored: _Stored, beside: Beside, nbytes: int) -> PlannedClass:
    """What lies beside the model in so many bytes of the source, as if it were stored as the model's linears are."""
    weights = (
        nbytes // stored.dtype.itemsize if stored.storage is None else int(nbytes / bytes_a_weight(stored.storage))
    )
    output = weights * stored.dtype.itemsize
    return PlannedClass("beside the model", DTYPE_NAMES[stored.dtype], [], len(beside.names), weights, nbytes, output)


def _scheme(scheme: LinearScheme) -> str:
    """A grid and its values in two words."""
    return _grid(scheme.grid) if scheme.values is None else f"{_grid(scheme.grid)}, {scheme.values}"


def _grid(grid: Grid) -> str:
    """A grid in two words."""
    if not grid.is_float:
        inputs = "" if grid.activations == "none" else f", {_INPUTS[grid.activation_number]} inputs"
        return f"{grid.bits}-bit {'channel' if grid.group_size == CHANNEL else f'g{grid.group_size}'}{inputs}"
    if grid.has_global_scale or grid.scale_dtype is torch.float8_e8m0fnu:
        return microscaling_name(grid)
    if grid.group_size == CHANNEL:
        return f"FP8 {'tensor' if grid.block_rows == CHANNEL else 'channel'}"
    return f"FP8 {grid.block_rows}x{grid.group_size}"


def _add(row: PlannedClass, item: Item, stored: _Stored, beside: Beside) -> None:
    row.modules += 1
    for number, (name, dimensions) in enumerate(item.module.tensors()):
        if number == 0 and dimensions not in row.shapes:
            row.shapes.append(dimensions)
        row.weights += math.prod(dimensions)
        row.source_bytes += beside.nbytes.get(name, stored.nbytes(name, dimensions))
    row.output_bytes += sum(spec.nbytes for spec in item.specs)


def _notices(
    path: Path,
    model: Architecture,
    stored: _Stored,
    indexed: Mapping[str, str] | None,
    listed: Collection[str],
    beside: Beside,
    guessed: int,
) -> Iterator[str]:
    """Whether index and config.json are of one model, as far as names tell, and what lies there in files' stead."""
    misplaced = misplaced_files(path)
    for name, instead in list(misplaced.items())[:1]:
        more = f", and {len(misplaced) - 1} more" if len(misplaced) > 1 else ""
        yield f"{name_of(name)} is {instead.what}{more}: quantize will refuse. {instead.remedy.rstrip('.')}"
    if beside.unseen:
        yield beside.notice(guessed)
    if indexed is None:
        yield f"no {INDEX_NAME}: planned from config.json alone"
        return
    if stored.storage is not None and not stored.quantized:
        yield f"config.json says {stored.storage.said}, but the index lists no scale: quantize will refuse"
    if model.lm_head is None and f"{model.head_name}.weight" in listed:
        yield (
            f"config.json ties the head to the embedding, and the index lists {model.head_name}.weight all the same: "
            "unless that is a copy of the embedding, the build keeps it and is as much larger"
        )
    expected = stored.expected(model)
    for names, fault in (
        (sorted(expected - {*listed}), "tensors of the model are not in the index"),
        (
            sorted({*listed} - expected - model.ignorable() - stored.extras(listed) - beside.names),
            "tensors of the index are not part of the model",
        ),
    ):
        if names:
            yield f"{len(names)} {fault}, the first {names[0]!r}: quantize will refuse"
    absent = sorted(shard for shard in set(indexed.values()) if not (path / shard).is_file())
    if absent:
        yield f"{len(absent)} of {len(set(indexed.values()))} shards are not here, the first {absent[0]}"
