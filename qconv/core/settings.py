"""What can be set of grids, methods, calibration and files: the sections of a recipe, each checked as a whole."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

GIGABYTE = 10**9


MOST_MOVED = 0.3
"""How far matched calibration moves an output row of a weight before it is rounded, as a share of its norm."""
MATCHED = "matched"
"""A value of ``calibration.propagate``."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values are not coerced, numbers are finite and have 64 bits."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("has more than 64 bits")
        return value


def positive_or_channel(value: int) -> int:
    """A group size that there can be.

    Raises:
        ValueError: it is not.
    """
    if value != -1 and value < 8:
        raise ValueError("must be -1 (one scale a row) or at least 8")
    return value


class GridSettings(Section):
    """The quantization grid. ``symmetric: null`` takes the format's own default, ``values: null`` all its values."""

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Of a code."""
    group_size: int = 128
    """Weights of a row that share a scale; -1 for the whole row."""
    symmetric: bool | None = None
    """Without zero points; null: the format's own default."""
    values: str | None = None
    """Those of a module of qconv/grids, by its name: some of the format's, or chosen in a way of its own."""

    @model_serializer(mode="wrap")
    def _without_absent_values(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe that does not ask for values is the one that it was before it could."""
        found: dict[str, Any] = serialize(self)
        return {key: value for key, value in found.items() if key != "values" or value is not None}

    @field_validator("group_size")
    @classmethod
    def _positive_or_channel(cls, value: int) -> int:
        return positive_or_channel(value)


class ClipSettings(Section):
    """The search of the clipping range: ``steps`` ratios from 1 downward, the last one above ``1 - max_shrink``.

    ``enabled: null`` means on for methods that look at activations and off for plain rounding.
    """

    enabled: bool | None = None
    """Whether ranges are searched; null: where a method looks at activations."""
    steps: Annotated[int, Field(ge=1, le=100)] = 10
    """Ratios that are tried."""
    max_shrink: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """What the smallest ratio leaves out, as a share of the range."""


class AwqSettings(Section):
    """The search of AWQ's scales (Lin et al. 2023, section 3.2): alpha on ``alpha_points`` points of [0, 1]."""

    alpha_points: Annotated[int, Field(ge=20, le=200)] = 20
    """Exponents that are tried, from 0 (no scales) to 1."""
    search_tokens: Annotated[int, Field(ge=16)] = 128
    """Tokens of one expert (or attention block) on which the loss is measured."""


class GptqSettings(Section):
    """How GPTQ works through the columns (Frantar et al. 2022).

    ``ordering``: ``none`` takes columns as they are, ``static`` the important ones first with groups of neighbours,
    ``desc_act`` the important ones first with groups of columns of like importance, which engines must gather.
    """

    block_size: Annotated[int, Field(ge=1)] = 128
    """Columns between updates of the columns after them; it decides speed, and codes only by rounding."""
    damp_percent: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Added to the Hessian's diagonal, as a share (0.01 is one percent) of its mean."""
    ordering: Literal["none", "static", "desc_act"] = "static"
    """In which order columns are rounded; ``desc_act`` is for the gptq format alone."""


class RefineSettings(Section):
    """What follows GPTQ: passes over the codes, each taking the best given all others, and over the scales."""

    sweeps: Annotated[int, Field(ge=0, le=20)] = 0
    """Passes over the codes."""
    refits: Annotated[int, Field(ge=0, le=20)] = 0
    """Passes that choose scales again, too, by least squares."""


class CorpusShare(Section):
    """A corpus of a mixture."""

    corpus: str
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Its part of the sequences is this over the sum of all weights."""


class TextSettings(Section):
    """Which calibration text, and how much of it."""

    corpus: str | tuple[CorpusShare, ...] = "python-stdlib"
    """``python-stdlib``, ``agent``, ``text:PATH``, ``jsonl:PATH[:FIELD]``, ``hf:DATASET[:CONFIG][:SPLIT][:FIELD]``;
    or a list of ``{corpus, weight}`` that share the sequences."""
    tokens: Annotated[int, Field(ge=1)] = 32768
    """How many; a multiple of the sequence length."""
    sequence_length: Annotated[int, Field(ge=16)] = 512
    """Tokens that attend to each other."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the choice of sequences."""
    sequences: Literal["packed", "documents"] = "packed"
    """``packed``: documents follow each other. ``documents``: each sequence is of one; shorter ones are left out."""

    @field_validator("corpus", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("corpus")
    @classmethod
    def _different(cls, value: str | tuple[CorpusShare, ...]) -> str | tuple[CorpusShare, ...]:
        if isinstance(value, str):
            return value
        names = [share.corpus for share in value]
        if not names or len({*names}) < len(names):
            raise ValueError("a mixture names corpora, each once")
        return names[0] if len(names) == 1 else value

    @model_serializer(mode="wrap")
    def _without_packing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Settings that do not ask for anything else are those that they were before they could."""
        found: dict[str, Any] = serialize(self)
        return {key: value for key, value in found.items() if key != "sequences" or value != "packed"}

    @property
    def shares(self) -> tuple[CorpusShare, ...]:
        """The corpora; one alone has all."""
        return (CorpusShare(corpus=self.corpus),) if isinstance(self.corpus, str) else self.corpus

    @property
    def named(self) -> str:
        """The corpus, or the mixture as the command line has it, for people."""
        if isinstance(self.corpus, str):
            return self.corpus
        return " + ".join(f"{share.weight:g}*{share.corpus}" for share in self.corpus)

    @model_validator(mode="after")
    def _whole_sequences(self) -> Self:
        if self.tokens % self.sequence_length:
            raise ValueError(f"tokens {self.tokens} is not a multiple of sequence_length {self.sequence_length}")
        return self


class CalibrationSettings(TextSettings):
    """The text, and how the experts see it."""

    routing: Literal["routed", "all-experts"] = "routed"
    """Which tokens an expert's statistics come from: those that the router sends it, or all."""
    propagate: bool | Literal["matched"] = True
    """Whether the next layer sees the quantized layer's outputs; ``matched``: it does, and GPTQ aims at the outputs
    that the unquantized model's inputs give."""
    matched_strength: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    """How much of the way to those outputs a weight is moved before it is rounded."""
    token_weights: Literal["uniform", "router"] = "uniform"
    """What a token counts in an expert's statistics: the same for all, or its router weight squared, which is what its
    output's squared error counts in the layer's output."""
    shrinkage_tokens: Annotated[int, Field(ge=0)] = 64
    """k of ``H = (n H_expert + k H_layer) / (n + k)`` for an expert that saw n tokens."""

    @property
    def streams(self) -> int:
        """How many models' activations go through the layers."""
        return 2 if self.propagate == MATCHED else 1


class OutputSettings(Section):
    """The files of the build."""

    max_shard_size: Annotated[int, Field(ge=10**6)] = 5 * GIGABYTE
    """Of a file of weights, in bytes."""
