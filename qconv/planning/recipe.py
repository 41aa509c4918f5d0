"""The recipe of a build: what is quantized, how, and with which calibration data. YAML in, errors that name the key."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from qconv.boundary.reading import read_yaml
from qconv.core.settings import (
    MATCHED,
    AwqSettings,
    CalibrationSettings,
    ClipSettings,
    GptqSettings,
    GridSettings,
    OutputSettings,
    RefineSettings,
    Section,
)
from qconv.errors import RecipeError
from qconv.methods import rounding_of
from qconv.planning.rules import SKIP, Rule, known_rope, without_empty_rules
from qconv.planning.steps import known_method, shown_steps, steps

SectionT = TypeVar("SectionT", bound=Section)


def require_rounding(
    name: str, methods: Iterable[Sequence[str]], calibration: CalibrationSettings, refine: RefineSettings
) -> None:
    """Check that what is for roundings alone goes with one.

    Args:
        name: Of the method, for the message.
        methods: The recipe's, and those of its rules.
        calibration, refine: What is asked for.

    Raises:
        ValueError: none of the methods has a rounding; names the key.
    """
    if any(rounding_of(method) is not None for method in methods):
        return
    if calibration.propagate == MATCHED:
        raise ValueError(f"calibration.propagate: matched is for gptq, not for {name}")
    if refine.sweeps or refine.refits:
        raise ValueError(f"refine: follows gptq, not {name}")


class Recipe(Section):
    """Everything that decides what a build contains, apart from the source weights."""

    format: str = "awq"
    """The layout of the files; ``gguf`` has keys of its own."""
    method: Annotated[tuple[str, ...], BeforeValidator(steps), PlainSerializer(shown_steps)] = ("awq",)
    """``rtn``, ``awq``, ``gptq``, another rounding by its name, or a list: scales first, then a rounding."""
    grid: GridSettings = GridSettings()
    rules: tuple[Rule, ...] = ()
    """For single linears; the first that fits counts, but ``skip`` before all."""
    clip: ClipSettings = ClipSettings()
    awq: AwqSettings = AwqSettings()
    gptq: GptqSettings = GptqSettings()
    refine: RefineSettings = RefineSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    kv_cache: Literal["fp8"] | None = None
    """Scales of a cache of keys and values, from their largest magnitudes on the calibration text; null for none."""
    skip: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Shell patterns of full module names that stay unquantized, besides routers, norms, embeddings and lm_head."""
    output: OutputSettings = OutputSettings()
    rope: Annotated[str, AfterValidator(known_rope)] | None = None
    """``yarn:FACTOR[:ORIGINAL]``: a context FACTOR times longer, in config.json; null: the source's rope."""

    @field_validator("skip", "rules", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("method")
    @classmethod
    def _known_combination(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return known_method(value)

    @model_serializer(mode="wrap")
    def _without_empty_rules(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = without_empty_rules(serialize(self))
        return {key: value for key, value in values.items() if key != "kv_cache" or value is not None}

    @model_validator(mode="after")
    def _after_a_rounding_alone(self) -> Self:
        require_rounding(self.method_name, self.methods, self.calibration, self.refine)
        return self

    @property
    def method_name(self) -> str:
        """The method as one word: ``awq``, ``awq+gptq`` ..."""
        return "+".join(self.method)

    @property
    def rounding(self) -> str | None:
        """What chooses codes by second moments: ``gptq`` or another; None where weights are rounded by themselves."""
        return rounding_of(self.method)

    @property
    def methods(self) -> tuple[tuple[str, ...], ...]:
        """The method, and those of rules."""
        return self.method, *(rule.method for rule in self.rules if rule.method is not None)

    @property
    def looks_at_activations(self) -> bool:
        """Whether a method does."""
        return any(method != ("rtn",) for method in self.methods)

    @property
    def searches_clipping(self) -> bool:
        """Whether clipping ranges are searched of any linear."""
        return any(map(self.clips, self.methods))

    def clips(self, method: tuple[str, ...]) -> bool:
        """Whether a method searches clipping ranges: by default every one but plain rounding."""
        return method != ("rtn",) if self.clip.enabled is None else self.clip.enabled

    def rule(self, module: str) -> Rule | None:
        """The first rule that fits a module's full name."""
        return next((rule for rule in self.rules if rule.fits(module)), None)

    def skips(self, module: str) -> bool:
        """Whether a pattern of ``skip`` matches the module's full name, or its rule says so."""
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in self.skip):
            return True
        rule = self.rule(module)
        return rule is not None and rule.grid == SKIP

    def digest(self) -> str:
        """sha256 of the recipe's canonical JSON, hexadecimal."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def recipes_folder() -> Path:
    """The folder of the packaged recipes: inside the wheel, or the checkout's top level in an editable install."""
    package = Path(__file__).parents[1]
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def packaged_recipes() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def load_recipe(source: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by packaged name or file path, with single keys replaced.

    Another method than the recipe's leaves behind what is for GPTQ alone, unless that is given too.

    Args:
        source: Name of a packaged recipe (``awq``) or path of a YAML file.
        overrides: Values by dotted key, e.g. ``{"calibration.tokens": 4096}``.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key, a value out of range; the message names file and key.
    """
    values, where = read_values(source)
    given = dict(overrides or {})
    if "method" in given and rounding_of(steps(given["method"])) is None:
        calibration = values.get("calibration")
        matched = isinstance(calibration, dict) and calibration.get("propagate") == MATCHED
        given = {"refine": {}, **({"calibration.propagate": True} if matched else {}), **given}
    return parse_recipe(replaced(values, given), where)


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
        raise RecipeError(f"{where}: {'; '.join(problems)}.", hint="See docs/reference/recipes.md.") from error


def _explain(kind: str, message: str) -> str:
    return "unknown key" if kind == "extra_forbidden" else message.removeprefix("Value error, ")
