"""The mixtures of llama.cpp's quantization program, as data.

A file type such as Q4_K_M is a base type and exceptions for the tensors that suffer most. The choices are those of
llama.cpp b11434 for the architectures that qconv writes, so that a file's size and bits per weight are what its name
promises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gguf import GGMLQuantizationType

T: TypeAlias = GGMLQuantizationType


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


_WITH_OUTPUT = {"k": T.Q8_0, "v": T.Q8_0, "o": T.Q5_K}


def _two_bits(base: T, better: T, output_projection: T | None, embedding: T) -> Mixture:
    """The IQ1 and IQ2 file types: ``better`` for the first downs, and for v where it is not small."""
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
    "IQ1_S": _two_bits(T.IQ1_S, T.Q2_K, T.IQ2_XXS, T.Q2_K),
    "IQ1_M": _two_bits(T.IQ1_M, T.Q2_K, T.IQ2_XXS, T.Q2_K),
    "IQ2_XXS": _two_bits(T.IQ2_XXS, T.Q2_K, None, T.Q2_K),
    "IQ2_XS": _two_bits(T.IQ2_XS, T.Q2_K, None, T.Q2_K),
    "IQ2_S": _two_bits(T.IQ2_XS, T.IQ3_S, T.IQ3_S, T.IQ3_S),
    "IQ2_M": _two_bits(T.IQ2_S, T.IQ3_S, T.IQ3_S, T.IQ3_S),
    "TQ1_0": Mixture(T.TQ1_0, embedding=T.Q4_K),
    "TQ2_0": Mixture(T.TQ2_0, embedding=T.Q4_K),
    "MXFP4_MOE": Mixture(T.Q8_0, output=T.Q8_0),
}
"""llama.cpp's file types by name. MXFP4_MOE's experts are MXFP4, which no role tells from a dense layer."""

REPACKED: dict[str, Mixture] = {"NVFP4": Mixture(T.NVFP4, output=T.Q8_0)}
"""File types whose blocks are made of codes that are there; nothing is rounded to them."""
