"""What a GGUF build would hold, before any weight is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qconv.artifacts.source import TOKENIZER_FILES, listed_files, require_single_experts
from qconv.checkpoint.reader import read_json
from qconv.formats.gguf.container import TensorInfo
from qconv.formats.gguf.metadata import require_expressible
from qconv.formats.gguf.mixture import fallbacks, fitted, needs_importance, tensor_types
from qconv.formats.gguf.names import gguf_tensors
from qconv.formats.gguf.rope import rope_of
from qconv.formats.gguf.tokenizer import tokenizer_metadata
from qconv.models import architecture
from qconv.planning.gguf_recipe import GgufRecipe, require_matches


@dataclass(frozen=True, slots=True)
class Outline:
    """What a build would hold: its tensors in file order, and what is to be said of them."""

    tensors: list[TensorInfo]
    notices: list[str]


def outline(model: Path, recipe: GgufRecipe) -> Outline:
    """What a build would hold, from config.json and the tokenizer alone.

    Raises:
        CheckpointError: config.json or the tokenizer is missing, damaged or of an unknown kind.
        UsageError: a model or tokenizer that llama.cpp cannot express; fused experts.
        RecipeError: a rule that fits no tensor.
    """
    config = read_json(model / "config.json")
    described = architecture(config)
    require_single_experts(model, listed_files(model))
    require_expressible(config, described)
    tensors = gguf_tensors(described, rope_of(config).factors(described.head_dim))
    require_matches(recipe, tensors)
    importance = bool(recipe.imatrix.files) or recipe.calibration is not None
    wanted = tensor_types(recipe.type, described, tensors, importance=importance, overrides=recipe.overrides)
    types = fitted(wanted, tensors)
    if not importance and any(needs_importance(recipe.type, one, types[one.name]) for one in tensors):
        wanted = tensor_types(recipe.type, described, tensors, importance=True, overrides=recipe.overrides)
        types = fitted(wanted, tensors)
    notices = [notice for notice in (fallbacks(wanted, types),) if notice is not None]
    if any((model / name).is_file() for name in TOKENIZER_FILES):
        tokenizer_metadata(model, described.embedding.out_features, config)
    else:
        notices.append("no tokenizer lies beside config.json; whether it can be written as GGUF is not known")
    return Outline([TensorInfo(tensor.name, types[tensor.name], tensor.shape) for tensor in tensors], notices)
