"""What a format must be able to do, and what it tells of a file: which linears are on which grid."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from qconv.boundary.patterns import Pattern, PatternError
from qconv.boundary.printable import name_of
from qconv.checkpoint.header import TensorSpec
from qconv.core.qtensor import Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats.cache import CacheNaming

TensorReader = Callable[[str], Tensor]
"""Gives a tensor by its full name."""
LINEAR = "Linear"
"""A target that every linear fits which fits no other."""
EXPRESSION = "re:"
"""What a regular expression begins with, among names."""


@dataclass(frozen=True, slots=True)
class Group:
    """Linears on one grid, as a ``quantization_config`` tells of them.

    Attributes:
        grid: Theirs.
        targets: Their names, regular expressions after ``re:``, or :data:`LINEAR`.
    """

    grid: Grid
    targets: tuple[str, ...] = (LINEAR,)


@dataclass(frozen=True, slots=True)
class Described:
    """What a ``quantization_config`` tells.

    Attributes:
        groups: At least one.
        skipped: Its list of exceptions.
        cache: Whether it says that a cache of keys and values has stored scales.
    """

    groups: tuple[Group, ...]
    skipped: tuple[str, ...]
    cache: bool = False

    @property
    def grid(self) -> Grid:
        """The only grid, or the first."""
        return self.groups[0].grid

    def grids(self, modules: Iterable[str]) -> dict[str, Grid]:
        """The grid of each module that a group targets, exceptions or not.

        See :func:`by_target`.
        """
        return by_target(((group.targets, group.grid) for group in self.groups), modules)


Value = TypeVar("Value")


def by_target(groups: Iterable[tuple[Sequence[str], Value]], modules: Iterable[str]) -> dict[str, Value]:
    """What a group gives to each module that it targets.

    A name goes before a regular expression, and that before :data:`LINEAR`; of several expressions the first by its
    text counts, as in compressed-tensors.

    Raises:
        CheckpointError: a regular expression that is not read.
    """
    values = {target: value for targets, value in groups for target in targets}
    expressions = sorted(target for target in values if target.startswith(EXPRESSION))
    found = {}
    for module in modules:
        fitting = module if module in values else next((one for one in expressions if matches(module, one)), LINEAR)
        if fitting in values:
            found[module] = values[fitting]
    return found


def matches(module: str, entry: str) -> bool:
    """Whether an entry of a list of names is a module's, or a regular expression that fits its beginning."""
    if entry.startswith(EXPRESSION):
        return _pattern(entry.removeprefix(EXPRESSION)).match(module)
    return entry == module


def require_readable(entries: Iterable[str]) -> None:
    """Check that the regular expressions among a list of names are of a kind that is read.

    Raises:
        CheckpointError: one is not.
    """
    for entry in entries:
        if entry.startswith(EXPRESSION):
            _pattern(entry.removeprefix(EXPRESSION))


@functools.lru_cache(maxsize=1024)
def _pattern(text: str) -> Pattern:
    try:
        return Pattern.parse(text)
    except PatternError as error:
        raise CheckpointError(
            f"config.json: quantization_config: {name_of(text)!r} is no regular expression that is read: {error}.",
            hint="Write it with groups, sets, repeats and look-ahead alone.",
        ) from error


def require_number(number: Number | None, own: Number, name: str) -> None:
    """Check that a format whose codes are all of one kind is asked for no other.

    Raises:
        RecipeError: it is.
    """
    if number not in (None, own):
        held = {"int": "integers", "e4m3": "E4M3 floats", "e2m1": "E2M1 floats"}[own]
        raise RecipeError(
            f"grid.number: the {name} format holds {held} alone.", hint="Take format w4a16 or fp8_dynamic for both."
        )


def skip_list(section: dict[str, Any], key: str) -> list[str]:
    """The names under ``key`` of a ``quantization_config``; empty if absent or null.

    Raises:
        CheckpointError: not a list of names.
    """
    value = section.get(key) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise CheckpointError(f"config.json: quantization_config.{key} is not a list of names.")
    return value


def read_tensors(specs: Sequence[TensorSpec], module: str, read: TensorReader) -> dict[str, Tensor]:
    """The tensors of ``specs`` by the part of their name that follows the module's.

    Raises:
        CheckpointError: one is absent or has another shape or dtype than its spec.
    """
    tensors: dict[str, Tensor] = {}
    for spec in specs:
        tensor = read(spec.name)
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise CheckpointError(f"{spec.name}: {tensor.dtype} {list(tensor.shape)}, not {list(spec.shape)}.")
        tensors[spec.name.removeprefix(f"{module}.")] = tensor
    return tensors


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes of four bits, two in a byte: uint8 [rows, columns] -> [rows, columns / 2], the even column low."""
    rows, columns = codes.shape
    # Two neighbours are one 16-bit word, low byte first: its nibbles move together by one shift.
    pairs = codes.reshape(-1).view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8).view(rows, columns // 2)


def unpack_pairs(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_pairs`: uint8 [rows, bytes] -> [rows, 2 * bytes]."""
    rows, count = packed.shape
    wide = packed.reshape(-1).to(torch.int16)
    return (wide | (wide << 4)).bitwise_and_(0x0F0F).view(torch.uint8).view(rows, 2 * count)


_BLOCK_ELEMENTS = 1 << 20
_BLOCK_MULTIPLE = 32


def by_rows(
    convert: Callable[[Tensor], Tensor], values: Tensor, *, growth: int = 1, transposed: bool = False
) -> Tensor:
    """``convert(values)``, a few rows at a time, so that its intermediate values never take the memory of all rows.

    Args:
        convert: From rows [n, columns] to rows [n * k, others], each from rows of its own; n is a multiple of 32, but
            for the last rows.
        values: [rows, columns], of any strides; ``convert`` gets blocks that have them too.
        growth: How many elements come of one.
        transposed: Return [others, rows * k].
    """
    rows, columns = values.shape
    step = max(1, _BLOCK_ELEMENTS // (max(1, columns) * growth * _BLOCK_MULTIPLE)) * _BLOCK_MULTIPLE
    out, done = values.new_empty(0), 0
    for start in range(0, max(1, rows), step):
        block = convert(values[start : start + step])
        if start == 0:
            total = len(block) * rows // max(1, min(step, rows))
            shape = (total, block.shape[1])
            out = block.new_empty(shape[::-1]).t() if transposed else block.new_empty(shape)
        out[done : done + len(block)] = block
        done += len(block)
    return out.t() if transposed else out


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's tensor lies in one of the file's that holds those of several modules.

    Attributes:
        name: The file's tensor.
        number: Which it is along the file's first axis.
        half: Which it is of those whose rows come by turns there.
        halves: How many do; 1 where it has the place to itself.
    """

    name: str
    number: int
    half: int = 0
    halves: int = 1


class EachItsOwn:
    """What formats of all families have in common that hold each tensor of a module by itself."""

    families: tuple[str, ...] = ()
    framework = "pt"
    lists_skipped = True
    rounds_inputs = True
    holds_verbatim = True
    fuses = True

    def keys(self, section: Mapping[str, Any]) -> Mapping[str, Any]:
        """See :class:`Format`."""
        return {"quantization_config": section}

    def place(self, tensor: str) -> Place | None:
        """See :class:`Format`."""
        return None


class AllInConfig(EachItsOwn):
    """What a format has in common with others of which config.json says everything."""

    beside_names: tuple[str, ...] = ()
    cache: CacheNaming | None = None

    def beside(self, section: Mapping[str, Any]) -> Mapping[str, Any]:
        """See :class:`Format`."""
        return {}


class Format(Protocol):
    """Pack, unpack and describe quantized linears. Formats know no calibration."""

    name: str
    """Registry key."""
    pack_columns: int
    """Output features that one packed word holds; a tensor-parallel rank must own whole words."""
    act_order: bool
    """Whether it can say which group each input belongs to."""
    mixes: bool
    """Whether linears of one build may be on different grids."""
    beside_names: tuple[str, ...]
    """JSON files that say what config.json says, for readers that look there."""
    families: tuple[str, ...]
    """The only families that its readers know in it; empty where it is for all."""

    framework: str
    """Whose tensors its files say that they hold."""
    lists_skipped: bool
    """Whether config.json lists what is not quantized; where not, its readers look for tensors."""
    rounds_inputs: bool
    """Whether its readers round inputs where config.json says so; else they never do."""
    holds_verbatim: bool
    """Whether it has a place for tensors beside the language model."""
    fuses: bool
    """Whether its readers hold q, k, v as one, and a layer's experts; where not, only what files hold so."""

    def keys(self, section: Mapping[str, Any]) -> Mapping[str, Any]:
        """Where config.json says it, of what :meth:`config` gives."""

    def place(self, tensor: str) -> Place | None:
        """Where the file holds a tensor of a module beside others'; None of one that is the file's own."""

    @property
    def cache(self) -> CacheNaming | None:
        """How it holds the scales of a cache of keys and values, if it does."""

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """The grid for a recipe's settings, of codes of a kind, or of the format's own.

        Raises:
            RecipeError: the format cannot express the settings.
        """

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Why a linear of that shape cannot be stored, or None."""

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """The tensors that hold a quantized linear, in file order, bias not included."""

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of ``specs`` with their names, in the same order."""

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """The QTensor of a linear of ``shape`` (out_features, in_features), from the file's tensors.

        Raises:
            CheckpointError: a tensor is absent or has another shape or dtype than the format says.
        """

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of config.json, from the linears quantized, by grid, and those left alone.

        Raises:
            RecipeError: it has no words for that.
        """

    def beside(self, section: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the files of ``beside_names`` hold, by name, from what config.json says of quantization."""

    def recognizes(self, section: dict[str, Any]) -> bool:
        """Whether a ``quantization_config`` is of this format."""

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """Grids and skipped modules from a ``quantization_config``.

        Raises:
            CheckpointError: a key is missing or has an unsupported value.
        """

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """Whether readers of this format leave ``module`` unquantized, by their own matching rule."""
