"""From a config and a recipe, everything that a build will hold, before any weight is read.

A plan is a list of units in the order of the work: the embeddings, each layer, the head, and what is copied beside them
shard by shard. A unit's shards are committed together. The plan knows every output tensor's name, dtype and shape, so
sizes are exact; memory and disk for scratch files are modelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from qconv.artifacts.source import Source
from qconv.artifacts.verbatim import Verbatim, copied, not_taken, parts_of
from qconv.checkpoint.extended_rope import with_extended_rope
from qconv.checkpoint.header import TensorSpec, encode_header
from qconv.core.architecture import Architecture, Attention, CacheScales, Layer, Linear, Module, Parameter
from qconv.core.qtensor import Grid
from qconv.errors import RecipeError
from qconv.formats import formats, get_format
from qconv.formats.base import Format
from qconv.formats.cache import CacheNaming
from qconv.formats.stacks import Stack, stacks
from qconv.planning.fitting import check_shapes
from qconv.planning.recipe import Recipe
from qconv.planning.schemes import LinearScheme, in_full, in_words, resolve

DtypeOf = Callable[[str], torch.dtype]
"""The stored dtype of a source tensor by name."""
ACTIVATION_BYTES = 2 + 2 + 2 + 4
"""On disk for each token and channel: a layer's inputs, its middle, the next one's inputs, and the running output."""


@dataclass(frozen=True, slots=True)
class Item:
    """One source module, the scheme of its weight if that is quantized, and the tensors it becomes."""

    module: Module | CacheScales
    scheme: LinearScheme | None
    specs: tuple[TensorSpec, ...]

    @property
    def quantized(self) -> bool:
        """Whether its weight is quantized."""
        return self.scheme is not None

    @property
    def size(self) -> int:
        """How many of its weights memory holds while it is worked on; what is copied goes block by block."""
        return self.module.numel if self.quantized else 0


@dataclass(frozen=True, slots=True)
class Unit:
    """What is committed together. ``layer`` is None for all but layers."""

    key: str
    layer: Layer | None
    items: tuple[Item, ...]
    shards: tuple[tuple[str, tuple[TensorSpec, ...]], ...]
    stacks: tuple[Stack, ...] = ()
    """Tensors of the shards that hold those of several items, which stand last."""

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
    schemes: Mapping[str, LinearScheme]
    """Of each linear that is quantized, by name."""
    units: tuple[Unit, ...]
    verbatim: tuple[Verbatim, ...] = ()
    """Tensors that are copied beside the model, in file order."""
    left_out: tuple[Verbatim, ...] = ()
    """Those that the format has no place for."""

    @property
    def needs_calibration(self) -> bool:
        """Whether activations are looked at: by a method, or for stored scales of inputs or of a cache."""
        return self.recipe.kv_cache is not None or any(
            one.method != ("rtn",) or one.grid.stores_inputs for one in set(self.schemes.values())
        )

    @property
    def is_static(self) -> bool:
        """Whether linears are rounded to floats by :class:`~qconv.calibration.schemes.StaticScheme`."""
        return any(grid.is_float and grid.activations == "static" for grid in self.grids())

    def grids(self) -> dict[Grid, list[str]]:
        """The linears that are quantized, by grid, in file order."""
        found: dict[Grid, list[str]] = {}
        for linear in self.quantized:
            found.setdefault(self.schemes[linear.name].grid, []).append(linear.name)
        return found

    @property
    def method_name(self) -> str:
        """The method as one word; of several the recipe's, and those of rules."""
        used = dict.fromkeys((self.recipe.method, *(scheme.method for scheme in self.schemes.values())))
        return ", ".join("+".join(method) for method in used)

    @property
    def scheme(self) -> str:
        """What quantized weights become, in words: ``4 bits in groups of 128``; of several grids for how many."""
        grids = self.grids()
        if len(grids) == 1:
            return in_words(next(iter(grids)))
        return "; ".join(f"{len(names):,} linears {in_full(grid)}" for grid, names in grids.items())

    def notices(self) -> list[str]:
        """What a reader of the build may stumble over, as sentences."""
        beside = ((self.verbatim, copied), (self.left_out, not_taken))
        return [said(parts_of(found)) for found, said in beside if found]

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
        """The linears that are not, by name: routers, what the recipe skips, what is copied, and lm_head.

        A tied head has no tensor in the build, and yet is a linear to every reader.
        """
        ends = (self.architecture.embedding.name, self.architecture.head_name)
        inner = [
            item.module.name
            for item in self.items()
            if not item.quantized and isinstance(item.module, Linear) and item.module.name not in ends
        ]
        return [*inner, *self._copied_modules(), self.architecture.head_name]

    def _copied_modules(self) -> list[str]:
        """The modules that are copied, but for those that others are parts of: readers would leave these alone, too."""
        names = dict.fromkeys(module for one in self.verbatim for module in one.modules)
        above = {name[:end] for name in self.schemes for end in _dots(name)}
        return [name for name in names if name not in above]

    @property
    def weights(self) -> int:
        """The number of parameters of the source."""
        shapes = [*(shape for _, shape in self.architecture.tensors()), *(one.shape for one in self.verbatim)]
        return sum(map(math.prod, shapes))

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


def make_plan(
    architecture: Architecture, recipe: Recipe, dtype_of: DtypeOf, verbatim: Sequence[Verbatim] = ()
) -> BuildPlan:
    """Plan a build.

    Args:
        architecture: The source's architecture.
        recipe: The recipe.
        dtype_of: The stored dtype of each source tensor.
        verbatim: Tensors of the source that are copied beside the model.

    Raises:
        RecipeError: the format cannot hold a grid or a linear, engines cannot read one, or what is skipped or ruled
            does not fit the model.
    """
    output_format = get_format(recipe.format)
    schemes = resolve(
        architecture, recipe, output_format, dtype_of(architecture.layers[0].attention.linears()[0].weight)
    )
    return lay_out(architecture, recipe, output_format, schemes, dtype_of, verbatim)


def lay_out(
    architecture: Architecture,
    recipe: Recipe,
    output_format: Format,
    schemes: Mapping[str, LinearScheme],
    dtype_of: DtypeOf,
    verbatim: Sequence[Verbatim] = (),
) -> BuildPlan:
    """The plan of a build of which the scheme of each linear is known.

    Raises:
        RecipeError: the format cannot hold a linear.
    """
    if output_format.families and architecture.family not in output_format.families:
        raise RecipeError(
            f"format: {output_format.name} is for models of {', '.join(output_format.families)}: how its readers would "
            f"store a {architecture.family} model is not known.",
            hint="Take another format, such as compressed-tensors' of the same grid.",
        )
    left_out = () if output_format.holds_verbatim else tuple(verbatim)
    verbatim = verbatim if output_format.holds_verbatim else ()
    cache = cache_naming(recipe, output_format, architecture)
    check_shapes(architecture, schemes, output_format)

    def item(module: Module) -> Item:
        dense = tuple(TensorSpec(name, dtype_of(name), shape) for name, shape in module.tensors())
        if not isinstance(module, Linear) or module.name not in schemes:
            return Item(module, None, dense)
        scheme = schemes[module.name]
        packed = output_format.specs(module.name, module.out_features, module.in_features, scheme.grid)
        return Item(module, scheme, (*packed, *dense[1:]))

    groups: list[tuple[str, Layer | None, list[Item]]] = [("embeddings", None, [item(architecture.embedding)])]
    for layer in architecture.layers:
        items = [item(module) for module in layer.modules()]
        if cache is not None:
            scales = cache.specs(layer.attention.name, dtype_of(layer.attention.linears()[0].weight))
            items.insert(1 + len(layer.attention.modules()), Item(CacheScales(layer.attention.name), None, scales))
        groups.append((f"layer-{layer.index:05d}", layer, items))
    head = [item(architecture.final_norm)]
    if architecture.lm_head is not None:
        head.append(item(architecture.lm_head))
    groups.append(("head", None, head))
    limit = recipe.output.max_shard_size
    groups += [(f"verbatim-{number:05d}", None, items) for number, items in enumerate(_copies(verbatim, limit))]

    together = [tuple(stacks(output_format, _specs(items))) for _, _, items in groups]
    cuts = [list(_cut(_in_file(items, of), limit)) for (_, _, items), of in zip(groups, together, strict=True)]
    total = sum(map(len, cuts))
    units, number = [], 0
    for (key, layer_or_none, items), shards, of in zip(groups, cuts, together, strict=True):
        named = []
        for specs in shards:
            number += 1
            named.append((f"model-{number:05d}-of-{total:05d}.safetensors", tuple(specs)))
        units.append(Unit(key, layer_or_none, tuple(items), tuple(named), of))
    plan = BuildPlan(architecture, recipe, output_format, schemes, tuple(units), tuple(verbatim), left_out)
    if output_format.mixes or output_format.families:
        output_format.config(plan.grids(), plan.skipped)  # what config.json cannot say is refused now
    return plan


def cache_naming(recipe: Recipe, output_format: Format, architecture: Architecture) -> CacheNaming | None:
    """How a build's scales of a cache of keys and values are held; None where none are asked for.

    Raises:
        RecipeError: the format has no place for them, or a layer has no keys and values of heads.
    """
    if recipe.kv_cache is None:
        return None
    if output_format.cache is None:
        holding = ", ".join(name for name in formats() if get_format(name).cache is not None)
        raise RecipeError(
            f"kv_cache: format {output_format.name} has no place for a cache's scales.", hint=f"Take one of {holding}."
        )
    for layer in architecture.layers:
        if not isinstance(layer.attention, Attention):
            raise RecipeError(
                f"kv_cache: {layer.attention.name} is no attention with keys and values for each head, whose scales "
                "engines read.",
                hint="Leave kv_cache out.",
            )
    return output_format.cache


def plan_of(source: Source, recipe: Recipe) -> BuildPlan:
    """Plan a build of an open model.

    Raises:
        RecipeError: as :func:`make_plan`.
        UsageError: the recipe asks for a rope that the model cannot have.
    """
    with_extended_rope(source.checkpoint.config, recipe.rope)
    return make_plan(source.architecture, recipe, lambda name: source.checkpoint.entry(name).dtype, source.verbatim)


def disk_needed(units: Sequence[Unit]) -> int:
    """Bytes that units take, with what waits for stacks of the one that is made and the one that is checked."""
    waiting = (sum(stack.spec.nbytes for stack in unit.stacks) for unit in units)
    return sum(unit.nbytes for unit in units) + 2 * max(waiting, default=0)


def _copies(verbatim: Sequence[Verbatim], limit: int) -> Iterator[list[Item]]:
    """Items of what is copied, a shard's together: each is committed by itself."""
    items = {one.name: Item(Parameter(one.name, one.shape), None, (one.spec,)) for one in verbatim}
    for shard in _cut([one.spec for one in verbatim], limit) if verbatim else ():
        yield [items[spec.name] for spec in shard]


def _specs(items: Iterable[Item]) -> Iterator[TensorSpec]:
    """The tensors of items."""
    return (spec for item in items for spec in item.specs)


def _in_file(items: Sequence[Item], together: Sequence[Stack]) -> list[TensorSpec]:
    """What files hold of items: tensors of their own, then those that hold several items'."""
    members = {spec.name for stack in together for spec in stack.members}
    own = [spec for spec in _specs(items) if spec.name not in members]
    return [*own, *(stack.spec for stack in together)]


def _dots(name: str) -> Iterator[int]:
    """Where the names end of what a module is a part of."""
    return (position for position, character in enumerate(name) if character == ".")


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
