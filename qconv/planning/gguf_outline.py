"""What a GGUF build would hold, before any weight is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qconv.artifacts.dtypes import weight_dtype
from qconv.artifacts.opening import viewed_names
from qconv.artifacts.separation import require_readable_experts
from qconv.artifacts.source import TOKENIZER_FILES, listed_files
from qconv.checkpoint.extended_rope import with_extended_rope
from qconv.checkpoint.reader import read_json
from qconv.formats.gguf.container import TensorInfo
from qconv.formats.gguf.metadata import require_expressible
from qconv.formats.gguf.mixture import fallbacks, fitted, needs_importance, tensor_types
from qconv.formats.gguf.names import gguf_tensors
from qconv.formats.gguf.rope import rope_of
from qconv.formats.gguf.tokenizer import tokenizer_metadata
from qconv.models import architecture
from qconv.models.discovery import left_out
from qconv.planning.costs import Costs, demand_of_gguf
from qconv.planning.gguf_recipe import GgufRecipe, require_matches
from qconv.planning.plan import ACTIVATION_BYTES


@dataclass(frozen=True, slots=True)
class Outline:
    """What a build would hold: its tensors in file order, what is to be said of them, and what the run takes."""

    tensors: list[TensorInfo]
    notices: list[str]
    costs: Costs


def outline(model: Path, recipe: GgufRecipe) -> Outline:
    """What a build would hold, from config.json and the tokenizer alone.

    Raises:
        CheckpointError: config.json or the tokenizer is missing, damaged or of an unknown kind.
        UsageError: a model or tokenizer that llama.cpp cannot express; experts that are joined and quantized.
        RecipeError: a rule that fits no tensor.
    """
    config = read_json(model / "config.json")
    described = architecture(config)
    listed = listed_files(model)
    require_readable_experts(model, listed, config, described)
    require_expressible(config, described)
    tensors = gguf_tensors(described, rope_of(with_extended_rope(config, recipe.rope)).factors(described.head_dim))
    require_matches(recipe, tensors)
    override = recipe.override(weight_dtype(model, config))
    importance = bool(recipe.imatrix.files) or recipe.calibration is not None
    wanted = tensor_types(recipe.type, described, tensors, importance=importance, override=override)
    types = fitted(wanted, tensors)
    if not importance and any(needs_importance(recipe.type, one, types[one.name]) for one in tensors):
        wanted = tensor_types(recipe.type, described, tensors, importance=True, override=override)
        types = fitted(wanted, tensors)
    notices = [notice for notice in (fallbacks(wanted, types),) if notice is not None]
    expected = {name for name, _ in described.tensors()} | described.ignorable()
    beside = left_out(config, described, viewed_names(config, described, listed) - expected)
    if beside:
        parts = " and ".join(f"{count:,} tensors of {part}" for part, count in Counter(beside.values()).items())
        notices.append(f"{parts} are left out: the file holds the language model alone")
    if any((model / name).is_file() for name in TOKENIZER_FILES):
        tokenizer_metadata(model, described.embedding.out_features, config)
    else:
        notices.append("no tokenizer lies beside config.json; whether it can be written as GGUF is not known")
    text = recipe.calibrated().calibration if recipe.is_calibrated else recipe.calibration
    streams = recipe.calibrated().calibration.streams if recipe.is_calibrated else 1
    scratch = 0 if text is None else text.tokens * described.hidden_size * ACTIVATION_BYTES * streams
    costs = Costs.of(demand_of_gguf(described, recipe), scratch)
    return Outline([TensorInfo(tensor.name, types[tensor.name], tensor.shape) for tensor in tensors], notices, costs)
