"""Which type each tensor gets under a file type: a mixture of llama.cpp's, or a ready one of qconv's own.

Rows that a type's block does not divide get a type of smaller blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from gguf import GGML_QUANT_SIZES, MODEL_TENSOR, GGMLQuantizationType, LlamaFileType

from qconv.core.architecture import Architecture, Moe
from qconv.errors import UsageError
from qconv.formats.gguf.container import TensorInfo
from qconv.formats.gguf.llama_cpp_mixtures import MIXTURES, REPACKED, Mixture, Place, always
from qconv.formats.gguf.names import GgufTensor, architecture_name, unobserved
from qconv.formats.gguf.ready import READY, ready_types

T: TypeAlias = GGMLQuantizationType


Override: TypeAlias = Callable[[GgufTensor], T | None]
"""Gives a type to a tensor that a file type decides about, or None to leave it to the file type."""


def no_override(tensor: GgufTensor) -> T | None:
    """Leaves every tensor to the file type."""
    return None


FILE_TYPES = (*MIXTURES, *READY)
"""All names of mixtures: llama.cpp's, then qconv's own."""

_ROLES = {
    MODEL_TENSOR.ATTN_Q: "q",
    MODEL_TENSOR.ATTN_K: "k",
    MODEL_TENSOR.ATTN_V: "v",
    MODEL_TENSOR.ATTN_QKV: "v",  # a delta rule's
    MODEL_TENSOR.ATTN_OUT: "o",
    MODEL_TENSOR.FFN_GATE: "gate",
    MODEL_TENSOR.FFN_GATE_EXP: "gate",
    MODEL_TENSOR.FFN_GATE_SHEXP: "gate",
    MODEL_TENSOR.FFN_UP: "up",
    MODEL_TENSOR.FFN_UP_EXP: "up",
    MODEL_TENSOR.FFN_UP_SHEXP: "up",
    MODEL_TENSOR.FFN_DOWN: "down",
    MODEL_TENSOR.FFN_DOWN_EXP: "down",
    MODEL_TENSOR.FFN_DOWN_SHEXP: "down",
}

_FLOATS = (T.F32, T.F16, T.BF16)
_SMALLER_BLOCKS = {
    T.IQ1_S: T.IQ4_NL,
    T.IQ1_M: T.IQ4_NL,
    T.IQ2_XXS: T.IQ4_NL,
    T.IQ2_XS: T.IQ4_NL,
    T.IQ2_S: T.IQ4_NL,
    T.IQ3_XXS: T.IQ4_NL,
    T.IQ3_S: T.IQ4_NL,
    T.IQ4_XS: T.IQ4_NL,
    T.TQ1_0: T.Q4_0,
    T.TQ2_0: T.Q4_0,
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}
_NEED_IMPORTANCE = (T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS)


def called_after(weights: Mapping[T, int]) -> str:
    """llama.cpp's file type of the type that most weights have, by their numbers."""
    most = max(weights, key=lambda type: (weights[type], type))
    return {T.Q3_K: "Q3_K_M", T.Q4_K: "Q4_K_M", T.Q5_K: "Q5_K_M"}.get(most, most.name)


def file_type_id(name: str, tensors: Iterable[GgufTensor] = (), types: Mapping[str, T] | None = None) -> LlamaFileType:
    """The number of a file type, as ``general.file_type`` holds it.

    Args:
        name: One of :data:`FILE_TYPES`.
        tensors: Of a mixture that llama.cpp has no number for: it gets that of the type of most weights.
        types: Theirs, by name.

    Raises:
        UsageError: no such file type.
    """
    if name in READY and types is not None:
        weights: Counter[T] = Counter()
        for tensor in tensors:
            if tensor.quantizable:
                weights[types[tensor.name]] += tensor.numel
        name = called_after(weights)
    _mixture(name)
    return LlamaFileType.ALL_F32 if name == "F32" else LlamaFileType[f"MOSTLY_{name}"]


def tensor_types(
    file_type: str,
    model: Architecture,
    tensors: Sequence[GgufTensor],
    *,
    importance: bool,
    override: Override = no_override,
) -> dict[str, T]:
    """The type that every tensor is to have, by name; :func:`fitted` says which it can.

    Args:
        file_type: One of :data:`FILE_TYPES`.
        model: The architecture.
        tensors: All tensors of the file.
        importance: Whether there is an imatrix, which some mixtures depend on.
        override: Gives types before the mixture does.

    Raises:
        UsageError: no such file type.
    """
    if file_type in READY:
        return _ready(file_type, model, tensors, importance=importance, override=override)
    mixture = _mixture(file_type)
    downs = sorted((t for t in tensors if _ROLES.get(t.kind) == "down"), key=lambda t: (t.layer, t.name))
    nth_down = {tensor.name: number for number, tensor in enumerate(downs)}
    # Of v its number counts, which is no layer's where some layers have none.
    values = sorted({t.layer for t in tensors if _ROLES.get(t.kind) == "v" and t.layer is not None})
    counted = {layer: number for number, layer in enumerate(values)}
    unseen = unobserved(model)

    def chosen(tensor: GgufTensor) -> T:
        if not tensor.quantizable:
            return T.F32
        found = override(tensor)
        if found is not None:
            return found
        if mixture.base in _FLOATS:
            return mixture.base
        if file_type == "MXFP4_MOE":
            # By their dimensions, so that latent attention's matrices of heads are, too.
            return T.MXFP4 if len(tensor.shape) == 3 and tensor.shape[0] > 1 else T.Q8_0
        if tensor.layer is None:
            return _outside_layers(mixture, tensor, tied=model.lm_head is None)
        place = _place(model, tensor.layer, nth_down.get(tensor.name, 0), importance)
        if _ROLES.get(tensor.kind) == "v" and len(tensor.shape) > 1:
            place = replace(place, layer=counted[tensor.layer], layers=len(counted))
        type = _in_layer(mixture, tensor, place, model)
        # What needs an importance cannot have it there, so these few get more bits than llama.cpp's program gives them.
        return T.Q8_0 if needs_importance(file_type, tensor, type) and tensor.sources[0] in unseen else type

    return {tensor.name: chosen(tensor) for tensor in tensors}


def _ready(
    name: str, model: Architecture, tensors: Sequence[GgufTensor], *, importance: bool, override: Override
) -> dict[str, T]:
    """A ready mixture, in the size of llama.cpp's file type without overrides, whose sizes do not count."""

    def size(tensor: GgufTensor, type: T) -> int:
        return TensorInfo(tensor.name, fitting(type, tensor.columns), tensor.shape).padded

    limit = tensor_types(READY[name], model, tensors, importance=importance)
    free = [tensor for tensor in tensors if tensor.quantizable]
    types = limit | ready_types(model, free, size, sum(size(tensor, limit[tensor.name]) for tensor in free))
    found = ((tensor.name, override(tensor)) for tensor in free)
    return types | {name: type for name, type in found if type is not None}


def fitted(wanted: Mapping[str, T], tensors: Iterable[GgufTensor]) -> dict[str, T]:
    """The types of :func:`tensor_types` where they fit the rows, else what llama.cpp's program takes instead."""
    return {tensor.name: fitting(wanted[tensor.name], tensor.columns) for tensor in tensors}


def fallbacks(wanted: Mapping[str, T], types: Mapping[str, T]) -> str | None:
    """A sentence about the tensors whose rows the wanted type's blocks do not divide; None if there are none."""
    counts = Counter((wanted[name], type) for name, type in types.items() if wanted[name] != type)
    if not counts:
        return None
    changes = ", ".join(f"{count} x {old.name} -> {new.name}" for (old, new), count in counts.items())
    return (
        f"{counts.total()} of {len(types)} tensors hold another type than the asked one, whose blocks do not divide "
        f"their rows: {changes}"
    )


def fitting(type: T, columns: int) -> T:
    """The type itself where its block divides rows of ``columns``, else one of smaller blocks, at last F16."""
    for candidate in (type, _SMALLER_BLOCKS.get(type, T.F16)):
        if columns % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return T.F16


def needs_importance(file_type: str, tensor: GgufTensor, type: T) -> bool:
    """Whether llama.cpp's program refuses to make this tensor without an imatrix."""
    return tensor.layer is not None and (type in _NEED_IMPORTANCE or (file_type == "Q2_K_S" and type == T.Q2_K))


def _mixture(name: str) -> Mixture:
    if name not in MIXTURES and name not in REPACKED:
        raise UsageError(f"unknown GGUF file type {name!r}.", hint=f"Choose one of {', '.join(FILE_TYPES)}.")
    return MIXTURES.get(name) or REPACKED[name]


def _place(model: Architecture, layer: int, nth_down: int, importance: bool) -> Place:
    experts = max((len(one.mlp.experts) for one in model.layers if isinstance(one.mlp, Moe)), default=0)
    return Place(
        layer=layer,
        layers=len(model.layers),
        nth_down=nth_down,
        experts=experts,
        queries_per_key=model.num_attention_heads // model.num_key_value_heads,
        importance=importance,
    )


def _outside_layers(mixture: Mixture, tensor: GgufTensor, tied: bool) -> T:
    """The head, and the embedding, which is the head where they are tied."""
    if tensor.kind == MODEL_TENSOR.TOKEN_EMBD and not tied:
        return mixture.embedding or mixture.base
    return T.Q8_0 if tensor.columns % GGML_QUANT_SIZES[mixture.base][0] else mixture.output


def _in_layer(mixture: Mixture, tensor: GgufTensor, place: Place, model: Architecture) -> T:
    role = _ROLES.get(tensor.kind, "")
    if place.experts == 8 and role in ("k", "v", "o"):
        return mixture.eight_experts.get(role, mixture.base)
    type = mixture.rules.get(role, always(mixture.base))(place) or mixture.base
    if role == "v" and _is_70b(model) and type in (T.Q3_K, T.Q4_K):
        return T.Q5_K
    return type


def _is_70b(model: Architecture) -> bool:
    """Llama 2 and 3 70B and Qwen2 72B, as llama.cpp knows them: v is an eighth of q, so a better type costs little."""
    grouped = model.num_attention_heads != model.num_key_value_heads
    return len(model.layers) == 80 and (
        (architecture_name(model.family) == "llama" and grouped) or model.family == "qwen2"
    )
