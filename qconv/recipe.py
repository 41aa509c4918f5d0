"""The recipe of a build: what is quantized, how, and with which calibration data. YAML in, errors that name the key."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from qconv.errors import RecipeError
from qconv.reading import read_yaml

GIGABYTE = 10**9


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values are not coerced, numbers are finite and have 64 bits."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("has more than 64 bits")
        return value


SectionT = TypeVar("SectionT", bound=Section)


class GridSettings(Section):
    """The quantization grid. ``symmetric: null`` takes the format's own default."""

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: int = 128
    symmetric: bool | None = None

    @field_validator("group_size")
    @classmethod
    def _positive_or_channel(cls, value: int) -> int:
        if value != -1 and value < 8:
            raise ValueError("must be -1 (one scale a row) or at least 8")
        return value


class ClipSettings(Section):
    """The search of the clipping range: ``steps`` ratios from 1 downward, the last one above ``1 - max_shrink``.

    ``enabled: null`` means on for methods that look at activations and off for plain rounding.
    """

    enabled: bool | None = None
    steps: Annotated[int, Field(ge=1, le=100)] = 10
    max_shrink: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5


class AwqSettings(Section):
    """The search of AWQ's scales (Lin et al. 2023, section 3.2): alpha on ``alpha_points`` points of [0, 1]."""

    alpha_points: Annotated[int, Field(ge=20, le=200)] = 20
    search_tokens: Annotated[int, Field(ge=16)] = 128
    """Tokens of one expert (or attention block) on which the loss is measured."""


class GptqSettings(Section):
    """How GPTQ works through the columns (Frantar et al. 2022).

    ``ordering``: ``none`` takes columns as they are, ``static`` the important ones first with groups of neighbours,
    ``desc_act`` the important ones first with groups of columns of like importance, which engines must gather.
    """

    block_size: Annotated[int, Field(ge=1)] = 128
    damp_percent: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Added to the Hessian's diagonal, as a share (0.01 is one percent) of its mean."""
    ordering: Literal["none", "static", "desc_act"] = "static"


class TextSettings(Section):
    """Which calibration text, and how much of it."""

    corpus: str = "python-stdlib"
    tokens: Annotated[int, Field(ge=1)] = 32768
    sequence_length: Annotated[int, Field(ge=16)] = 512
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _whole_sequences(self) -> Self:
        if self.tokens % self.sequence_length:
            raise ValueError(f"tokens {self.tokens} is not a multiple of sequence_length {self.sequence_length}")
        return self


class CalibrationSettings(TextSettings):
    """The text, and how the experts see it."""

    routing: Literal["routed", "all-experts"] = "routed"
    propagate: bool = True
    """Whether the next layer sees the quantized layer's outputs."""
    token_weights: Literal["uniform", "router"] = "uniform"
    """What a token counts in an expert's statistics: the same for all, or its router weight squared, which is what its
    output's squared error counts in the layer's output."""
    shrinkage_tokens: Annotated[int, Field(ge=0)] = 64
    """k of ``H = (n H_expert + k H_layer) / (n + k)`` for an expert that saw n tokens."""


class OutputSettings(Section):
    """The files of the build."""

    max_shard_size: Annotated[int, Field(ge=10**6)] = 5 * GIGABYTE
    """Bytes."""


METHODS = (("rtn",), ("awq",), ("gptq",), ("awq", "gptq"))
"""What ``method`` may be: one method, or AWQ's scales followed by GPTQ's rounding."""


def _steps(value: Any) -> Any:
    """A list of names, one name, or names joined by ``+``."""
    if isinstance(value, list):
        return tuple(value)
    return tuple(value.split("+")) if isinstance(value, str) else value


def _shown_steps(value: tuple[str, ...]) -> str | list[str]:
    """As a recipe writes it."""
    return value[0] if len(value) == 1 else list(value)


class Recipe(Section):
    """Everything that decides what a build contains, apart from the source weights."""

    format: str = "awq"
    method: Annotated[tuple[str, ...], BeforeValidator(_steps), PlainSerializer(_shown_steps)] = ("awq",)
    grid: GridSettings = GridSettings()
    clip: ClipSettings = ClipSettings()
    awq: AwqSettings = AwqSettings()
    gptq: GptqSettings = GptqSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    skip: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Shell patterns of full module names that stay unquantized, besides routers, norms, embeddings and lm_head."""
    output: OutputSettings = OutputSettings()

    @field_validator("skip", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("method")
    @classmethod
    def _known_combination(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value not in METHODS:
            known = ", ".join("+".join(method) for method in METHODS)
            raise ValueError(f"{'+'.join(value)} is no method; known are {known}")
        return value

    @property
    def method_name(self) -> str:
        """The method as one word: ``awq``, ``awq+gptq`` ..."""
        return "+".join(self.method)

    @property
    def looks_at_activations(self) -> bool:
        """Whether the method does."""
        return self.method != ("rtn",)

    @property
    def searches_clipping(self) -> bool:
        """Whether clipping ranges are searched: by default for every method but plain rounding."""
        return self.looks_at_activations if self.clip.enabled is None else self.clip.enabled

    def skips(self, module: str) -> bool:
        """Whether a pattern of ``skip`` matches the module's full name."""
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in self.skip)

    def digest(self) -> str:
        """sha256 of the recipe's canonical JSON, hexadecimal."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def recipes_folder() -> Path:
    """The folder of the packaged recipes: inside the wheel, or the checkout's top level in an editable install."""
    package = Path(__file__).parent
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def packaged_recipes() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def load_recipe(source: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by packaged name or file path, with single keys replaced.

    Args:
        source: Name of a packaged recipe (``awq``) or path of a YAML file.
        overrides: Values by dotted key, e.g. ``{"calibration.tokens": 4096}``.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key, a value out of range; the message names file and key.
    """
    values, where = read_values(source)
    return parse_recipe(replaced(values, overrides or {}), where)


def read_values(source: str) -> tuple[dict[str, Any], str]:
    """A recipe's values as they are written, and the file's name.

    Args:
        source: Name of a packaged recipe or path of a YAML file.

    Raises:
        RecipeError: no such recipe, or it is no mapping in YAML.
    """
    path = recipes_folder() / f"{source}.yaml" if source in packaged_recipes() else Path(source)
    packaged = f"Give a YAML file or one of: {', '.join(packaged_recipes())}."
    values = read_yaml(path, RecipeError, hint=packaged)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path.name}: a recipe is a mapping of keys, not a {type(values).__name__}.")
    return values, path.name


def replaced(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with some replaced, given by dotted key; a section that is null or absent is begun.

    Raises:
        RecipeError: a dotted key leads through what is no section.
    """
    found = copy.deepcopy(dict(values))
    for key, value in overrides.items():
        *sections, last = key.split(".")
        section = found
        for name in sections:
            section[name] = {} if section.get(name) is None else section[name]
            section = section[name]
            if not isinstance(section, dict):
                raise RecipeError(f"{name}: not a section.")
        section[last] = value
    return found


def parse_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping.

    Raises:
        RecipeError: an unknown key or a bad value; names each by its dotted path.
    """
    return parse_as(Recipe, values, where)


def parse_as(kind: type[SectionT], values: Mapping[str, Any], where: str) -> SectionT:
    """Validate a mapping as any kind of recipe.

    Raises:
        RecipeError: as :func:`parse_recipe`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'recipe'}: {_explain(problem['type'], problem['msg'])}"
            for problem in error.errors()
        ]
        raise RecipeError(f"{where}: {'; '.join(problems)}.", hint="See README.md, Recipes.") from error


def _explain(kind: str, message: str) -> str:
    return "unknown key" if kind == "extra_forbidden" else message.removeprefix("Value error, ")
