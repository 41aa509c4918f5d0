"""Integers of compressed-tensors as what linears can become: see :class:`qconv.sensitivity.palette.Palette`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from qconv.artifacts.source import Source
from qconv.core.architecture import Layer, Linear, Moe
from qconv.core.qtensor import Grid
from qconv.errors import UsageError
from qconv.formats import get_format
from qconv.grids.of_formats import grid_of
from qconv.planning.plan import plan_of
from qconv.planning.recipe import Recipe
from qconv.planning.rules import Rule, RuleGrid
from qconv.planning.schemes import LinearScheme, fused, in_full, resolve
from qconv.sensitivity.palette import Extent, Part, Unit, without

SCHEMES = ("int4-g128", "int4-g64", "int4-g32", "int8-g128")
"""What is chosen from, where nothing is excluded; all of them have kernels in vLLM."""
SMALL_SCHEMES = ("int4-g64", "int4-g32", "int8-g64", "int8-g32")
"""Where groups of 128 do not divide the rows."""
COMPENSATED = {
    "int4-g128": 0.24,
    "int4-g64": 0.24,
    "int4-g32": 0.27,
    "int8-g128": 0.50,
    "int8-g64": 0.50,
    "int8-g32": 0.50,
}
"""What calibrated rounding leaves of the divergence that rounding to nearest in searched ranges would cost: measured on
the bundled model, all linears on one grid."""


class IntegerSchemes:
    """Integers of 4 and 8 bits for the linears of a build in compressed-tensors.

    What engines fuse (q, k, v of a layer; gate and up; its experts) is a unit; other linears are units by themselves.

    Attributes:
        recipe: What the build is to be besides. Linears that it skips, or has a rule for, stay as it has them.
    """

    def __init__(self, source: Source, recipe: Recipe, excluded: Sequence[str] = ()) -> None:
        """Of a model.

        Args:
            source: The model.
            recipe: Its own grid is that of what no rule is for.
            excluded: Shell patterns of schemes that are not to be chosen.

        Raises:
            UsageError: the format holds no mixture of integers; a pattern fits no scheme, or all of them.
        """
        self.recipe = recipe
        self._source = source
        self._format = get_format(recipe.format)
        self._own = self._format.grid(recipe.grid, source.dtype)
        if not self._format.mixes or self._own.is_float or self._own.activations != "none":
            raise UsageError(
                f"--target-size, --target-bits: format {recipe.format} holds no mixture of integers to choose.",
                hint="Take --fmt gguf or --fmt w4a16.",
            )
        known = tuple(dict.fromkeys((*SCHEMES, *SMALL_SCHEMES)))
        self._left = without(known, excluded)
        self._given: dict[str, str] = {}
        self._grids: dict[str, Grid] = {name: self._grid(name) for name in known}
        self._linears: dict[str, tuple[Linear, ...]] = {}
        self._units: list[Unit] = []
        schemes = resolve(source.architecture, recipe, self._format, source.dtype)
        for layer in source.architecture.layers:
            for role, linears in _units(layer):
                if not any(recipe.skips(one.name) for one in linears):
                    self._add(layer, role, linears)
                    if any(recipe.rule(one.name) is not None for one in linears):
                        self._give(self._units[-1], schemes[linears[0].name])

    @property
    def units(self) -> list[Unit]:
        """What is fused, of every layer."""
        return self._units

    def names(self, unit: Unit) -> list[str]:
        """The schemes whose groups divide its rows."""
        if unit.name in self._given:
            return [self._given[unit.name]]
        for schemes in (SCHEMES, SMALL_SCHEMES):
            found = [name for name in schemes if name in self._left and self._fits(unit, name)]
            if found and (schemes is SMALL_SCHEMES or self._fits(unit, "int8-g128")):
                return found
        raise UsageError(
            f"--target-size, --target-bits: no groups of {', '.join(self._left)} divide the rows of {unit.name}.",
            hint="Skip it, or give it a --rule of its own, such as int8-channel.",
        )

    def size(self, unit: Unit, name: str) -> int:
        """Bytes of the tensors of its linears."""
        grid = self._grids[name]
        shapes = Counter((one.out_features, one.in_features) for one in self._linears[unit.name])
        return sum(
            count * sum(spec.nbytes for spec in self._format.specs("linear", *shape, grid))
            for shape, count in shapes.items()
        )

    def rounded(self, rows: Tensor, name: str, importance: Tensor) -> Tensor:
        """To nearest, in clipping ranges of least squared error where the recipe searches them."""
        clip = self.recipe.clip if self.recipe.clips(self.recipe.method) else None
        grid = self._grids[name]
        return grid_of(grid, None, clip).encode(rows).dequantize()

    def left(self, unit: Unit, name: str) -> float:
        """What GPTQ leaves."""
        return 1.0 if self.recipe.rounding is None else COMPENSATED.get(name, 1.0)

    def extent(self, chosen: Mapping[str, str]) -> Extent:
        """Of all shards; bits are counted over quantized linears, since all else stays as it is."""
        plan = plan_of(self._source, self.recipe_for(chosen))
        items = [item for item in plan.items() if item.quantized]
        counted = sum(spec.nbytes for item in items for spec in item.specs)
        return Extent(plan.output_bytes, counted, sum(linear.numel for linear in plan.quantized))

    def recipe_for(self, chosen: Mapping[str, str]) -> Recipe:
        """The recipe with rules behind its own, for what is not on its own grid."""
        layers: dict[tuple[str, str], list[int]] = {}
        for unit in self._units:
            given = unit.name in self._given
            if unit.layer is not None and not given and self._grids[chosen[unit.name]] != self._own:
                layers.setdefault((unit.role, chosen[unit.name]), []).append(unit.layer)
        everywhere = Counter(unit.role for unit in self._units if unit.name not in self._given)
        rules = [
            Rule.model_validate({"match": pattern, "grid": name})
            for (role, name), of in layers.items()
            for pattern in _patterns(role, of, everywhere[role])
        ]
        return self.recipe.model_copy(update={"rules": (*self.recipe.rules, *rules)})

    def _add(self, layer: Layer, role: str, linears: Sequence[Linear]) -> None:
        groups: dict[str, list[Part]] = {}
        for linear in linears:
            groups.setdefault(linear.name.rpartition(".")[2], []).append(Part(linear.name, linear.weight))
        name = f"{layer.name}.{role}"
        self._linears[name] = tuple(linears)
        numel = sum(linear.numel for linear in linears)
        self._units.append(Unit(name, layer.index, role, tuple(map(tuple, groups.values())), numel))

    def _give(self, unit: Unit, scheme: LinearScheme) -> None:
        """Let a unit have what a rule says."""
        name = f"{in_full(scheme.grid)}, {scheme.method_name}"
        if scheme.method == self.recipe.method:
            name = next((one for one, grid in self._grids.items() if grid == scheme.grid), name)
        self._given[unit.name], self._grids[name] = name, scheme.grid

    def _fits(self, unit: Unit, name: str) -> bool:
        grid = self._grids[name]
        shapes = {(one.out_features, one.in_features) for one in self._linears[unit.name]}
        return all(self._format.check(*shape, grid) is None for shape in shapes)

    def _grid(self, name: str) -> Grid:
        said = Rule.model_validate({"match": "*", "grid": name}).grid
        assert isinstance(said, RuleGrid)
        return self._format.grid(said.over(self.recipe.grid), self._source.dtype, said.number)


def _units(layer: Layer) -> Iterator[tuple[str, tuple[Linear, ...]]]:
    """What takes one grid in a layer, with a pattern that fits it by its names within the layer, in file order."""
    together = {linears[0].name: linears for _, linears in fused(layer)}
    behind = {linear.name for linears in together.values() for linear in linears[1:]}
    for linear in layer.linears():
        if linear.name not in behind:
            linears = together.get(linear.name, (linear,))
            yield _role(layer, linears), linears


def _role(layer: Layer, linears: Sequence[Linear]) -> str:
    """``self_attn.[qkv]_proj``, ``mlp.experts.*``: fits these linears of the layer and no others."""
    names = [linear.name.removeprefix(f"{layer.name}.") for linear in linears]
    if len(names) == 1:
        return names[0]
    if isinstance(layer.mlp, Moe) and len(names) >= len(layer.mlp.experts) * 3:
        return names[0].rpartition(".")[0].rpartition(".")[0] + ".*"
    place = names[0].rpartition(".")[0]
    letters = "".join(name.rpartition(".")[2][0] for name in names)
    endings = {name.rpartition(".")[2][1:] for name in names}
    return f"{place}.[{letters}]{endings.pop() if len(endings) == 1 else '*_proj'}"


def _patterns(role: str, layers: Sequence[int], everywhere: int) -> Iterator[str]:
    """Shell patterns for a role in some layers: all of them as one, others by the last digits of their numbers."""
    if len(layers) == everywhere:
        yield role
        return
    digits: dict[str, list[str]] = {}
    for layer in layers:
        digits.setdefault(str(layer)[:-1], []).append(str(layer)[-1])
    for ahead, last in digits.items():
        number = last[0] if len(last) == 1 else f"[{''.join(last)}]"
        yield f"layers.{ahead}{number}.{role}"
