"""``--target-size`` and ``--target-bits``: the best build of a size, for ``qconv plan`` and ``qconv quantize``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import yaml

from qconv.cli.console import bits, print_json, print_table, say, size, stdout
from qconv.cli.numbers import FiniteRange
from qconv.cli.options import GGUF
from qconv.cli.several import is_several, single
from qconv.errors import UsageError

if TYPE_CHECKING:
    from qconv.planning.gguf_recipe import GgufRecipe
    from qconv.planning.recipe import Recipe
    from qconv.sensitivity.allocating import Allocation, Request

Function = TypeVar("Function", bound=Callable[..., Any])

_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_ANY_TYPE = "Q4_K_M"
"""What ``gguf`` alone stands for until types are found."""
_OPTIONS = (
    click.option("--target-size", metavar="SIZE", help="GGUF, w4a16: the best build of at most 240GB, 4.5GiB ..."),
    click.option(
        "--target-bits",
        type=FiniteRange(min=0.5, max=32.0),
        metavar="N",
        help="The best of N bits per weight: GGUF's over all tensors, w4a16's over quantized linears.",
    ),
    click.option(
        "--sensitivity",
        type=click.Path(exists=True, path_type=Path),
        metavar="PATH",
        help="What qconv sensitivity made, for --target-size and --target-bits.",
    ),
    click.option(
        "--no-gradients",
        is_flag=True,
        help="Choose by the errors of outputs alone: one pass over the model, no way back.",
    ),
    click.option("--exclude-type", metavar="PATTERN", multiple=True, help="Types not to choose: 'IQ*'; repeatable."),
    click.option(
        "--save",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Save what is chosen as a recipe.",
    ),
)


def target_options(function: Function) -> Function:
    """Add the options of builds of a size to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """The options of :func:`target_options` as given."""

    target_size: str | None
    target_bits: float | None
    sensitivity: Path | None
    no_gradients: bool
    exclude_type: Sequence[str]
    save: Path | None

    @classmethod
    def taken(cls, options: dict[str, Any]) -> TargetOptions | None:
        """Taken out of a command's options; None where no size is asked for.

        Raises:
            UsageError: there are some that only go with a size, or two sizes, or one that is none.
        """
        found = cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        if found.target_size is None and found.target_bits is None:
            for field in fields(cls):
                if getattr(found, field.name):
                    raise UsageError(f"--{field.name.replace('_', '-')}: goes with --target-size or --target-bits.")
            return None
        if found.target_size is not None and found.target_bits is not None:
            raise UsageError("--target-size and --target-bits: give one of them.")
        if found.sensitivity is not None and found.no_gradients:
            raise UsageError("--no-gradients: is for the pass that --sensitivity makes unnecessary.")
        if found.target_size is not None:
            parse_size(found.target_size)
        return found

    def request(self) -> Request:
        """What grids are to be chosen for."""
        from qconv.sensitivity.allocating import Request, Target

        size_bytes = None if self.target_size is None else parse_size(self.target_size)
        return Request(Target(size_bytes, self.target_bits), tuple(self.exclude_type), not self.no_gradients)

    @staticmethod
    def recipe(fmt: Sequence[str], recipe: Sequence[str], options: Mapping[str, Any]) -> Recipe | GgufRecipe:
        """What the build is to be besides, with calibration text.

        Raises:
            UsageError: several builds, or a recipe that cannot be.
        """
        from qconv.sensitivity.palettes import calibrated

        if is_several(fmt, recipe):
            raise UsageError(
                "--target-size, --target-bits: are for one build.",
                hint="Make one after the other; each --save keeps what was chosen as a recipe, and those go together.",
            )
        given = single([f"{GGUF}:{_ANY_TYPE}" if one == GGUF else one for one in fmt], recipe, options)
        return calibrated(given.gguf() or given.load())


def parse_size(text: str, option: str = "--target-size") -> int:
    """Bytes of a size such as ``240GB``, which an option gives.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([kKMGT]?i?B)\s*", text)
    if found is None or found[2] not in _UNITS:
        raise UsageError(f"{option}: {text!r} is no size.", hint=f"Write a number and one of {', '.join(_UNITS)}.")
    return int(float(found[1]) * _UNITS[found[2]])


def plan_target(model: str, recipe: Recipe | GgufRecipe, options: TargetOptions, as_json: bool) -> None:
    """Choose grids, show them, and save the recipe; without a sensitivity show what that would cost.

    Raises:
        UsageError: the options do not go together, or the size is too small.
        OutputError: the recipe cannot be saved.
    """
    if options.sensitivity is None:
        _plan_sensitivity(model, recipe, options, as_json)
        return
    from qconv.artifacts.source import Source
    from qconv.checkpoint.hub import resolve_model
    from qconv.executors.threads import Threads
    from qconv.sensitivity.allocating import allocate, read_sensitivity
    from qconv.sensitivity.palette import Palette
    from qconv.sensitivity.palettes import AnyRecipe, palette_of

    folder, request = resolve_model(model), options.request()
    if options.save is not None:
        require_savable(options.save, folder)
    statistics = read_sensitivity(options.sensitivity)
    with Threads() as workers:
        source = Source.open(folder)
        palette: Palette[AnyRecipe] = palette_of(source, recipe, request.excluded)
        found = allocate(source, statistics, palette, request.target, workers)
    if options.save is not None:
        save_recipe(options.save, found.recipe.model_dump(mode="json", exclude_unset=True), found.values())
    if as_json:
        print_json(_values(found))
    else:
        _print(found, options.save)


def require_savable(path: Path, *folders: Path) -> None:
    """Check, before any work, that a recipe can be saved there.

    Args:
        path: Of the file.
        folders: The model's and the build's, whose files are checkpoint and build and nothing else.

    Raises:
        UsageError: it would lie in one of them, or where nothing can be written.
    """
    parent = path.resolve().parent
    for folder in folders:
        if parent.is_relative_to(folder.resolve()):
            raise UsageError(f"--save {path}: lies in {folder}.", hint="Save the recipe beside it.")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--save {path}: nothing can be written in {parent}.", hint="Choose a folder that exists.")


def save_recipe(path: Path, recipe: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Write a recipe as YAML.

    Args:
        path: Of the file.
        recipe: Its values.
        chosen: What a report says of the choice.

    Raises:
        OutputError: it cannot be written.
    """
    from qconv.building.chosen import predicted_words
    from qconv.checkpoint.writer import write_atomically

    said = f"# {chosen['bits_per_weight']:.3f} bits per weight, {predicted_words(chosen)}\n"
    write_atomically(path, (said + yaml.safe_dump(dict(recipe), sort_keys=False)).encode())


def print_choice(report: Mapping[str, Any]) -> None:
    """A line about how a build's grids were chosen, if they were."""
    from qconv.building.chosen import ALLOCATION, predicted_words

    if ALLOCATION in report:
        say(stdout(), f"chosen       {predicted_words(report[ALLOCATION])}; by {report[ALLOCATION]['sensitivity']}")


def _plan_sensitivity(model: str, recipe: Recipe | GgufRecipe, options: TargetOptions, as_json: bool) -> None:
    """What the pass over the model will take, from config.json alone."""
    from qconv.checkpoint.hub import resolve_model
    from qconv.checkpoint.reader import read_json
    from qconv.models import architecture
    from qconv.planning.passes import calibration_products, sensitivity_products
    from qconv.sensitivity.palettes import text_of
    from qconv.sensitivity.sweep import scratch_bytes

    if options.save is not None:
        raise UsageError("--save: nothing is chosen without --sensitivity.", hint=_remedy(model, options))
    described = architecture(read_json(resolve_model(model, weights=False) / "config.json"))
    tokens, gradients = text_of(recipe).tokens, not options.no_gradients
    assert recipe.calibration is not None
    pass_products = sensitivity_products(described, tokens, gradients)
    share = pass_products / calibration_products(described, recipe.calibration, recipe.refine)
    scratch, remedy = scratch_bytes(described, tokens, gradients), _remedy(model, options)
    if as_json:
        values = {"tokens": tokens, "scratch_bytes": scratch, "calibration_passes": share, "remedy": remedy}
        print_json({"sensitivity": values})
        return
    console = stdout()
    say(console, f"sensitivity  {tokens:,} tokens {'forward and back' if gradients else 'forward'}, not measured yet")
    say(console, f"disk         {size(scratch)} of activations meanwhile")
    say(console, f"time         about {share:.2g} times the build's calibration (modelled by multiplications)")
    say(console, f"next         {remedy}")


def _remedy(model: str, options: TargetOptions) -> str:
    flag = " --no-gradients" if options.no_gradients else ""
    return (
        f"qconv quantize with the same options measures, chooses and builds; to see the choice before, run "
        f"qconv sensitivity {model}{flag} -o S and give --sensitivity S."
    )


def _values(found: Allocation[Any]) -> dict[str, Any]:
    return {
        **found.values(),
        "output_bytes": found.extent.files,
        "types": dict(found.chosen),
        "recipe": found.recipe.model_dump(mode="json"),
    }


def _print(found: Allocation[Any], save: Path | None) -> None:
    console = stdout()
    layers: dict[int, dict[str, str]] = {}
    for unit in found.units:
        if unit.layer is not None:
            layers.setdefault(unit.layer, {})[unit.role] = found.chosen[unit.name]
    roles = list(dict.fromkeys(role for by_role in layers.values() for role in by_role))
    rows = [(str(layer), *(by_role.get(role, "") for role in roles)) for layer, by_role in layers.items()]
    print_table(console, ("layer", *roles), rows)
    say(console, "")
    outside = [unit for unit in found.units if unit.layer is None]
    for unit in outside:
        say(console, f"{unit.role:<13}{found.chosen[unit.name]}")
    if outside:
        say(console, "")
    name = "predicted KLD" if found.is_divergence else "relative error"
    print_table(console, ("bits", name), [(bits(size), f"{loss:.3g}") for size, loss in found.curve])
    say(console, "")
    say(console, f"output       {size(found.extent.files)}, {found.extent.bits:.3f} bits per weight")
    if found.is_divergence:
        said = f"mean KL divergence {found.predicted:.3g} (measured, 1.1 to 1.7 times as much on the bundled model)"
    else:
        said = f"relative error of the logits {found.predicted:.3g}, estimated without gradients: no divergence"
    say(console, f"predicted    {said}")
    if save is not None:
        say(console, f"recipe       {save}")
