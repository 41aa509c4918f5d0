"""The recipe of the best GGUF build of a size: types chosen by what ``qconv sensitivity`` measured."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gguf import GGMLQuantizationType
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.checkpoint.header import read_header
from qconv.checkpoint.reader import map_tensor
from qconv.core.workers import Workers
from qconv.errors import UsageError
from qconv.planning.allocation import Choice, choose, curve
from qconv.planning.gguf_plan import GgufPlan, plan_gguf
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.sensitivity.errors import Errors

T: TypeAlias = GGMLQuantizationType
_FILE_TYPES = {
    T.Q2_K: "Q2_K",
    T.IQ3_S: "IQ3_S",
    T.Q3_K: "Q3_K_M",
    T.IQ4_XS: "IQ4_XS",
    T.IQ4_NL: "IQ4_NL",
    T.Q4_0: "Q4_0",
    T.Q4_K: "Q4_K_M",
    T.Q5_0: "Q5_0",
    T.Q5_1: "Q5_1",
    T.Q5_K: "Q5_K_M",
    T.Q6_K: "Q6_K",
    T.Q8_0: "Q8_0",
    T.F16: "F16",
}
"""What a file is called most of whose weights are of a type."""
_POINTS = 12
"""Of the curve of sizes and divergences."""


@dataclass(frozen=True, slots=True)
class Target:
    """How large the build is to be: bytes of all files, or bits per weight of all tensors; one of them is None."""

    size: int | None = None
    bits: float | None = None


@dataclass(frozen=True, slots=True)
class Allocation:
    """The best types of a size.

    Attributes:
        types: By tensor, those that are chosen.
        predicted: The mean KL divergence that they are predicted to cost, in nats; about half of what is measured.
        size: Bytes of all files, headers included.
        bits: Bits per weight of all tensors.
        recipe: Makes that build.
        curve: Sizes in bits per weight, and the divergence that is predicted there.
    """

    types: Mapping[str, T]
    predicted: float
    size: int
    bits: float
    recipe: GgufRecipe
    curve: Sequence[tuple[float, float]]


def read_sensitivity(path: Path) -> dict[str, Tensor]:
    """The statistics of a folder that ``qconv sensitivity`` made, or of the file in it.

    Raises:
        UsageError: there is none.
        CheckpointError: it is damaged.
    """
    file = path / "sensitivity.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path}: holds no sensitivity.", hint="Make it with qconv sensitivity MODEL -o OUT.")
    return {name: map_tensor(entry) for name, entry in read_header(file).items()}


def allocate(
    source: Source,
    statistics: Mapping[str, Tensor],
    recipe: GgufRecipe,
    target: Target,
    types: Sequence[T],
    workers: Workers,
) -> Allocation:
    """Choose a type for each tensor.

    Args:
        source: The model.
        statistics: Of :func:`read_sensitivity`.
        recipe: What the build is to be besides; its own types do not count.
        target: The size.
        types: What is chosen from.
        workers: Threads; each encodes samples of one tensor.

    Raises:
        UsageError: even the smallest types are too large; llama.cpp cannot express the model.
        CheckpointError: the statistics are another model's.
    """
    bare = recipe.model_copy(update={"tensor_types": {}, "rules": ()})
    plan = _plan(source, bare, {})
    units = Errors(source, statistics, types, bare.is_calibrated).of(plan.tensors.values(), workers)
    numel = sum(tensor.numel for tensor in plan.tensors.values())
    tensors = sum(info.nbytes for file in plan.files for info in file.tensors)
    chosen = sum(info.nbytes for file in plan.files for info in file.tensors if info.name in units)
    if target.size is not None:
        budget = target.size - (plan.output_bytes - chosen)
    else:
        assert target.bits is not None
        budget = math.floor(target.bits * numel / 8) - (tensors - chosen)
    while True:
        found = choose(units, budget)
        if found is None:
            least = plan.output_bytes - chosen + sum(min(one.size for one in choices) for choices in units.values())
            raise UsageError(
                f"the smallest build of these types has {least:,} bytes, {8 * least / numel:.2f} bits per weight.",
                hint="Ask for a larger one, or exclude fewer types.",
            )
        by_name = {name: one.kind for name, one in found.items()}
        made = _recipe(bare, by_name, plan)
        real = _plan(source, made, by_name)
        over = 0 if target.size is None else real.output_bytes - target.size
        if over <= 0:
            break
        budget -= over  # a longer header, or tensors aligned otherwise
    return Allocation(
        by_name,
        sum(one.loss for one in found.values()),
        real.output_bytes,
        real.bits_per_weight,
        made,
        _curve(units, numel, tensors - chosen),
    )


def _curve(units: Mapping[str, Sequence[Choice[T]]], numel: int, fixed: int) -> list[tuple[float, float]]:
    low, high = (sum(pick(one.size for one in choices) for choices in units.values()) for pick in (min, max))
    budgets = [low + (high - low) * point // (_POINTS - 1) for point in range(_POINTS)]
    return [(8 * (size + fixed) / numel, loss) for size, loss in curve(units, budgets)]


def _plan(source: Source, recipe: GgufRecipe, types: Mapping[str, T]) -> GgufPlan:
    return plan_gguf(
        source,
        recipe.type,
        f"{source.name}-{recipe.type}",
        importance=True,
        override=lambda tensor: types.get(tensor.name),
        max_split_size=recipe.output.max_shard_size,
        folded=recipe.searches_scales,
    )


def _recipe(recipe: GgufRecipe, types: Mapping[str, T], plan: GgufPlan) -> GgufRecipe:
    """The recipe that gives each tensor its type by name, called after the type of most weights."""
    weights: Counter[T] = Counter()
    for name, type in types.items():
        weights[type] += plan.tensors[name].numel
    ((most, _),) = weights.most_common(1)
    rules = {f"^{re.escape(name)}$": type.name for name, type in types.items()}
    return recipe.model_copy(update={"type": _FILE_TYPES[most], "tensor_types": rules})
