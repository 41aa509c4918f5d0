"""``--fmt`` and ``--recipe`` given more than once: which builds are meant, and what an option says of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconv.cli.options import OF_GGUF, OF_SAFETENSORS, RecipeOptions
from qconv.errors import UsageError
from qconv.planning.recipe import Recipe
from qconv.planning.rules import SKIP

if TYPE_CHECKING:
    from qconv.planning.gguf_recipe import GgufRecipe

Builds = dict[str, "Recipe | GgufRecipe"]

_OF_CALIBRATION = ("routing", "no_propagate", "propagate")


def is_several(fmt: Sequence[str], recipe: Sequence[str]) -> bool:
    """Whether more than one build is asked for."""
    return len(fmt) + len(recipe) > 1


def single(fmt: Sequence[str], recipe: Sequence[str], options: Mapping[str, Any]) -> RecipeOptions:
    """The options of one build."""
    return RecipeOptions(fmt=next(iter(fmt), None), recipe=next(iter(recipe), None), **options)


def several(fmt: Sequence[str], recipe: Sequence[str], options: Mapping[str, Any]) -> Builds:
    """The recipes of several builds by the name of each one's folder; an option counts for those that know it.

    Raises:
        UsageError: two of the same name, an option that none of them knows, or layers that are to see quantized ones.
        RecipeError: a recipe does not parse, or a value does not fit.
    """
    given = single((), (), options)
    if given.propagate not in (None, "false"):
        raise UsageError(
            f"--propagate {given.propagate}: several builds of one calibration see the outputs of unquantized layers.",
            hint="Leave it out, or make one build after the other.",
        )
    found: Builds = {}
    unknown: list[set[str]] = []
    followed: set[str] = set()
    for one in (*(replace(given, fmt=name) for name in fmt), *(replace(given, recipe=file) for file in recipe)):
        name = _name(one)
        if name in found:
            raise UsageError(
                f"--fmt, --recipe: {name} is asked for twice.",
                hint="Each build has a folder of its name; give recipe files others.",
            )
        found[name], left_out, rules = _recipe(one)
        unknown.append(left_out)
        followed.update(rules)
    useless = sorted(set.intersection(*unknown))
    if useless:
        option = useless[0].replace("_", "-")
        raise UsageError(f"--{option}: has no meaning for any of {', '.join(found)}.")
    for rule in given.rule:
        if rule not in followed:
            raise UsageError(f"--rule: {rule!r} has no meaning for any of {', '.join(found)}.")
    return found


def _name(options: RecipeOptions) -> str:
    """Of a build's folder: ``awq``, ``gguf-Q4_K_M``, a recipe file's stem."""
    name = Path(options.recipe).stem if options.recipe is not None else str(options.fmt).replace(":", "-")
    if not name or name.startswith("."):
        raise UsageError(f"--recipe {options.recipe}: its name is none for a folder.", hint="Rename the file.")
    return name


def _recipe(options: RecipeOptions) -> tuple[Recipe | GgufRecipe, set[str], Sequence[str]]:
    """A build's recipe, the options that were given and say nothing of it, and the rules that do."""
    bare = RecipeOptions.named(options.fmt, options.recipe)
    plain = bare.gguf()
    options = replace(options, rule=[rule for rule in options.rule if _is_for(rule, gguf=plain is not None)])
    if plain is None:
        kept, left_out = _without(options, OF_GGUF)
        if kept.refine is not None and replace(kept, refine=None).load().rounding is None:
            kept, more = _without(kept, ("refine",))
            left_out |= more
        return kept.load(), left_out, kept.rule
    kept, left_out = _without(options, OF_SAFETENSORS)
    if not kept.calibrates(plain.calibration is not None):
        kept, more = _without(kept, (*_OF_CALIBRATION, "refine"))
        left_out |= more
    made = kept.gguf()
    assert made is not None
    return made, left_out, kept.rule


def _is_for(rule: str, *, gguf: bool) -> bool:
    """Whether a rule's scheme is a type, which GGUF has, or a grid, which it has not."""
    from gguf import GGMLQuantizationType

    scheme = rule.rpartition("=")[2]
    return scheme == SKIP or (scheme.upper() in GGMLQuantizationType.__members__) == gguf


def _without(options: RecipeOptions, names: Sequence[str]) -> tuple[RecipeOptions, set[str]]:
    """The options without some, and which of those had been given."""
    bare = RecipeOptions.named(None, None)
    absent = {name: getattr(bare, name) for name in names}
    return replace(options, **absent), {name for name in names if getattr(options, name)}
