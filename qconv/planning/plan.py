"""From a config and a recipe, everything that a build will hold, before any weight is read.

A plan is a list of units in the order of the work: the embeddings, each layer, the head. A unit's shards are committed
together. The plan knows every output tensor's name, dtype and shape, so sizes are exact; memory and disk for scratch
files are modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qconv.checkpoint.header import TensorSpec, encode_header
from qconv.core.architecture import HEAD, Architecture, Layer, Linear, Norm
from qconv.core.qtensor import CHANNEL, Grid
from qconv.engines.rules import TRANSFORMERS, limits
from qconv.errors import RecipeError
from qconv.executors.threads import default_workers
from qconv.formats import get_format
from qconv.formats.base import Format
from qconv.planning.fitting import check_shapes, check_skips, group_sizes
from qconv.planning.recipe import Recipe

Module = Linear | Norm
DtypeOf = Callable[[str], torch.dtype]
"""The stored dtype of a source tensor by name."""


@dataclass(frozen=True, slots=True)
class Item:
    """One source module and the tensors it becomes."""

    module: Module
    quantized: bool
    specs: tuple[TensorSpec, ...]

    @property
    def size(self) -> int:
        """How many of its weights memory holds while it is worked on; what is copied goes block by block."""
        return self.module.numel if self.quantized else 0


@dataclass(frozen=True, slots=True)
class Unit:
    """What is committed together. ``layer`` is None for the embeddings and the head."""

    key: str
    layer: Layer | None
    items: tuple[Item, ...]
    shards: tuple[tuple[str, tuple[TensorSpec, ...]], ...]

    @property
    def weights(self) -> int:
        """The number of weights of the unit's modules."""
        return sum(item.module.numel for item in self.items)

    @property
    def nbytes(self) -> int:
        """Bytes of the unit's tensors."""
        return sum(spec.nbytes for item in self.items for spec in item.specs)


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """A whole build."""

    architecture: Architecture
    recipe: Recipe
    format: Format
    grid: Grid
    units: tuple[Unit, ...]

    @property
    def needs_calibration(self) -> bool:
        """Whether activations are looked at: by the method, or for the stored scales of static activations."""
        return self.recipe.looks_at_activations or self.grid.activations == "static"

    @property
    def scheme(self) -> str:
        """What quantized weights become, in words: ``4 bits in groups of 128``."""
        grid = self.grid
        if not grid.is_float:
            spread = ", one scale a row" if grid.group_size == CHANNEL else f" in groups of {grid.group_size}"
            return f"{grid.bits} bits{spread}"
        if grid.group_size != CHANNEL:
            spread = f" in blocks of {grid.block_rows} x {grid.group_size}"
        else:
            spread = f", one scale a {'weight' if grid.block_rows == CHANNEL else 'row'}"
        return f"FP8 (E4M3){spread}, {grid.activations} activations"

    def notices(self) -> list[str]:
        """What a reader of the build may stumble over, as sentences."""
        experts = any(".experts." in linear.name for linear in self.quantized)
        sentences = [str(limit) for limit in limits(self.format.name, self.grid, experts=experts)]
        grid = self.grid
        if not grid.is_float or CHANNEL in (grid.block_rows, grid.group_size):
            return sentences
        ragged = [linear for linear in self.quantized if linear.out_features % grid.block_rows]
        if ragged:
            first = ragged[0]
            sentences.append(
                f"{len(ragged)} linears are not whole blocks of {grid.block_rows} x {grid.group_size}, the first "
                f"{first.name} of {first.out_features} x {first.in_features}: {TRANSFORMERS} refuses or misreads them"
            )
        return sentences

    def allowance(self, workers: int) -> float:
        """How many weights may be in flight, in the unit that is made and the one that is checked together.

        As many as the workers look ahead if all matrices were of average size. A layer's few large ones (a MoE's
        attention) then wait for each other, and making a layer beside the check of another takes no more memory than
        making one.
        """
        sizes = [item.size for item in self.items() if item.size]
        return (workers + 1) * sum(sizes) / max(1, len(sizes))

    def items(self) -> Iterator[Item]:
        """All items in file order."""
        for unit in self.units:
            yield from unit.items

    @property
    def quantized(self) -> list[Linear]:
        """The linears that are quantized, in file order."""
        return [item.module for item in self.items() if item.quantized and isinstance(item.module, Linear)]

    @property
    def skipped(self) -> list[str]:
        """The linears that are not, by name: routers, what the recipe skips, and lm_head.

        A tied head has no tensor in the build, and yet is a linear to every reader.
        """
        ends = (self.architecture.embedding.name, HEAD)
        inner = [
            item.module.name
            for item in self.items()
            if not item.quantized and isinstance(item.module, Linear) and item.module.name not in ends
        ]
        return [*inner, HEAD]

    @property
    def weights(self) -> int:
        """The number of parameters of the source."""
        return sum(_numel(shape) for _, shape in self.architecture.tensors())

    @property
    def output_bytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(
            len(encode_header(specs)) + sum(spec.nbytes for spec in specs)
            for unit in self.units
            for _, specs in unit.shards
        )

    @property
    def bits_per_weight(self) -> float:
        """Output tensor bits over source parameters."""
        return 8.0 * sum(unit.nbytes for unit in self.units) / self.weights

    @property
    def quantized_bits_per_weight(self) -> float:
        """The same over the quantized linears alone."""
        items = [item for item in self.items() if item.quantized]
        numel = sum(item.module.numel for item in items if isinstance(item.module, Linear))
        return 8.0 * sum(spec.nbytes for item in items for spec in item.specs) / numel if numel else 0.0


def make_plan(architecture: Architecture, recipe: Recipe, dtype_of: DtypeOf) -> BuildPlan:
    """Plan a build.

    Args:
        architecture: The source's architecture.
        recipe: The recipe.
        dtype_of: The stored dtype of each source tensor.

    Raises:
        RecipeError: the format cannot hold the grid or a linear, engines cannot read one, or what is skipped does not
            fit the model.
    """
    output_format = get_format(recipe.format)
    grid = output_format.grid(recipe.grid, dtype_of(architecture.layers[0].attention.q.weight))
    if grid.is_float and recipe.searches_scales:
        raise RecipeError(
            f"method: {recipe.method_name} searches scales for integers, and format {output_format.name} holds floats.",
            hint="Take method rtn or gptq, or an integer format.",
        )
    if grid.activations == "static" and recipe.looks_at_activations:
        raise RecipeError(
            f"method: {output_format.name} is rounded to nearest, with one scale for all linears that engines fuse.",
            hint="Take method rtn, or format fp8_dynamic.",
        )
    if grid.is_float and recipe.gptq.ordering == "desc_act":
        raise RecipeError(
            "gptq.ordering: desc_act orders the groups of integers, and this format has blocks of floats."
        )
    if recipe.rounding is not None and recipe.gptq.ordering == "desc_act":
        grid = _in_act_order(grid, output_format)
    check_skips(architecture, recipe)
    check_shapes(architecture, recipe, output_format, grid)

    def item(module: Module, quantizable: bool = False) -> Item:
        dense = tuple(TensorSpec(name, dtype_of(name), shape) for name, shape in module.tensors())
        if not isinstance(module, Linear) or not quantizable or recipe.skips(module.name):
            return Item(module, False, dense)
        packed = output_format.specs(module.name, module.out_features, module.in_features, grid)
        return Item(module, True, (*packed, *dense[1:]))

    groups: list[tuple[str, Layer | None, list[Item]]] = [("embeddings", None, [item(architecture.embedding)])]
    for layer in architecture.layers:
        routers = layer.routers()
        items = [item(module, module not in routers) for module in layer_modules(layer)]
        groups.append((f"layer-{layer.index:05d}", layer, items))
    head = [item(architecture.final_norm)]
    if architecture.lm_head is not None:
        head.append(item(architecture.lm_head))
    groups.append(("head", None, head))

    limit = recipe.output.max_shard_size
    cuts = [list(_cut([spec for item in items for spec in item.specs], limit)) for _, _, items in groups]
    total = sum(map(len, cuts))
    units, number = [], 0
    for (key, layer_or_none, items), shards in zip(groups, cuts, strict=True):
        named = []
        for specs in shards:
            number += 1
            named.append((f"model-{number:05d}-of-{total:05d}.safetensors", tuple(specs)))
        units.append(Unit(key, layer_or_none, tuple(items), tuple(named)))
    return BuildPlan(architecture, recipe, output_format, grid, tuple(units))


def layer_modules(layer: Layer) -> Iterator[Module]:
    """A layer's modules in the order in which they are finished and written."""
    yield layer.input_norm
    yield from layer.attention.linears()
    yield from layer.attention.head_norms
    yield layer.post_attention_norm
    yield from layer.routers()
    for mlp in layer.mlps():
        yield from mlp.linears()


def topology_problems(plan: BuildPlan, ranks: int) -> list[str]:
    """Why a tensor-parallel serving topology of that many ranks cannot hold the build; empty if it can.

    q, k, v, gate and up are split along their output, o and down along their input; a rank must own whole heads, whole
    packed words, and whole groups or blocks. Where there are fewer key-value heads than ranks, each rank owns one.
    """
    model, problems = plan.architecture, []
    if model.num_attention_heads % ranks:
        problems.append(f"{model.num_attention_heads} attention heads do not split over {ranks} ranks")
    if model.num_key_value_heads % ranks and ranks % model.num_key_value_heads:
        problems.append(f"{model.num_key_value_heads} key-value heads neither split over nor repeat on {ranks} ranks")
    quantized = {linear.name for linear in plan.quantized}
    width = plan.grid.group_size
    height = max(plan.format.pack_columns, plan.grid.block_rows)
    owners = min(ranks, model.num_key_value_heads)
    seen: set[str] = set()
    for layer in model.layers:
        mlps, attention = layer.mlps(), layer.attention
        columns = [(attention.q, ranks), (attention.k, owners), (attention.v, owners)]
        columns += [(linear, ranks) for mlp in mlps for linear in (mlp.gate, mlp.up)]
        rows = [attention.o, *(mlp.down for mlp in mlps)]
        for linear, parts, size, unit, what in (
            *((one, parts, one.out_features, height, "output features") for one, parts in columns),
            *((one, ranks, one.in_features, max(width, 1), "input features") for one in rows),
        ):
            if size % parts == 0 and (linear.name not in quantized or (size // parts) % unit == 0):
                continue
            kind = linear.name.rpartition(".")[2]
            problem = f"{kind}: {size} {what} over {parts} ranks are {size / parts:g} each, not a multiple of {unit}"
            if problem not in seen:
                seen.add(problem)
                problems.append(f"{problem} (first in {linear.name})")
    return problems


def topology_group_sizes(plan: BuildPlan, ranks: int) -> list[int]:
    """The group sizes with which that topology can hold the build; empty where none helps."""
    sizes = group_sizes(plan.quantized, plan.format, plan.recipe, plan.grid)
    others = {size: replace(plan, grid=replace(plan.grid, group_size=size)) for size in sizes}
    return [size for size, other in others.items() if not topology_problems(other, ranks)]


@dataclass(frozen=True, slots=True)
class Costs:
    """Modelled costs of a run, in bytes."""

    memory: int
    scratch: int


def modelled_costs(plan: BuildPlan) -> Costs:
    """Peak resident memory and scratch disk, modelled from shapes: not measured.

    Memory is the interpreter with torch; for rounding, blocks of the source, and codes and packed words of what may be
    in flight, at least the largest linear; for calibration, the float32 copies that the attention search or one expert
    needs and a window of activations.
    GPTQ holds Hessians and their factors besides: attention's, then those of one expert for each processor.
    """
    if not plan.needs_calibration:
        largest = max((linear.numel for linear in plan.quantized), default=0)
        return Costs(350 * 2**20 + 2 * int(max(largest, plan.allowance(default_workers()))), 0)
    interpreter = 450 * 2**20
    tokens = plan.recipe.calibration.tokens
    hidden = plan.architecture.hidden_size
    layers = plan.architecture.layers
    attention = max(sum(one.numel for one in layer.attention.linears()) for layer in layers)
    mlp = max(sum(one.numel for one in mlp.linears()) for layer in layers for mlp in layer.mlps())
    widest = max((linear.in_features for linear in plan.quantized), default=0)
    window = 4 * 16384 * (hidden + 2 * widest)
    scratch = tokens * hidden * (2 + 2 + 2 + 4) * plan.recipe.calibration.streams
    working = 4 * 4 * max(attention, mlp)
    if plan.recipe.rounding is not None:
        working = max(
            4 * (3 * attention + hidden**2 + 3 * max(layer.attention.o.in_features for layer in layers) ** 2),
            4 * (hidden**2 + default_workers() * (3 * mlp + 4 * hidden**2)),
        )
    return Costs(interpreter + 650 * 2**20 + working + window, scratch)


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _cut(specs: Sequence[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if shard and size + spec.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(spec)
        size += spec.nbytes
    yield shard


def _in_act_order(grid: Grid, output_format: Format) -> Grid:
    if not output_format.act_order:
        raise RecipeError(
            f"gptq.ordering: format {output_format.name} has no place for desc_act's column order.",
            hint="Take ordering static, which needs none and is about as good, or format gptq.",
        )
    return replace(grid, act_order=True)
