"""Which type each tensor gets under a file type: the mixtures of llama.cpp's quantization program, as data.

A file type such as Q4_K_M is a base type and exceptions for the tensors that suffer most. The choices are those of
llama.cpp b11434 for the architectures that qconv writes, so that a file's size and bits per weight are what its name
promises. Rows that a type's block does not divide get a type of smaller blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from gguf import GGML_QUANT_SIZES, MODEL_TENSOR, GGMLQuantizationType, LlamaFileType

from qconv.core.architecture import Architecture, Moe
from qconv.errors import UsageError
from qconv.formats.gguf.names import GgufTensor

T: TypeAlias = GGMLQuantizationType


Override: TypeAlias = Callable[[GgufTensor], T | None]
"""Gives a type to a tensor that a file type decides about, or None to leave it to the file type."""


def no_override(tensor: GgufTensor) -> T | None:
    """Leaves every tensor to the file type."""
    return None


@dataclass(frozen=True, slots=True)
class Place:
    """What a rule may look at.

    Attributes:
        layer: The tensor's layer.
        layers: The number of layers.
        nth_down: How many down projections come before it in the file: more than ``layer`` beside shared experts.
        experts: Experts a layer has; 0 in a dense model.
        queries_per_key: Query heads that share a key head.
        importance: Whether there is an imatrix.
    """

    layer: int
    layers: int
    nth_down: int
    experts: int
    queries_per_key: int
    importance: bool

    @property
    def sensitive(self) -> bool:
        """The layers that a medium mixture spends more on: the first and last eighth, and every third between."""
        eighth = self.layers // 8
        return self.layer < eighth or self.layer >= 7 * self.layers // 8 or (self.layer - eighth) % 3 == 2


Rule: TypeAlias = Callable[[Place], T | None]
"""Gives a type, or None for the base type."""


def always(type: T) -> Rule:
    """That type everywhere."""
    return lambda place: type


def sensitive(type: T) -> Rule:
    """That type in the sensitive layers."""
    return lambda place: type if place.sensitive else None


def first(layers: int, type: T, then: T | None = None) -> Rule:
    """That type in so many layers, ``then`` after them."""
    return lambda place: type if place.layer < layers else then


def first_part(divisor: int, type: T, then: T | None = None) -> Rule:
    """That type in the first ``1 / divisor`` of the layers, ``then`` after them."""
    return lambda place: type if place.layer < place.layers // divisor else then


def middle(type: T) -> Rule:
    """That type outside the first and last eighth of the layers."""
    return lambda place: type if place.layers // 8 <= place.layer < 7 * place.layers // 8 else None


def grouped(type: T, otherwise: T | None = None) -> Rule:
    """That type where four or more query heads share a key head, which makes k and v small."""
    return lambda place: type if place.queries_per_key >= 4 else otherwise


def with_importance(rule: Rule) -> Rule:
    """The rule where there is an imatrix."""
    return lambda place: rule(place) if place.importance else None


def without_importance(rule: Rule) -> Rule:
    """The rule where there is none."""
    return lambda place: None if place.importance else rule(place)


@dataclass(frozen=True, slots=True)
class Mixture:
    """A file type: its base and the rules of the roles (``v``, ``down`` ...) that deviate.

    Attributes:
        eight_experts: What attention gets in a model of eight experts, where it is a small part, by role.
    """

    base: T
    rules: Mapping[str, Rule] = field(default_factory=dict)
    output: T = T.Q6_K
    embedding: T | None = None
    eight_experts: Mapping[str, T] = field(default_factory=lambda: {"k": T.Q8_0, "v": T.Q8_0})


_ROLES = {
    MODEL_TENSOR.ATTN_Q: "q",
    MODEL_TENSOR.ATTN_K: "k",
    MODEL_TENSOR.ATTN_V: "v",
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
_EXPERTS = (MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP, MODEL_TENSOR.FFN_DOWN_EXP)

_WITH_OUTPUT = {"k": T.Q8_0, "v": T.Q8_0, "o": T.Q5_K}


def _two_bits(base: T, better: T, output_projection: T | None, embedding: T) -> Mixture:
    """The IQ2 file types: ``better`` for the first downs, and for v where it is not small."""
    rules: dict[str, Rule] = {
        "v": lambda place: T.Q4_K if place.queries_per_key >= 4 or place.experts >= 4 else better,
        "down": lambda place: better if place.nth_down < place.layers // 8 else None,
    }
    if output_projection is not None:
        rules["o"] = always(output_projection)
    return Mixture(
        base,
        rules,
        output=T.Q5_K,
        embedding=embedding,
        eight_experts={"k": T.Q4_K, "v": T.Q4_K, "o": T.Q5_K},
    )


def _iq3_medium_down(place: Place) -> T | None:
    raised = place.layer < place.layers // 8 or (place.experts == 8 and place.sensitive)
    return T.Q4_K if raised else None


def _four_bit_nonlinear(base: T) -> Mixture:
    rules = {"v": grouped(T.Q5_K), "down": without_importance(first_part(8, T.Q5_K))}
    return Mixture(base, rules, eight_experts=_WITH_OUTPUT)


MIXTURES: dict[str, Mixture] = {
    "F32": Mixture(T.F32),
    "F16": Mixture(T.F16),
    "BF16": Mixture(T.BF16),
    "Q8_0": Mixture(T.Q8_0, output=T.Q8_0),
    "Q4_0": Mixture(T.Q4_0, {"down": with_importance(first_part(8, T.Q4_1))}),
    "Q4_1": Mixture(T.Q4_1),
    "Q5_0": Mixture(T.Q5_0, {"down": with_importance(first_part(8, T.Q5_1))}),
    "Q5_1": Mixture(T.Q5_1),
    "Q2_K": Mixture(
        T.Q2_K,
        {"v": grouped(T.Q4_K, T.Q3_K), "o": always(T.Q3_K), "down": always(T.Q3_K)},
        eight_experts=_WITH_OUTPUT,
    ),
    "Q2_K_S": Mixture(T.Q2_K, {"v": grouped(T.Q4_K), "down": first_part(8, T.Q4_K)}),
    "Q3_K_S": Mixture(T.Q3_K, eight_experts=_WITH_OUTPUT),
    "Q3_K_M": Mixture(
        T.Q3_K,
        {"v": first(2, T.Q5_K, T.Q4_K), "o": always(T.Q4_K), "down": first_part(16, T.Q5_K, T.Q4_K)},
        eight_experts=_WITH_OUTPUT,
    ),
    "Q3_K_L": Mixture(T.Q3_K, {"v": always(T.Q5_K), "o": always(T.Q5_K), "down": always(T.Q5_K)}),
    "Q4_K_S": Mixture(T.Q4_K, {"v": first(4, T.Q5_K), "down": first_part(8, T.Q5_K)}, eight_experts=_WITH_OUTPUT),
    "Q4_K_M": Mixture(T.Q4_K, {"v": sensitive(T.Q6_K), "down": sensitive(T.Q6_K)}, eight_experts=_WITH_OUTPUT),
    "Q5_K_S": Mixture(T.Q5_K),
    "Q5_K_M": Mixture(T.Q5_K, {"v": sensitive(T.Q6_K), "down": sensitive(T.Q6_K)}),
    "Q6_K": Mixture(T.Q6_K),
    "IQ4_NL": _four_bit_nonlinear(T.IQ4_NL),
    "IQ4_XS": _four_bit_nonlinear(T.IQ4_XS),
    "IQ3_XXS": Mixture(
        T.IQ3_XXS,
        {
            "q": always(T.IQ2_S),
            "k": always(T.IQ2_S),
            "v": lambda place: T.Q4_K if place.queries_per_key >= 4 else None if place.importance else T.IQ3_S,
            "o": always(T.IQ3_S),
            "down": without_importance(first_part(8, T.Q4_K, T.Q3_K)),
        },
        output=T.Q5_K,
        embedding=T.IQ3_S,
        eight_experts=_WITH_OUTPUT,
    ),
    "IQ3_XS": Mixture(
        T.IQ3_S,
        {
            "q": always(T.IQ3_XXS),
            "k": always(T.IQ3_XXS),
            "v": grouped(T.Q4_K),
            "gate": middle(T.IQ3_XXS),
            "up": middle(T.IQ3_XXS),
        },
        eight_experts=_WITH_OUTPUT,
    ),
    "IQ3_S": Mixture(T.IQ3_S, {"v": grouped(T.Q4_K)}, eight_experts=_WITH_OUTPUT),
    "IQ3_M": Mixture(
        T.IQ3_S,
        {"v": always(T.Q4_K), "o": always(T.Q4_K), "down": _iq3_medium_down},
        eight_experts=_WITH_OUTPUT,
    ),
    "IQ2_XXS": _two_bits(T.IQ2_XXS, T.Q2_K, None, T.Q2_K),
    "IQ2_XS": _two_bits(T.IQ2_XS, T.Q2_K, None, T.Q2_K),
    "IQ2_S": _two_bits(T.IQ2_XS, T.IQ3_S, T.IQ3_S, T.IQ3_S),
    "IQ2_M": _two_bits(T.IQ2_S, T.IQ3_S, T.IQ3_S, T.IQ3_S),
    "MXFP4_MOE": Mixture(T.Q8_0, output=T.Q8_0),
}
"""The file types by name. MXFP4_MOE's experts are MXFP4, which no role tells from a dense layer."""

_FLOATS = (T.F32, T.F16, T.BF16)
_SMALLER_BLOCKS = {
    T.IQ2_XXS: T.IQ4_NL,
    T.IQ2_XS: T.IQ4_NL,
    T.IQ2_S: T.IQ4_NL,
    T.IQ3_XXS: T.IQ4_NL,
    T.IQ3_S: T.IQ4_NL,
    T.IQ4_XS: T.IQ4_NL,
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}
_NEED_IMPORTANCE = (T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS)


def file_type_id(name: str) -> LlamaFileType:
    """The number of a file type, as ``general.file_type`` holds it.

    Raises:
        UsageError: no such file type.
    """
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
        file_type: A key of :data:`MIXTURES`.
        model: The architecture.
        tensors: All tensors of the file.
        importance: Whether there is an imatrix, which some mixtures depend on.
        override: Gives types before the mixture does.

    Raises:
        UsageError: no such file type.
    """
    mixture = _mixture(file_type)
    downs = sorted((t for t in tensors if _ROLES.get(t.kind) == "down"), key=lambda t: (t.layer, t.name))
    nth_down = {tensor.name: number for number, tensor in enumerate(downs)}

    def chosen(tensor: GgufTensor) -> T:
        if not tensor.quantizable:
            return T.F32
        found = override(tensor)
        if found is not None:
            return found
        if mixture.base in _FLOATS:
            return mixture.base
        if file_type == "MXFP4_MOE":
            return T.MXFP4 if tensor.kind in _EXPERTS else T.Q8_0
        if tensor.layer is None:
            return _outside_layers(mixture, tensor, tied=model.lm_head is None)
        return _in_layer(mixture, tensor, _place(model, tensor.layer, nth_down.get(tensor.name, 0), importance), model)

    return {tensor.name: chosen(tensor) for tensor in tensors}


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
    if name not in MIXTURES:
        raise UsageError(f"unknown GGUF file type {name!r}.", hint=f"Choose one of {', '.join(MIXTURES)}.")
    return MIXTURES[name]


def _place(model: Architecture, layer: int, nth_down: int, importance: bool) -> Place:
    moe = model.layers[layer].mlp
    return Place(
        layer=layer,
        layers=len(model.layers),
        nth_down=nth_down,
        experts=len(moe.experts) if isinstance(moe, Moe) else 0,
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
    if role == "v" and _is_llama_70b(model) and type in (T.Q3_K, T.Q4_K):
        return T.Q5_K
    return type


def _is_llama_70b(model: Architecture) -> bool:
    """Llama 2 and 3 70B: v is an eighth of q, so a better type costs little."""
    return (
        model.family in ("llama", "mixtral")
        and len(model.layers) == 80
        and model.num_attention_heads != model.num_key_value_heads
    )
