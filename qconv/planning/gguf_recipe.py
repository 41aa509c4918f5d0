"""The recipe of a GGUF build: its file type, exceptions by tensor, and where its importance matrix comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from gguf import GGMLQuantizationType
from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from qconv.artifacts.gguf_tensors import encoder
from qconv.boundary.patterns import Pattern, PatternError
from qconv.core.settings import MATCHED, CalibrationSettings, GptqSettings, OutputSettings, RefineSettings, Section
from qconv.errors import RecipeError, UsageError
from qconv.formats.gguf.mixture import MIXTURES
from qconv.formats.gguf.names import GgufTensor
from qconv.methods import rounding_of, roundings
from qconv.planning.recipe import Recipe, parse_as
from qconv.planning.steps import shown_steps, steps

FORMAT = "gguf"


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


class GgufRecipe(Section):
    """Everything that decides what a GGUF build contains, apart from the source weights."""

    format: Literal["gguf"] = "gguf"
    type: str
    """As llama.cpp calls it: ``Q4_K_M``."""
    tensor_types: dict[str, str] = Field(default_factory=dict)
    """Types by regular expression, searched for in a tensor's GGUF name; the first that fits counts."""
    method: Annotated[tuple[str, ...] | None, BeforeValidator(steps), PlainSerializer(shown_steps)] = None
    """``gptq``, or ``rtn`` for rounding by the encoder alone; null: gptq where there is calibration text and no imatrix
    is given."""
    gptq: GptqSettings = GptqSettings()
    refine: RefineSettings = RefineSettings(sweeps=1, refits=1)
    calibration: GgufCalibrationSettings | None = None
    """The text of the calibration, and with ``rtn`` of an importance matrix; null: a matrix is collected only where the
    type needs it."""
    imatrix: ImatrixSettings = ImatrixSettings()
    output: OutputSettings = OutputSettings()

    @field_validator("type")
    @classmethod
    def _known_file_type(cls, value: str) -> str:
        if value not in MIXTURES:
            raise ValueError(f"{value!r} is no GGUF file type; known are {', '.join(MIXTURES)}")
        return value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = ("rtn", *roundings())
        if value is not None and (len(value) != 1 or value[0] not in known):
            raise ValueError(f"{'+'.join(value)} is no method of a GGUF build; known are {', '.join(known)}")
        return value

    @property
    def rounding(self) -> str | None:
        """What chooses the codes of layers; None for the encoder alone."""
        return (rounding_of(self.method) or "gptq") if self.is_calibrated else None

    @property
    def is_calibrated(self) -> bool:
        """Whether layers are rounded by second moments of their inputs."""
        if self.method is None:
            return self.calibration is not None and not self.imatrix.files
        return rounding_of(self.method) is not None

    @property
    def is_matched(self) -> bool:
        """Whether they are moved toward the unquantized model's outputs first."""
        return self.is_calibrated and self.calibrated().calibration.propagate == MATCHED

    def calibrated(self) -> Recipe:
        """How the layers of a calibrated build are calibrated."""
        calibration = GgufCalibrationSettings() if self.calibration is None else self.calibration
        return Recipe(method=self.method or ("gptq",), gptq=self.gptq, refine=self.refine, calibration=calibration)

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

    def digest(self) -> str:
        """sha256 of what decides about the build, hexadecimal; imatrix files count by content, not by name."""
        values = self.model_dump(exclude={"imatrix": {"files"}})
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


def require_matches(recipe: GgufRecipe, tensors: Iterable[GgufTensor]) -> None:
    """Check that every rule of ``tensor_types`` fits a tensor that a type can be chosen for.

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
