"""A nightly configuration: which builds are measured on which suites, where, and for how long. YAML in, checked whole.

Everything that the file names and that can be known beforehand (suites with their tasks and gates, recipes, the engine)
is read before the night touches anything. Paths are relative to the file.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from qconv.boundary.reading import read_yaml
from qconv.checkpoint.hub import is_hub_id
from qconv.errors import UsageError
from qconv.evaluation.engines import ENGINES, is_endpoint, is_engine
from qconv.evaluation.gates import load_gates
from qconv.evaluation.report.page import NAMES
from qconv.evaluation.suites import (
    FolderName,
    Line,
    Section,
    Suite,
    gates_of,
    load_suite,
    packaged_names,
    parse_settings,
    settings_path,
    shared_names,
)
from qconv.evaluation.tasks import settings_of
from qconv.planning.gguf_recipe import FORMAT as GGUF
from qconv.planning.gguf_recipe import GgufRecipe, parse_gguf_recipe
from qconv.planning.recipe import Recipe, packaged_recipes, parse_recipe, read_values

_FOLDER_BYTES = 100
"""Of a suite's name within its runs' folder names; a longer one is known by its hash alone."""


class BuildSettings(Section):
    """One build that is followed from night to night, as it is written."""

    name: FolderName
    reference: Line
    """The unquantized model: a folder or a Hub id."""
    recipe: Line | dict[str, Any] | None = None
    """Quantize the reference by it: a packaged recipe's name, a file, ``gguf:TYPE``, or a recipe's keys themselves."""
    build: Line | None = None
    """Take this build instead: a folder, a GGUF file or a Hub id."""
    canary: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _made_in_one_way(self) -> Self:
        if (self.recipe is None) == (self.build is None):
            raise ValueError("give either a recipe or a build")
        return self


class NightlySettings(Section):
    """A nightly configuration, as it is written."""

    work: Line
    """Where the nights lie, each in a folder of its own."""
    history: Line
    suites: Annotated[tuple[Line, ...], Field(min_length=1)]
    """From cheap to dear."""
    budget_minutes: Annotated[float, Field(strict=True, gt=0.0, le=1e6, allow_inf_nan=False)] | None = None
    keep_nights: Annotated[int, Field(strict=True, ge=1, le=10**6)] = 7
    """Older nights' folders are removed; the history keeps their runs."""
    engine: Line = "local"
    builds: Annotated[tuple[BuildSettings, ...], Field(min_length=1)]

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if not is_engine(value):
            raise ValueError(f"there is no engine {value!r}; choose one of {', '.join(ENGINES)}")
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        # A night's folder holds the builds' folders beside the night's report.
        taken = shared_names([*NAMES.values(), *(build.name for build in self.builds)])
        if taken:
            raise ValueError(f"every build needs a name of its own; {taken[0]!r} is taken")
        return self


@dataclass(frozen=True, slots=True)
class NightSuite:
    """A suite of a night.

    Attributes:
        name: As the configuration writes it.
        source: A packaged suite's name, or the path of its file.
        suite: What it says.
        gates: A packaged name, or the path of the file of gates.
        folder: What its run's folder is called within a build's.
    """

    name: str
    source: str
    suite: Suite
    gates: str
    folder: str


@dataclass(frozen=True, slots=True)
class NightBuild:
    """A build of a night, with everything that the configuration says of it read and placed.

    Attributes:
        name: What it is followed under.
        reference: The unquantized model: a folder or a Hub id.
        recipe: How the reference is quantized; None for a build that there is.
        build: That build: a folder, a GGUF file, a Hub id, or what an endpoint serves; None for one that is made.
        canary: Whether it never changes.
    """

    name: str
    reference: str
    recipe: Recipe | GgufRecipe | None
    build: str | None
    canary: bool


@dataclass(frozen=True, slots=True)
class NightPlan:
    """What a night is to do.

    Attributes:
        work: Where the nights lie.
        history: The history's folder.
        suites: From cheap to dear.
        budget_minutes: After so many no measurement is begun; None for no end.
        keep_nights: So many nights' folders are kept.
        engine: What computes the builds.
        builds: What is measured.
    """

    work: Path
    history: Path
    suites: tuple[NightSuite, ...]
    budget_minutes: float | None
    keep_nights: int
    engine: str
    builds: tuple[NightBuild, ...]


def load_nightly(path: Path) -> NightPlan:
    """A configuration from a YAML file, with everything that it names read.

    Raises:
        UsageError: it cannot be read, a key is wrong, or a suite, gates or a recipe are; names file and key.
    """
    values = read_yaml(path, UsageError, hint="Give a nightly configuration, as evals/nightly.yaml.")
    settings = parse_settings(NightlySettings, values, str(path))
    base = path.resolve().parent
    return NightPlan(
        work=(base / settings.work).resolve(),
        history=(base / settings.history).resolve(),
        suites=_suites(settings.suites, base, path),
        budget_minutes=settings.budget_minutes,
        keep_nights=settings.keep_nights,
        engine=settings.engine,
        builds=tuple(_build(one, settings.engine, base, path) for one in settings.builds),
    )


def _suites(names: tuple[str, ...], base: Path, config: Path) -> tuple[NightSuite, ...]:
    """The suites; two files of one name are two, one file twice is a mistake."""
    files = [settings_path("suites", name, base) for name in names]
    stems = [file.stem for file in files]
    taken = {stem.casefold() for stem in shared_names(stems)}
    found = []
    for name, file in zip(names, files, strict=True):
        suite = load_suite(name, base)
        settings_of(suite, f"suite {file.name}")
        gates = gates_of(suite, name, base)
        load_gates(gates)
        source = name if name in packaged_names("suites") else str(file)
        found.append(
            NightSuite(name, source, suite, gates, _run_folder(name, file.stem, file.stem.casefold() in taken))
        )
    if len({os.path.realpath(file) for file in files}) < len(files) or shared_names(one.folder for one in found):
        raise UsageError(f"{config}: suites: one of them stands there twice.", hint="Name every suite once.")
    return tuple(found)


def _run_folder(name: str, stem: str, shared: bool) -> str:
    """``run-STEM``; with a part of a hash where another suite's file is called the same."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    if not stem.isprintable() or len(stem.encode()) > _FOLDER_BYTES:
        return f"run-{digest}"
    return f"run-{stem}-{digest}" if shared else f"run-{stem}"


def _build(settings: BuildSettings, engine: str, base: Path, config: Path) -> NightBuild:
    served = settings.build if is_endpoint(engine) else None
    build = None if settings.build is None else _placed(settings.build, base, served=served is not None)
    recipe = None if settings.recipe is None else _recipe(settings.recipe, f"{config}, {settings.name}", base)
    return NightBuild(settings.name, _placed(settings.reference, base), recipe, build, settings.canary)


def _placed(source: str, base: Path, *, served: bool = False) -> str:
    """A model's path from here; Hub ids, and what an endpoint serves under its own name, stay as they are."""
    path = str(base / source)
    elsewhere = served or (is_hub_id(source) and not os.path.exists(source))
    return source if elsewhere and not os.path.exists(path) else path


def _recipe(source: str | dict[str, Any], where: str, base: Path) -> Recipe | GgufRecipe:
    values: dict[str, Any]
    if isinstance(source, dict):
        values = source
    elif source.startswith(f"{GGUF}:"):
        values = {"format": GGUF, "type": source.removeprefix(f"{GGUF}:")}
    else:
        values, where = read_values(source if source in packaged_recipes() else str(base / source))
    return parse_gguf_recipe(values, where) if values.get("format") == GGUF else parse_recipe(values, where)
