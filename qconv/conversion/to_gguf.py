"""A build written as GGUF: codes that a type of ggml's holds become its blocks as they are, the rest is plain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.building.gguf_blocks import Ready
from qconv.building.gguf_stages import StagedLayers
from qconv.building.gguf_target import GgufBuilder, GgufTarget
from qconv.building.inputs import fingerprints
from qconv.building.target import Means
from qconv.calibration.corpus import TokenSet
from qconv.conversion.target import CONVERTED, converted_from
from qconv.conversion.weights import CodedWeights
from qconv.errors import VerificationError
from qconv.folders.part import Part
from qconv.formats.gguf.names import GgufTensor, gguf_tensors, permute_heads
from qconv.formats.gguf.reader import SCALES
from qconv.formats.gguf.rope import rope_of
from qconv.grids.ggml.whole import GRIDS, misfit, to_blocks
from qconv.planning.gguf_plan import DEFAULT_SPLIT_SIZE, plan_gguf
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.planning.steps import shown_steps, steps
from qconv.runtime.packed import dequantized_rows

T = GGMLQuantizationType
PLAIN = {"F32": T.F32, "F16": T.F16, "BF16": T.BF16}
"""Types without codes."""
_NAMES = {"Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q8_0": "Q8_0", "MXFP4": "MXFP4_MOE", "NVFP4": "NVFP4"}
"""What files of a type are called."""
_ROWS = 512
"""Of a weight, made and compared at a time."""
_STORED = {torch.float32: T.F32, torch.float16: T.F16, torch.bfloat16: T.BF16}


def gguf_layouts() -> list[str]:
    """What ``--to`` takes: ``gguf`` for the types that the codes have, or one of them."""
    return ["gguf", *(f"gguf:{name}" for name in (*_NAMES, *PLAIN))]


@dataclasses.dataclass(frozen=True, slots=True)
class Types:
    """What becomes of the tensors of a file.

    Attributes:
        coded: The types of those whose codes are kept, by their names.
        again: Linears that are rounded again, each with why.
        rounded: The type that those get.
    """

    coded: Mapping[str, T]
    again: Mapping[str, str]
    rounded: T

    def of(self, weights: CodedWeights, tensor: GgufTensor, plain: T | None) -> T:
        """A tensor's type: of what has no codes that of the source, or the plain one that is asked for."""
        if plain is not None:
            return plain
        if tensor.name in self.coded:
            return self.coded[tensor.name]
        if any(name in weights.linears for name in tensor.sources):
            return self.rounded
        return _STORED[weights.entry(tensor.sources[0]).dtype]


def types_of(weights: CodedWeights, wanted: str | None) -> Types:
    """Which type holds the codes of each tensor.

    Args:
        weights: The build's.
        wanted: The only type that will do; None for the smallest that does.
    """
    coded: dict[str, T] = {}
    again: dict[str, str] = {}
    candidates = [one for one in GRIDS if wanted is None or one.name == wanted]
    for tensor in _tensors(weights):
        linears = [weights.linears[name] for name in tensor.sources if name in weights.linears]
        if not linears:
            continue
        reasons: list[str] = []
        for type in candidates:
            reason = None if tensor.in_rows else "llama.cpp holds it in other rows"
            for linear in linears:
                grid = weights.grid_of(linear)
                reason = reason or (grid if isinstance(grid, str) else misfit(weights.qtensor(linear.weight), type))
                if reason is not None:
                    break
            if reason is None:
                coded[tensor.name] = type
                break
            reasons.append(reason)
        else:
            again |= dict.fromkeys((linear.name for linear in linears), reasons[0] if wanted else "; ".join(reasons))
    return Types(coded, again, T.Q8_0 if wanted is None else getattr(T, wanted))


def gguf_target(
    source: Source, out: Path, types: Types, wanted: str | None, shard_bytes: int | None
) -> ConvertedGgufTarget:
    """The target of a conversion.

    Args:
        source: The build.
        out: The folder.
        types: What becomes of its tensors.
        wanted: The type that was asked for, if one was.
        shard_bytes: The largest file; None for the usual one.

    Raises:
        UsageError: llama.cpp cannot express the model.
        CheckpointError: the tokenizer is malformed.
    """
    weights = _weights(source)
    plain = PLAIN.get(wanted or "")
    found = list(types.coded.values()) or [plain or types.rounded]
    most = max(dict.fromkeys(found), key=found.count)
    name = _NAMES.get(most.name, most.name)
    recipe = GgufRecipe(type=name, method=("rtn",))
    plan = plan_gguf(
        source,
        name,
        f"{source.name}-{name}",
        override=lambda tensor: types.of(weights, tensor, plain),
        max_split_size=shard_bytes or DEFAULT_SPLIT_SIZE,
        folded=bool(weights.folded()),
        beside=[_scales(weights, tensor) for tensor in _tensors(weights) if types.coded.get(tensor.name) is T.NVFP4],
        repacked=(T.NVFP4,),
    )
    return ConvertedGgufTarget(source, plan, recipe, None, (), out, types=types)


def _scales(weights: CodedWeights, tensor: GgufTensor) -> GgufTensor:
    """The tensor of an NVFP4 weight's global scales, one of each expert."""
    scales = tuple(weights.qtensor(name).global_scale for name in tensor.sources)
    return GgufTensor(
        tensor.name.removesuffix("weight") + SCALES[0], tensor.kind, tensor.layer, (len(scales),), (), constant=scales
    )


def _tensors(weights: CodedWeights) -> list[GgufTensor]:
    model = weights.architecture
    return gguf_tensors(model, rope_of(weights.config).factors(model.head_dim))


@dataclasses.dataclass(frozen=True, slots=True)
class ConvertedGgufTarget(GgufTarget):
    """See :class:`qconv.building.target.Target`."""

    types: Types = dataclasses.field(default_factory=lambda: Types({}, {}, T.F32))

    def fingerprints(self, tokens: TokenSet | None) -> dict[str, str]:
        """What the build belongs to: the one that it is converted from, and what is asked for."""
        kept = sorted((name, type.name) for name, type in self.types.coded.items())
        asked = f"{self.plan.file_type} {kept} again={len(self.types.again)} {[file.size for file in self.plan.files]}"
        return fingerprints(self.source, asked, None, adds_up=False, companions="embedded")

    def ready(self, tensor: GgufTensor, staged: StagedLayers | None) -> Ready | None:
        """The blocks of a tensor whose codes are kept."""
        type = self.types.coded.get(tensor.name)
        if type is None:
            return None
        scales = self.plan.tensors.get(tensor.name.removesuffix("weight") + SCALES[0])
        return Ready(CodedBlocks(_weights(self.source), type), tensor, scales.constant if scales else ())

    def begin(
        self,
        part: Part,
        tokens: TokenSet | None,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> ConvertedGgufBuilder:
        """Go to work."""
        return ConvertedGgufBuilder(self, part, tokens, belongs, means, show)


@dataclasses.dataclass(frozen=True, slots=True)
class CodedBlocks:
    """See :class:`qconv.building.gguf_blocks.MadeBlocks`: of codes, which stay as they are."""

    weights: CodedWeights
    type: T

    def blocks(self, tensor: GgufTensor, part: int) -> Tensor:
        """The blocks of one part of a tensor, uint8 [rows, bytes of a row], in file order.

        Raises:
            VerificationError: they stand for other numbers.
        """
        name = tensor.sources[part]
        weight = self.weights.qtensor(name)
        made = []
        for start in range(0, len(weight.codes), _ROWS):
            rows = weight.rows(start, min(start + _ROWS, len(weight.codes)))
            made.append(to_blocks(rows, self.type))
            if not torch.equal(dequantized_rows(made[-1], self.type, rows.global_scale), rows.dequantize()):
                raise VerificationError(
                    f"{name}: dequantizes to other numbers than before.",
                    hint="This is a bug; the build that it was converted from is whole.",
                )
        data = torch.cat(made)
        if tensor.moved is not None and tensor.moved.rows is not None:
            return data[tensor.moved.rows]
        return permute_heads(data, tensor.heads) if tensor.heads else data


class ConvertedGgufBuilder(GgufBuilder):
    """See :class:`qconv.building.target.Writer`."""

    def __init__(self, target: ConvertedGgufTarget, *given: Any) -> None:
        """See :meth:`ConvertedGgufTarget.begin`."""
        super().__init__(target, *given)
        self.types = target.types

    def _report(self) -> dict[str, Any]:
        """The report, with what the one before said of how the weights were chosen."""
        values, before = super()._report(), _weights(self.target.source)
        said = before.report()
        values["source"] = said.get("source", values["source"])
        if said.get("recipe"):
            values["recipe"] = {**said["recipe"], "format": "gguf", "type": self.plan.file_type}
            values["method"] = shown_steps(steps(said["recipe"]["method"]) or ())
        values[CONVERTED] = converted_from(before, self.types.again)
        return values


def _weights(source: Source) -> CodedWeights:
    assert isinstance(source.checkpoint, CodedWeights)
    return source.checkpoint
