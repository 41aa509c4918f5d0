"""Options that several commands share: the recipe, put together from a packaged one and single keys."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from qconv.cli.completion import among, formats
from qconv.cli.console import say, stderr
from qconv.cli.numbers import COUNT, SEED, FiniteRange
from qconv.core.settings import GIGABYTE, MATCHED, TextSettings
from qconv.errors import UsageError
from qconv.executors import DEFAULT, executors
from qconv.methods import rounding_of
from qconv.planning.recipe import Recipe, load_recipe, packaged_recipes, parse_as, read_values, replaced
from qconv.planning.steps import METHODS, steps

if TYPE_CHECKING:
    from qconv.planning.gguf_recipe import GgufRecipe

GGUF = "gguf"
COMPENSATED_BY_TEXT = ("fp8", "fp8_dynamic")
"""Formats that are rounded to nearest unless there is calibration text."""
OF_SAFETENSORS = ("group_size", "skip", "kv_cache")
OF_GGUF = ("imatrix", "tensor_type")
"""Options that have no meaning for the others."""
_WEIGHTED = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\*(.+)", re.DOTALL)
"""A corpus of a mixture: weight, asterisk, corpus."""
Function = TypeVar("Function", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
model_argument = click.argument("model")


def _disk_budget(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    from qconv.cli.target import parse_size

    return None if value is None else parse_size(value, "--disk-budget")


disk_budget_option = click.option(
    "--disk-budget",
    metavar="SIZE",
    callback=_disk_budget,
    help="Of a Hub id: let shards come and go in so much disk, 40GB ...; by itself where they do not fit.",
)
executor_option = click.option(
    "--executor",
    type=click.Choice(executors()),
    default=DEFAULT,
    show_default=True,
    help="Where the work runs; the bytes do not depend on it.",
)

devices_option = click.option(
    "--devices",
    default="cpu",
    show_default=True,
    metavar="WHERE",
    help="What calibration computes on: cpu, cuda (every GPU), cuda:0,1 or auto.",
)


def one_device_option(default: str | None, help: str) -> Callable[[Function], Function]:
    """``--devices`` for what computes on one, and its former name, which says so."""

    def decorate(function: Function) -> Function:
        @click.option(
            "--devices", "device", default=default, show_default=default is not None, metavar="WHERE", help=help
        )
        @click.option("--device", "former", hidden=True)
        @functools.wraps(function)
        def called(*given: Any, device: str | None, former: str | None, **named: Any) -> Any:
            if former is not None:
                say(stderr(), "--device is --devices now; the old name goes on working.", style="dim")
                device = former
            return function(*given, device=None if device is None else _one_device(device), **named)

        return cast(Function, called)

    return decorate


def _one_device(asked: str) -> str:
    """Its name as torch has it.

    Raises:
        UsageError: several are named.
    """
    if "," in asked:
        raise UsageError(f"--devices {asked}: one device computes here.", hint="Name one.")
    if asked != "auto":
        return asked
    from qconv.core.devices import devices_of

    return str(devices_of(asked)[0])


calib_option = click.option(
    "--calib",
    metavar="CORPUS",
    multiple=True,
    help="python-stdlib, agent, text:PATH, jsonl:PATH[:FIELD] or hf:DATASET; repeatable, with weights: "
    "0.6*python-stdlib.",
)


def corpus_of(given: Sequence[str]) -> str | list[dict[str, Any]] | None:
    """``calibration.corpus`` as ``--calib`` says it: one, or several with their weights, 1 where none is said."""
    found: list[dict[str, Any]] = []
    for one in given:
        weighted = _WEIGHTED.fullmatch(one)
        if weighted is None:
            found.append({"corpus": one, "weight": 1.0})
        else:
            found.append({"corpus": weighted[2], "weight": float(weighted[1])})
    if len(found) == 1:
        return str(found[0]["corpus"])
    return found or None


def text_settings(
    calib: Sequence[str], tokens: int | None, sequence_length: int | None, seed: int | None
) -> TextSettings:
    """The text that layers are looked at on, by the options that say of it.

    Raises:
        RecipeError: a value does not fit.
    """
    given = {"corpus": corpus_of(calib), "tokens": tokens, "sequence_length": sequence_length, "seed": seed}
    return parse_as(TextSettings, {key: value for key, value in given.items() if value is not None}, "calibration")


_RECIPE_OPTIONS = (
    click.option(
        "--fmt",
        metavar="NAME",
        multiple=True,
        shell_complete=among(formats),
        help=f"A packaged recipe: {', '.join(packaged_recipes())}; or gguf:TYPE for llama.cpp, such as gguf:Q4_K_M, "
        "or gguf:Q4_A of its size, where attention's types are high (Q2_A to Q5_A). "
        "Repeatable, also with --recipe: several builds of one calibration.",
    ),
    click.option(
        "--recipe",
        metavar="FILE",
        multiple=True,
        shell_complete=among(packaged_recipes, or_file=True),
        help="A recipe: a YAML file or a packaged recipe's name; repeatable.",
    ),
    click.option("--method", type=click.Choice(["+".join(one) for one in METHODS]), help="Quantization method."),
    calib_option,
    click.option("--tokens", type=COUNT, help="Calibration tokens."),
    click.option("--sequence-length", type=COUNT, help="Tokens of one calibration sequence."),
    click.option("--seed", type=SEED, help="Seed of the calibration's samples."),
    click.option(
        "--group-size", type=click.IntRange(-1, COUNT.max), help="Weights that share a scale; -1 for a whole row."
    ),
    click.option(
        "--routing",
        type=click.Choice(["routed", "all-experts"]),
        help="Which calibration tokens an expert sees: those that the router sends it, or all.",
    ),
    click.option("--no-propagate", is_flag=True, help="Calibrate each layer on the outputs of unquantized ones."),
    click.option(
        "--propagate",
        type=click.Choice(["true", "false", MATCHED]),
        help="Whether calibration lets a layer see the outputs of quantized ones: true, false, or true "
        "while GPTQ aims at the outputs of the unquantized model (matched).",
    ),
    click.option(
        "--refine",
        type=click.IntRange(0, 20),
        metavar="N",
        help="After GPTQ, N passes over the codes and their scales; 0 for none.",
    ),
    click.option(
        "--max-shard-size",
        type=FiniteRange(min=0.001, max=1e9),
        metavar="GB",
        help="Gigabytes (10^9 bytes) that one file of the build may hold.",
    ),
    click.option(
        "--skip", metavar="PATTERN", multiple=True, help="Leave modules of that name unquantized too; repeatable."
    ),
    click.option(
        "--rule",
        metavar="PATTERN=SCHEME",
        multiple=True,
        help="Another grid for linears of that name, from any dot on: int8-channel, int4-g32, fp8-block, skip ..., for "
        "GGUF a type; repeatable, the first counts, before the recipe's own.",
    ),
    click.option(
        "--kv-cache",
        type=click.Choice(["fp8"]),
        help="Calibrate and store scales of keys and values for a cache in FP8 (compressed-tensors' layouts).",
    ),
    click.option(
        "--rope",
        metavar="yarn:FACTOR",
        help="Write YaRN into the build: a context FACTOR times longer, at a cost on short text; yarn:FACTOR:ORIGINAL "
        "where the length that the model was trained on is not config.json's.",
    ),
    click.option(
        "--imatrix",
        type=click.Path(exists=True, dir_okay=False),
        multiple=True,
        help="GGUF: an importance matrix in llama.cpp's GGUF or legacy form; several are merged.",
    ),
    click.option(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        multiple=True,
        help="GGUF: the type of tensors in whose name that regular expression is found; repeatable, the first counts.",
    ),
)


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """The recipe options as given; what was not given is None or empty."""

    fmt: str | None
    recipe: str | None
    method: str | None
    calib: Sequence[str]
    tokens: int | None
    sequence_length: int | None
    seed: int | None
    group_size: int | None
    routing: str | None
    no_propagate: bool
    propagate: str | None
    refine: int | None
    max_shard_size: float | None
    skip: Sequence[str]
    rule: Sequence[str]
    kv_cache: str | None
    rope: str | None
    imatrix: Sequence[str]
    tensor_type: Sequence[str]

    @classmethod
    def named(cls, fmt: str | None, recipe: str | None) -> RecipeOptions:
        """A recipe by name and nothing else."""
        empty: dict[str, Any] = {"Sequence[str]": (), "bool": False}
        absent: dict[str, Any] = {one.name: empty.get(str(one.type)) for one in fields(cls)}
        return cls(**absent | {"fmt": fmt, "recipe": recipe})

    def calibrates(self, has_text: bool) -> bool:
        """Whether these options, or text in the recipe, let layers of a GGUF build be looked at."""
        return bool(self.calib or self.tokens or rounding_of(steps(self.method)) is not None or has_text)

    def gguf(self) -> GgufRecipe | None:
        """The recipe of a GGUF build, where these options name one; ``--tensor-type`` goes before its own rules.

        Raises:
            UsageError: no such file type, or an option that has no meaning for GGUF.
            RecipeError: as :meth:`load`.
        """
        fmt = self.fmt
        if fmt is not None and (fmt == GGUF or fmt.startswith(f"{GGUF}:")):
            values: dict[str, Any] = {"format": GGUF, "type": fmt.removeprefix(GGUF).removeprefix(":")}
            said, where = f"--fmt {fmt}", "--fmt"
            if self.recipe is not None:
                self._source()
            from qconv.formats.gguf.mixture import FILE_TYPES

            if values["type"] not in FILE_TYPES:
                known = ", ".join(FILE_TYPES)
                raise UsageError(f"--fmt: {fmt} names no GGUF file type.", hint=f"Write gguf: and one of {known}.")
        elif self.recipe is not None or fmt is not None:
            values, where = read_values(self._source())
            said = f"--recipe {self.recipe}" if fmt is None else f"--fmt {fmt}"
            if values.get("format") != GGUF:
                return None
        else:
            return None
        for name in OF_SAFETENSORS:
            if getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')}: has no meaning with {said}.")
        if not self.calibrates(bool(values.get("calibration"))):
            for name in ("routing", "no_propagate", "propagate", "refine"):
                if getattr(self, name):
                    raise UsageError(
                        f"--{name.replace('_', '-')}: has no meaning with {said} alone, which is not calibrated.",
                        hint="Give --calib, --tokens or --method gptq too.",
                    )
        from qconv.planning.gguf_recipe import parse_gguf_recipe

        overrides: dict[str, Any] = {key: value for key, value in self._shared_overrides().items() if value is not None}
        if self.imatrix:
            overrides["imatrix.files"] = list(self.imatrix)
        if self.tensor_type:
            overrides["tensor_types"] = {
                **dict(_pair("--tensor-type", option, "ffn_down_exps=Q6_K") for option in self.tensor_type),
                **dict(values.get("tensor_types") or {}),
            }
        if self.rule:
            overrides["rules"] = [*self._rules(), *(values.get("rules") or [])]
        return parse_gguf_recipe(replaced(values, overrides), where)

    def load(self) -> Recipe:
        """The recipe, with the given options in place of its own values; ``--skip`` and ``--rule`` add to its lists.

        Raises:
            UsageError: no recipe, two of them, or a packaged one that does not exist.
            RecipeError: the recipe does not parse, or a value does not fit.
        """
        source = self._source()
        for name in OF_GGUF:
            if getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')}: is for --fmt gguf:TYPE and recipes of format gguf.")
        overrides = self._shared_overrides() | {"grid.group_size": self.group_size, "kv_cache": self.kv_cache}
        given: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
        plain = load_recipe(source)
        if plain.format in COMPENSATED_BY_TEXT and not plain.looks_at_activations and self.method is None:
            # Text has no other use there.
            given |= {"method": "gptq"} if self.calib or self.tokens else {}
        if self.skip:
            given["skip"] = [*plain.skip, *self.skip]
        if self.rule:
            given["rules"] = [*self._rules(), *(rule.model_dump(mode="json") for rule in plain.rules)]
        return load_recipe(source, given)

    def _shared_overrides(self) -> dict[str, Any]:
        """What every kind of recipe has, by dotted key; None where it was not given."""
        return {
            "method": self.method,
            "refine.sweeps": self.refine,
            "refine.refits": self.refine,
            "calibration.corpus": corpus_of(self.calib),
            "calibration.tokens": self.tokens,
            "calibration.sequence_length": self.sequence_length,
            "calibration.seed": self.seed,
            "calibration.routing": self.routing,
            "calibration.propagate": self._propagate(),
            "rope": self.rope,
            "output.max_shard_size": None if self.max_shard_size is None else int(self.max_shard_size * GIGABYTE),
        }

    def _propagate(self) -> bool | str | None:
        if self.no_propagate and self.propagate not in (None, "false"):
            raise UsageError(f"--propagate {self.propagate} and --no-propagate contradict each other.")
        if self.no_propagate:
            return False
        return {"true": True, "false": False}.get(self.propagate or "", self.propagate)

    def _rules(self) -> list[dict[str, str]]:
        pairs = (_pair("--rule", option, "'self_attn.*=int8-channel'") for option in self.rule)
        return [{"match": pattern, "grid": scheme} for pattern, scheme in pairs]

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


def _pair(name: str, option: str, example: str) -> tuple[str, str]:
    """The two sides of an option.

    Raises:
        UsageError: it has no two sides.
    """
    pattern, found, value = option.rpartition("=")
    if not (found and pattern and value):
        what = "TYPE" if name == "--tensor-type" else "SCHEME"
        raise UsageError(f"{name}: {option!r} is not PATTERN={what}.", hint=f"Write {example}.")
    return pattern, value


def out_option(text: str) -> Callable[[Function], Function]:
    """The option of the folder that a command writes."""
    kind = click.Path(file_okay=False, path_type=Path)
    return click.option("-o", "--out", required=True, type=kind, help=text)


def recipe_options(function: Function) -> Function:
    """Add the recipe options to a command."""
    for option in reversed(_RECIPE_OPTIONS):
        function = option(function)
    return function
