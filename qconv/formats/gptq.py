"""GPTQ's layout (``quant_method: gptq``), as AutoGPTQ defined it and GPTQModel, vLLM and transformers read it.

With K = in_features, N = out_features, P = 32 / bits and groups of g: ``qweight`` int32 [K/P, N], packed down K;
``qzeros`` int32 [K/g, N/P], packed across N; ``scales`` float16 [K/g, N]; ``g_idx`` int32 [K], each input's group.
W[n, k] = (q - Z) * s. The lowest bits of a word hold the first value.

``checkpoint_format: gptq`` (v1) stores Z - 1, ``gptq_v2`` stores Z. Readers of v1 disagree about Z = 0, which only an
asymmetric grid has, so symmetric builds are written as v1, which every reader knows, and asymmetric ones as v2.

3 bits run across word boundaries: 32 values are a stream of 96 bits. ``desc_act`` says that ``g_idx`` is not in order;
codes keep the inputs' own order all the same.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv import __version__
from qconv.boundary.patterns import Pattern, PatternError
from qconv.checkpoint.header import TensorSpec
from qconv.core.qtensor import CHANNEL, Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats.base import AllInConfig, Described, Group, TensorReader, by_rows, read_tensors, require_number

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
FUSED = {
    r"\.(q|k|v)_proj": ".qkv_proj",
    r"\.(gate|up)_proj": ".gate_up_proj",
    r"\.experts\.\d+\.\w+": ".experts",
}
"""What engines fuse, under which names some of them look up whether the fused linear is left alone."""


def values_per_pack(bits: int) -> int:
    """How many values fill whole words without a remainder: a word's, or 32 of 3 bits in three words."""
    return 32 // math.gcd(32, bits)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack values of 2, 3, 4 or 8 bits, uint8 [rows, columns], to int32 [rows, columns*bits/32], low bits first."""
    rows, columns = values.shape
    if 32 % bits:
        return _pack_stream(values, bits)
    packed, width = values.reshape(-1), bits
    while width < 8:
        # Two neighbours are one 16-bit word, low byte first: one shift moves all of the higher one next to the lower.
        pairs = packed.view(torch.int16)
        packed = (pairs | (pairs >> (8 - width))).to(torch.uint8)
        width *= 2
    return packed.view(torch.int32).view(rows, columns * bits // 32)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_words`: int32 [rows, words] to uint8 [rows, words*32/bits]."""
    rows, count = words.shape
    if 32 % bits:
        return _unpack_stream(words, bits)
    values, width = words.reshape(-1).view(torch.uint8), 8
    while width > bits:
        width //= 2
        wide = values.to(torch.int16)
        values = (wide | (wide << (8 - width))).bitwise_and_(0x0101 * ((1 << width) - 1)).view(torch.uint8)
    return values.view(rows, count * 32 // bits)


def _stream_parts(bits: int) -> Iterator[tuple[int, int, int]]:
    """Of a stream of 32 values in ``bits`` words: each value, a word that it touches, its lowest bit's place there.

    The place is negative for the upper part of a value that began in the word before.
    """
    for value in range(32):
        first = value * bits
        for word in range(first // 32, (first + bits - 1) // 32 + 1):
            yield value, word, first - 32 * word


def _pack_stream(values: Tensor, bits: int) -> Tensor:
    rows, columns = values.shape
    streams = values.view(rows, columns // 32, 32)
    words = torch.zeros(rows, columns // 32, bits, dtype=torch.int64)
    for value, word, place in _stream_parts(bits):
        part = streams[..., value].to(torch.int64)
        words[..., word] |= part << place if place >= 0 else part >> -place
    # The upper halves of the 64-bit words hold what the next word takes up; they are cut off.
    return words.view(torch.int32)[..., ::2].contiguous().view(rows, columns // 32 * bits)


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    rows, count = words.shape
    streams = words.reshape(rows, count // bits, bits).to(torch.int64).bitwise_and_(0xFFFFFFFF)
    values = torch.zeros(rows, count // bits, 32, dtype=torch.int64, device=words.device)
    for value, word, place in _stream_parts(bits):
        values[..., value] |= streams[..., word] >> place if place >= 0 else streams[..., word] << -place
    return values.bitwise_and_((1 << bits) - 1).to(torch.uint8).view(rows, count // bits * 32)


@dataclass(frozen=True, slots=True)
class ForeignGrid(Grid):
    """The grid of a file whose zero points are stored the other way than qconv writes them: symmetric in v2, or
    asymmetric in v1.
    """


class GptqFormat(AllInConfig):
    """GPTQ with 2, 3, 4 or 8 bits, with and without act-order."""

    name = "gptq"
    pack_columns = 8
    act_order = True
    mixes = False

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """Symmetric unless the recipe says otherwise; float16 scales.

        Raises:
            RecipeError: bits that no reader knows.
        """
        require_number(number, "int", self.name)
        if settings.bits not in BITS:
            raise RecipeError(f"grid.bits: the gptq format holds 2, 3, 4 or 8 bits, not {settings.bits}.")
        symmetric = True if settings.symmetric is None else settings.symmetric
        return Grid(settings.bits, settings.group_size, symmetric, scale_dtype=torch.float16)

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Whole groups along the input and whole words along both sides."""
        pack = values_per_pack(grid.bits)
        if grid.group_size != CHANNEL and in_features % grid.group_size:
            return f"group size {grid.group_size} does not divide its {in_features} input features"
        for size, side in ((in_features, "input"), (out_features, "output")):
            if size % pack:
                return f"its {size} {side} features are not a multiple of {pack}"
        return None

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """qweight, qzeros, scales, g_idx."""
        bits, groups = grid.bits, grid.groups(in_features)
        return [
            TensorSpec(f"{module}.qweight", torch.int32, (in_features * bits // 32, out_features)),
            TensorSpec(f"{module}.qzeros", torch.int32, (groups, out_features * bits // 32)),
            TensorSpec(f"{module}.scales", grid.scale_dtype, (groups, out_features)),
            TensorSpec(f"{module}.g_idx", torch.int32, (in_features,)),
        ]

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        grid, (_, in_features) = weight.grid, weight.shape
        if weight.zero_points is None:
            stored = torch.full_like(weight.scales, grid.mid - 1, dtype=torch.uint8)
        else:
            stored = weight.zero_points
        yield f"{module}.qweight", by_rows(functools.partial(pack_words, bits=grid.bits), weight.codes, transposed=True)
        yield f"{module}.qzeros", pack_words(stored.t(), grid.bits)
        yield f"{module}.scales", weight.scales.t().contiguous()
        yield f"{module}.g_idx", _in_order(in_features, grid) if weight.group_index is None else weight.group_index

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes, scales and zero points of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent or misshapen, ``g_idx`` names no group or is out of order without
                ``desc_act``, or zero points are not what the config says.
        """
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        return QTensor(
            Grid(grid.bits, grid.group_size, grid.symmetric, grid.scale_dtype, act_order=grid.act_order),
            by_rows(functools.partial(unpack_words, bits=grid.bits), tensors["qweight"].t(), growth=32 // grid.bits),
            tensors["scales"].t().contiguous(),
            _zero_points(f"{module}.qzeros", tensors["qzeros"], grid),
            _group_index(f"{module}.g_idx", tensors["g_idx"], grid),
        )

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """AutoGPTQ's keys, with what is left alone as GPTQModel's ``dynamic``, which vLLM reads too.

        Both match the regular expression after ``-:`` at the beginning of a module's full name.
        """
        (grid,) = quantized
        return {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": grid.symmetric,
            "desc_act": grid.act_order,
            "checkpoint_format": V1 if grid.symmetric else V2,
            "pack_dtype": "int32",
            "lm_head": False,
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in _with_fused(skipped)},
            "meta": {"quantizer": [f"qconv:{__version__}"]},
        }

    def recognizes(self, section: dict[str, Any]) -> bool:
        """``quant_method`` is gptq."""
        return section.get("quant_method") == "gptq"

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """Grid and the regular expressions of the skipped modules.

        Raises:
            CheckpointError: other bits or another layout, a quantized lm_head, or rules for single modules.
        """
        bits, group_size, symmetric = section.get("bits"), section.get("group_size"), section.get("sym", True)
        if not isinstance(bits, int) or bits not in BITS:
            raise _not_read("bits", bits, "2, 3, 4 or 8")
        if not isinstance(group_size, int) or (group_size < 1 and group_size != CHANNEL):
            raise _not_read("group_size", group_size, "a positive integer, or -1 for a whole row")
        if not isinstance(symmetric, bool):
            raise _not_read("sym", symmetric, "true or false")
        act_order = section.get("desc_act", False)
        if not isinstance(act_order, bool):
            raise _not_read("desc_act", act_order, "true or false")
        layout = section.get("checkpoint_format", section.get("format", V1))
        if layout not in (V1, V2):
            raise _not_read("checkpoint_format", layout, f"{V1} or {V2}")
        if section.get("is_marlin_format"):
            raise _not_read("is_marlin_format", True, "false: Marlin's layout is one of a kernel's, not GPTQ's")
        if section.get("lm_head"):
            raise _not_read("lm_head", section["lm_head"], "false: a quantized head is not supported")
        if section.get("pack_dtype", "int32") != "int32":
            raise _not_read("pack_dtype", section["pack_dtype"], "int32")
        as_written = layout == (V1 if symmetric else V2)
        kind = Grid if as_written else ForeignGrid
        grid = kind(bits, group_size, symmetric, torch.float16, act_order=act_order)
        return Described((Group(grid),), ("^lm_head$", *_exclusions(section.get("dynamic"))))

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """Regular expressions, matched at the beginning of the name."""
        return any(pattern.match(module) for pattern in _compiled(tuple(skipped)))


@functools.lru_cache(maxsize=4)
def _compiled(patterns: tuple[str, ...]) -> tuple[Pattern, ...]:
    """Compiled once for all modules."""
    return tuple(map(Pattern.parse, patterns))


def check(module: str, parts: Mapping[str, Tensor], grid: Grid) -> None:
    """Check what can be wrong inside of a linear's tensors: the groups of its inputs, and its zero points.

    Args:
        module: The linear's name.
        parts: Its tensors by the last part of their names, of the right shapes.
        grid: Its grid.

    Raises:
        CheckpointError: as :meth:`GptqFormat.unpack`.
    """
    _zero_points(f"{module}.qzeros", parts["qzeros"], grid)
    _group_index(f"{module}.g_idx", parts["g_idx"], grid)


def _in_order(in_features: int, grid: Grid) -> Tensor:
    """The group of each input in their natural order, int32 [in_features]."""
    return torch.arange(in_features, dtype=torch.int32) // grid.width(in_features)


def _group_index(name: str, stored: Tensor, grid: Grid) -> Tensor | None:
    """The group of each input, int32 [in_features], or None where they are in order."""
    groups = grid.groups(len(stored))
    wrong = stored[(stored < 0) | (stored >= groups)]
    if len(wrong):
        raise CheckpointError(f"{name}: names group {int(wrong[0])}, but there are {groups}.")
    if grid.act_order:
        return stored
    if not torch.equal(stored, _in_order(len(stored), grid).to(stored.device)):
        raise CheckpointError(
            f"{name}: inputs are not grouped in their order, though config.json says desc_act false.",
            hint="If the build was made with act-order, set desc_act to true.",
        )
    return None


def _zero_points(name: str, words: Tensor, grid: Grid) -> Tensor | None:
    """Zero points from ``qzeros``: uint8 [out_features, groups], or None on a symmetric grid."""
    stored = unpack_words(words, grid.bits)
    if grid.symmetric == isinstance(grid, ForeignGrid):
        zero_points = stored
    elif bool((stored == grid.levels - 1).any()):
        raise CheckpointError(
            f"{name}: a zero point is 0 or {grid.levels}, which checkpoint_format {V1} does not tell apart."
        )
    else:
        zero_points = stored + 1
    if not grid.symmetric:
        return zero_points.t().contiguous()
    wrong = zero_points[zero_points != grid.mid]
    if len(wrong):
        raise CheckpointError(
            f"{name}: holds the zero point {int(wrong[0])}, not {grid.mid} as a symmetric grid has.",
            hint="Does config.json name the right checkpoint_format?",
        )
    return None


def _with_fused(names: Sequence[str]) -> list[str]:
    """The names, and after them those of the fused linears that they are parts of."""
    fused = [re.sub(f"{part}$", whole, name) for name in names for part, whole in FUSED.items()]
    return list(dict.fromkeys([*names, *fused]))


def _exclusions(dynamic: Any) -> list[str]:
    """The regular expressions of ``dynamic`` that exclude modules."""
    if dynamic is None:
        return []
    if not isinstance(dynamic, dict):
        raise CheckpointError("config.json: quantization_config.dynamic is not a mapping.")
    patterns = []
    for rule in dynamic:
        pattern = rule.removeprefix("-:")
        if pattern == rule:
            raise CheckpointError(
                f"config.json: quantization_config.dynamic has the rule {rule!r}: options of single modules.",
                hint="Only rules that leave modules alone (-:PATTERN) are read: quantize all others in the same way.",
            )
        try:
            Pattern.parse(pattern)
        except PatternError as error:
            raise CheckpointError(
                f"config.json: dynamic rule {rule!r} is no regular expression that is read: {error}.",
                hint="Write it with groups, sets, repeats and look-ahead alone.",
            ) from error
        patterns.append(pattern)
    return patterns


def _not_read(key: str, value: object, known: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization_config.{key} is {value!r}; GPTQ is read with {known}.",
        hint="Repair config.json if it is wrong; else quantize the original model in a way that is read.",
    )


FORMAT = GptqFormat()
