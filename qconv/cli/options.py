"""Options that several commands share: the recipe, put together from a packaged one and single keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from qconv.errors import UsageError
from qconv.recipe import GIGABYTE, METHODS, Recipe, load_recipe, packaged_recipes

Function = TypeVar("Function", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
model_argument = click.argument("model")

_RECIPE_OPTIONS = (
    click.option(
        "--fmt",
        metavar="NAME",
        help=f"A packaged recipe: {', '.join(packaged_recipes())}; or gguf:TYPE for llama.cpp, such as gguf:Q4_K_M.",
    ),
    click.option("--recipe", metavar="FILE", help="A recipe: a YAML file or a packaged recipe's name."),
    click.option("--method", type=click.Choice(["+".join(one) for one in METHODS]), help="Quantization method."),
    click.option("--calib", metavar="CORPUS", help="python-stdlib, text:PATH, jsonl:PATH[:FIELD] or hf:DATASET."),
    click.option("--tokens", type=click.IntRange(min=1), help="Calibration tokens."),
    click.option("--sequence-length", type=click.IntRange(min=1), help="Tokens of one calibration sequence."),
    click.option("--seed", type=click.IntRange(min=0), help="Seed of the calibration's samples."),
    click.option("--group-size", type=int, help="Weights that share a scale; -1 for a whole row."),
    click.option(
        "--routing",
        type=click.Choice(["routed", "all-experts"]),
        help="Which calibration tokens an expert sees: those that the router sends it, or all.",
    ),
    click.option("--no-propagate", is_flag=True, help="Calibrate each layer on the outputs of unquantized ones."),
    click.option(
        "--max-shard-size",
        type=click.FloatRange(min=0.001),
        metavar="GB",
        help="Gigabytes (10^9 bytes) that one file of the build may hold.",
    ),
    click.option(
        "--skip", metavar="PATTERN", multiple=True, help="Leave modules of that name unquantized too; repeatable."
    ),
)


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """The recipe options as given; what was not given is None."""

    fmt: str | None
    recipe: str | None
    method: str | None
    calib: str | None
    tokens: int | None
    sequence_length: int | None
    seed: int | None
    group_size: int | None
    routing: str | None
    no_propagate: bool
    max_shard_size: float | None
    skip: Sequence[str]

    def load(self) -> Recipe:
        """The recipe, with the given options in place of its own values; ``--skip`` adds to its list.

        Raises:
            UsageError: no recipe, two of them, or a packaged one that does not exist.
            RecipeError: the recipe does not parse, or a value does not fit.
        """
        source = self._source()
        overrides = {
            "method": self.method,
            "calibration.corpus": self.calib,
            "calibration.tokens": self.tokens,
            "calibration.sequence_length": self.sequence_length,
            "calibration.seed": self.seed,
            "calibration.routing": self.routing,
            "calibration.propagate": False if self.no_propagate else None,
            "grid.group_size": self.group_size,
            "output.max_shard_size": None if self.max_shard_size is None else int(self.max_shard_size * GIGABYTE),
        }
        given: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
        if self.skip:
            given["skip"] = [*load_recipe(source).skip, *self.skip]
        return load_recipe(source, given)

    def _source(self) -> str:
        names = ", ".join(packaged_recipes())
        if self.fmt is not None and self.recipe is not None:
            raise UsageError("--fmt and --recipe both name a recipe.", hint="Give one of them.")
        if self.recipe is not None:
            return self.recipe
        if self.fmt is None:
            raise UsageError("what to build is not said.", hint=f"Give --fmt with one of {names}, or --recipe FILE.")
        if self.fmt not in packaged_recipes():
            raise UsageError(f"--fmt: there is no packaged recipe {self.fmt!r}.", hint=f"Choose one of {names}.")
        return self.fmt


def out_option(text: str) -> Callable[[Function], Function]:
    """The option of the folder that a command writes."""
    kind = click.Path(file_okay=False, path_type=Path)
    return click.option("-o", "--out", required=True, type=kind, help=text)


def recipe_options(function: Function) -> Function:
    """Add the recipe options to a command."""
    for option in reversed(_RECIPE_OPTIONS):
        function = option(function)
    return function
