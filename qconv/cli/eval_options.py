"""Options that the ``eval`` commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qconv.cli.completion import among, suites
from qconv.cli.numbers import SEED
from qconv.cli.options import one_device_option
from qconv.errors import UsageError

if TYPE_CHECKING:
    from qconv.evaluation.suites import Suite

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--suite",
        default="smoke",
        show_default=True,
        shell_complete=among(suites, or_file=True),
        help="A packaged suite's name, or a YAML file.",
    ),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of all arithmetic."),
    one_device_option("cpu", "Where to compute: cpu, cuda, cuda:1 or auto."),
    click.option("--seed", type=SEED, help="Which text and which samples, in place of the suite's."),
    click.option(
        "--cache",
        type=click.Path(file_okay=False, path_type=Path),
        help="Where references' logits are kept; by default $QCONV_CACHE or the user's cache folder.",
    ),
)


_ENGINE_OPTIONS = (
    click.option(
        "--engine",
        default="local",
        show_default=True,
        metavar="NAME",
        help="What computes builds: local, llamacpp (GGUF), openai:URL or openai-chat:URL.",
    ),
    click.option("--stream", is_flag=True, help="Layer by layer, for models larger than memory; cannot generate."),
)


def engine_options(function: Function) -> Function:
    """Add the options that decide what computes builds."""
    for option in reversed(_ENGINE_OPTIONS):
        function = option(function)
    return function


def engine_of(engine: str, stream: bool) -> str:
    """The engine's name.

    Raises:
        UsageError: only the local engine streams.
    """
    if stream and engine not in ("local", "stream"):
        raise UsageError(f"--stream: engine {engine} cannot.", hint="Leave out --engine.")
    return "stream" if stream else engine


def located(name: str, engine: str) -> Path:
    """The build's folder or file; what an endpoint serves need not be here."""
    from qconv.evaluation.artifacts import locate
    from qconv.evaluation.engines import is_endpoint

    return Path(name) if is_endpoint(engine) and not Path(name).exists() else locate(name)


def suite_options(function: Function) -> Function:
    """Add the options that decide what is measured."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def suite_of(name: str, dtype: str | None, seed: int | None) -> Suite:
    """The suite with the given options in place of its own values.

    Raises:
        UsageError: no such suite.
    """
    from qconv.evaluation.suites import load_suite

    suite = load_suite(name)
    if dtype is not None:
        suite = suite.model_copy(update={"engine": suite.engine.model_copy(update={"dtype": dtype})})
    return suite if seed is None else suite.model_copy(update={"seed": seed})


def check_device(device: str) -> None:
    """Check that a device is there.

    Raises:
        UsageError: it is not.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--devices {device}: {reason}.", hint="Choose cpu, or a GPU that is there.") from error
