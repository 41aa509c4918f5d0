"""The recipe of a GGUF build: its file type, exceptions by tensor, and where its importance matrix comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self

import torch
from gguf import GGMLQuantizationType
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from qconv.artifacts.gguf_tensors import encoder
from qconv.boundary.patterns import Pattern, PatternError
from qconv.core.settings import (
    MATCHED,
    AwqSettings,
    CalibrationSettings,
    GptqSettings,
    OutputSettings,
    RefineSettings,
    Section,
)
from qconv.errors import RecipeError, UsageError
from qconv.formats.gguf.llama_cpp_mixtures import REPACKED
from qconv.formats.gguf.mixture import FILE_TYPES, Override
from qconv.formats.gguf.names import GgufTensor
from qconv.methods import rounding_of
from qconv.planning.recipe import Recipe, parse_as, require_rounding
from qconv.planning.rules import SKIP, Match, known_rope, without_empty_rules
from qconv.planning.steps import known_method, shown_steps, steps

FORMAT = "gguf"
_AS_STORED = {
    torch.bfloat16: GGMLQuantizationType.BF16,
    torch.float16: GGMLQuantizationType.F16,
    torch.float32: GGMLQuantizationType.F32,
}
"""What is left alone, by the source's dtype."""


class ImatrixSettings(Section):
    """Importance matrices that exist already, and how much an expert's own tokens count."""

    files: tuple[str, ...] = ()
    """Paths of llama.cpp's GGUF or legacy form; merged with each other and with what is collected."""
    shrinkage_tokens: Annotated[int, Field(ge=0)] = 64
    """k of ``(n H_expert + k H_layer) / (n + k)`` for an expert that saw n tokens."""
    exponent: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """A column counts its inputs' mean square to this power: 1 makes the least error of a layer's output if inputs were
    independent, and gives tokens of large inputs, which are few, more say than they have in the model's output."""

    @field_validator("files", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class GgufCalibrationSettings(CalibrationSettings):
    """As of other builds, but matched unless said otherwise."""

    propagate: bool | Literal["matched"] = "matched"


class TypeRule(Match):
    """A rule of a recipe for GGUF."""

    grid: str | None = None
    """A type of ggml's, or ``skip`` for that of the source; null: as the file type has it."""

    @field_validator("grid")
    @classmethod
    def _known_type(cls, value: str | None) -> str | None:
        if value in (None, SKIP):
            return value
        try:
            return _tensor_type(value or "").name
        except UsageError as error:
            raise ValueError(error.message.removesuffix(".")) from error


class GgufRecipe(Section):
    """Everything that decides what a GGUF build contains, apart from the source weights."""

    format: Literal["gguf"] = "gguf"
    type: str
    """As llama.cpp calls it: ``Q4_K_M``."""
    tensor_types: dict[str, str] = Field(default_factory=dict)
    """Types by regular expression, searched for in a tensor's GGUF name; the first that fits counts, before rules."""
    rules: tuple[TypeRule, ...] = ()
    """Types and methods by modules' names in the checkpoint; the first that fits counts."""
    method: Annotated[tuple[str, ...] | None, BeforeValidator(steps), PlainSerializer(shown_steps)] = None
    """As of other builds; ``rtn`` is rounding by the encoder alone; null: gptq where there is calibration text and no
    imatrix is given."""
    awq: AwqSettings = AwqSettings()
    gptq: GptqSettings = GptqSettings()
    refine: RefineSettings = RefineSettings(sweeps=1, refits=1)
    calibration: GgufCalibrationSettings | None = None
    """The text of the calibration, and with ``rtn`` of an importance matrix; null: a matrix is collected only where the
    type needs it."""
    imatrix: ImatrixSettings = ImatrixSettings()
    output: OutputSettings = OutputSettings()
    rope: Annotated[str, AfterValidator(known_rope)] | None = None
    """``yarn:FACTOR[:ORIGINAL]``: a context FACTOR times longer, in the file; null: the source's rope."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_scales_alone(cls, values: Any) -> Any:
        """Where no codes are chosen by second moments, nothing can be matched or refined unless it is asked for."""
        if not isinstance(values, dict) or steps(values.get("method")) != ("awq",):
            return values
        text = values.get("calibration")
        text = {} if text is None else text
        if isinstance(text, dict):
            text = {"propagate": True, **text}
        return {"refine": {}, **values, "calibration": text}

    @field_validator("type")
    @classmethod
    def _known_file_type(cls, value: str) -> str:
        if value not in FILE_TYPES and value not in REPACKED:
            raise ValueError(f"{value!r} is no GGUF file type; known are {', '.join(FILE_TYPES)}")
        return value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else known_method(value)

    @field_validator("rules", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_serializer(mode="wrap")
    def _without_empty_rules(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty_rules(serialize(self))

    @model_validator(mode="after")
    def _after_a_rounding_alone(self) -> Self:
        if self.is_calibrated:
            calibration = GgufCalibrationSettings() if self.calibration is None else self.calibration
            require_rounding("+".join(self.method_steps), self.methods, calibration, self.refine)
        return self

    @property
    def method_steps(self) -> tuple[str, ...]:
        """The method's steps, also where it is not said."""
        calibrated = self.calibration is not None and not self.imatrix.files
        return self.method or (("gptq",) if calibrated else ("rtn",))

    @property
    def methods(self) -> tuple[tuple[str, ...], ...]:
        """The method, and those of rules."""
        return self.method_steps, *(rule.method for rule in self.rules if rule.method is not None)

    @property
    def searches_scales(self) -> bool:
        """Whether scales are searched that are folded into the operations before."""
        return any("awq" in method for method in self.methods)

    @property
    def is_calibrated(self) -> bool:
        """Whether layers are calibrated: their inputs decide more than what an imatrix says."""
        return any(method != ("rtn",) for method in self.methods)

    def rule(self, tensor: GgufTensor) -> TypeRule | None:
        """The first rule that fits the modules of which a tensor is made.

        Raises:
            RecipeError: they are to be treated in different ways.
        """
        found = {module: next((rule for rule in self.rules if rule.fits(module)), None) for module in tensor.modules}
        said = {(None, None) if rule is None else (rule.grid, rule.method): name for name, rule in found.items()}
        if len(said) > 1:
            first, second, *_ = said.values()
            raise RecipeError(
                f"rules: {first} and {second} are to be treated differently, but GGUF has one tensor for them: "
                f"{tensor.name}.",
                hint="Give all experts of a layer one type and method.",
            )
        return next(iter(found.values()), None)

    def method_for(self, tensor: GgufTensor) -> tuple[str, ...]:
        """The steps by which a tensor is made."""
        rule = self.rule(tensor)
        return self.method_steps if rule is None or rule.method is None else rule.method

    @property
    def is_matched(self) -> bool:
        """Whether they are moved toward the unquantized model's outputs first."""
        return self.is_calibrated and self.calibrated().calibration.propagate == MATCHED

    def calibrated(self) -> Recipe:
        """How the layers of a calibrated build are calibrated."""
        calibration = GgufCalibrationSettings() if self.calibration is None else self.calibration
        # The settings count; the steps are each tensor's own.
        method = min(self.methods, key=lambda one: (rounding_of(one) is None, one == ("rtn",)))
        return Recipe(method=method, awq=self.awq, gptq=self.gptq, refine=self.refine, calibration=calibration)

    @field_validator("tensor_types")
    @classmethod
    def _known_types(cls, value: dict[str, str]) -> dict[str, str]:
        types = {}
        for pattern, name in value.items():
            try:
                Pattern.parse(pattern)
                types[pattern] = _tensor_type(name).name
            except PatternError as error:
                raise ValueError(f"{pattern!r} is no regular expression that is read: {error}") from error
            except UsageError as error:
                raise ValueError(f"{pattern}: {error.message.removesuffix('.')}") from error
        return types

    @property
    def overrides(self) -> tuple[tuple[Pattern, GGMLQuantizationType], ...]:
        """``tensor_types``, ready for use."""
        return tuple((Pattern.parse(pattern), _tensor_type(name)) for pattern, name in self.tensor_types.items())

    def override(self, dtype: torch.dtype) -> Override:
        """The types that ``tensor_types`` and ``rules`` give, for a source of that dtype."""
        patterns = self.overrides

        def found(tensor: GgufTensor) -> GGMLQuantizationType | None:
            for pattern, type in patterns:
                if pattern.search(tensor.name):
                    return type
            rule = self.rule(tensor)
            if rule is None or rule.grid is None:
                return None
            return _AS_STORED[dtype] if rule.grid == SKIP else GGMLQuantizationType[rule.grid]

        return found

    def digest(self) -> str:
        """sha256 of what decides about the build, hexadecimal; imatrix files count by content, not by name."""
        unused: dict[str, Any] = {} if self.searches_scales else {"awq": True}
        values = self.model_dump(exclude={"imatrix": {"files"}, **unused})
        # The order of the rules decides which of them counts.
        values["tensor_types"] = list(self.tensor_types.items())
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def parse_gguf_recipe(values: Mapping[str, Any], where: str = "recipe") -> GgufRecipe:
    """Validate a mapping.

    Raises:
        RecipeError: an unknown key or a bad value; names each by its dotted path.
    """
    return parse_as(GgufRecipe, values, where)


def _tensor_type(name: str) -> GGMLQuantizationType:
    """A type by name, in any case, as llama.cpp's program takes it.

    Raises:
        UsageError: no such type, or none that qconv encodes.
    """
    try:
        type = GGMLQuantizationType[name.upper()]
    except KeyError:
        raise UsageError(f"{name!r} is no type of a GGUF tensor.") from None
    encoder(type)
    return type


def require_matches(recipe: GgufRecipe, tensors: Collection[GgufTensor]) -> None:
    """Check that every rule, and every one of ``tensor_types``, fits a tensor that a type can be chosen for.

    Raises:
        RecipeError: one fits none.
    """
    names = [tensor.name for tensor in tensors if tensor.quantizable]
    for pattern, _ in recipe.overrides:
        if not any(map(pattern.search, names)):
            raise RecipeError(
                f"tensor_types.{pattern.text}: fits no weight of the model.",
                hint="It is searched for in names such as blk.0.ffn_down_exps.weight; norms and routers stay F32.",
            )
    modules = [module for tensor in tensors if tensor.quantizable for module in tensor.modules]
    for rule in recipe.rules:
        if not any(map(rule.fits, modules)):
            raise RecipeError(
                f"rules: {rule.match!r} matches no weight of the model that a type can be chosen for.",
                hint=f"Patterns match names from any dot on, such as {modules[-1]!r}; norms and routers stay F32.",
            )
