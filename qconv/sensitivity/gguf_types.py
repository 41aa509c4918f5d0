"""The types of GGUF as what a build's tensors can become: see :class:`qconv.sensitivity.palette.Palette`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from gguf import GGML_QUANT_SIZES, MODEL_TENSOR
from gguf import GGMLQuantizationType as T
from torch import Tensor

from qconv.artifacts.gguf_tensors import encoder
from qconv.artifacts.source import Source
from qconv.core.architecture import HEAD
from qconv.formats.gguf.mixture import called_after, fitting
from qconv.formats.gguf.names import GgufTensor, unobserved
from qconv.grids.ggml import encode
from qconv.planning.gguf_plan import GgufPlan, plan_gguf
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.sensitivity.palette import Extent, Part, Unit, without
from qconv.verification.blocks import decoded

TYPES = ("Q2_K", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""What is chosen from, where nothing is excluded."""
SMALL_TYPES = ("IQ4_NL", "Q4_0", "Q5_0", "Q5_1", "Q8_0")
"""Where blocks of 256 do not divide the rows."""
COMPENSATED = {
    "Q2_K": 0.30,
    "IQ3_S": 0.26,
    "Q3_K": 0.25,
    "IQ4_XS": 0.30,
    "IQ4_NL": 0.30,
    "Q4_K": 0.32,
    "Q4_0": 0.32,
    "Q5_K": 0.38,
    "Q5_0": 0.38,
    "Q5_1": 0.38,
    "Q6_K": 0.39,
    "Q8_0": 0.40,
}
"""What calibrated rounding leaves of the divergence (docs/evidence/quality.md)."""


_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class GgufTypes:
    """Types of a GGUF build's tensors.

    Attributes:
        recipe: What the build is to be besides. A tensor to which it gives a type of its own keeps that.
    """

    def __init__(self, source: Source, recipe: GgufRecipe, excluded: Sequence[str] = ()) -> None:
        """Of a model.

        Args:
            source: The model.
            recipe: Its file type does not count.
            excluded: Shell patterns of types that are not to be chosen.

        Raises:
            UsageError: llama.cpp cannot express the model; a pattern fits no type, or all of them.
        """
        self.recipe = recipe
        self._source = source
        known = dict.fromkeys((*TYPES, *SMALL_TYPES))
        self._left = without(tuple(known), excluded)
        self._override = recipe.override(source.dtype)
        self._fixed: dict[str, str] = {}
        bare = self._plan(recipe, {})
        found = [tensor for tensor in bare.tensors.values() if tensor.quantizable]
        unseen = unobserved(source.architecture)
        self._fixed = {
            one.name: fitting(T.Q8_0, one.columns).name
            for one in found
            if one.sources[0] in unseen and self._override(one) is None
        }
        self._tensors = {one.name: one for one in found if one.sources[0] not in unseen}
        self._given = {
            name: bare.types[name].name for name, one in self._tensors.items() if self._override(one) is not None
        }

    @property
    def units(self) -> list[Unit]:
        """Every tensor that a file type decides about; what calibration does not look at has eight bits."""
        tied = self._source.architecture.lm_head is None
        return [_unit(tensor, tied) for tensor in self._tensors.values()]

    def names(self, unit: Unit) -> list[str]:
        """The types whose blocks divide its rows, or the one that the recipe gives it."""
        if unit.name in self._given:
            return [self._given[unit.name]]
        columns = self._tensors[unit.name].columns
        for types in (TYPES, SMALL_TYPES) if columns % GGML_QUANT_SIZES[T.Q4_K][0] == 0 else (SMALL_TYPES,):
            found = [one for one in types if one in self._left and columns % GGML_QUANT_SIZES[T[one]][0] == 0]
            if found:
                return found
        return ["F16"]

    def size(self, unit: Unit, name: str) -> int:
        """Bytes of the tensor."""
        block, nbytes = GGML_QUANT_SIZES[T[name]]
        return unit.numel // block * nbytes

    def rounded(self, rows: Tensor, name: str, importance: Tensor) -> Tensor:
        """Encoded with importance, and decoded."""
        if name in _FLOATS:
            return rows.to(_FLOATS[name]).float()
        return decoded(encode(rows, encoder(T[name]), importance), T[name])

    def left(self, unit: Unit, name: str) -> float:
        """What GPTQ leaves, which rounds linears of layers alone."""
        return COMPENSATED.get(name, 1.0) if self.recipe.is_calibrated and unit.layer is not None else 1.0

    def extent(self, chosen: Mapping[str, str]) -> Extent:
        """Of all files; bits are counted over all tensors."""
        plan = self._plan(self.recipe_for(chosen), chosen)
        counted = sum(info.nbytes for file in plan.files for info in file.tensors)
        return Extent(plan.output_bytes, counted, sum(tensor.numel for tensor in plan.tensors.values()))

    def recipe_for(self, chosen: Mapping[str, str]) -> GgufRecipe:
        """The recipe that gives each tensor its type by name, called after the type of most weights."""
        weights: Counter[T] = Counter()
        for name, type in chosen.items():
            weights[T[type]] += self._tensors[name].numel
        types = {name: type for name, type in chosen.items() if name not in self._given} | self._fixed
        types = {f"^{re.escape(name)}$": type for name, type in types.items()}
        changes = {"type": called_after(weights), "tensor_types": {**self.recipe.tensor_types, **types}}
        return self.recipe.model_copy(update=changes)

    def _plan(self, recipe: GgufRecipe, types: Mapping[str, str]) -> GgufPlan:
        def override(tensor: GgufTensor) -> T | None:
            given = types.get(tensor.name, self._fixed.get(tensor.name))
            return self._override(tensor) if given is None else T[given]

        return plan_gguf(
            self._source,
            recipe.type,
            f"{self._source.name}-{recipe.type}",
            importance=True,
            override=override,
            max_split_size=recipe.output.max_shard_size,
            folded=recipe.searches_scales,
            rope=recipe.rope,
        )


def _unit(tensor: GgufTensor, tied: bool) -> Unit:
    role = tensor.name.removesuffix(".weight").removeprefix(f"blk.{tensor.layer}.")
    parts = tuple(Part(name.removesuffix(".weight"), name) for name in tensor.sources)
    groups = [parts]
    if tensor.kind is MODEL_TENSOR.TOKEN_EMBD:
        groups = [(replace(parts[0], is_embedding=True),)]
    if tensor.kind is MODEL_TENSOR.OUTPUT or (tied and tensor.kind is MODEL_TENSOR.TOKEN_EMBD):
        head = (Part(HEAD, parts[0].weight),)
        groups = [head] if tensor.kind is MODEL_TENSOR.OUTPUT else [*groups, head]
    return Unit(tensor.name, tensor.layer, role, tuple(groups), tensor.numel)
