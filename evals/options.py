"""Options that the scripts of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = REPOSITORY / "evals/models/tiny-coder-moe"

Function = TypeVar("Function", bound=Callable[..., Any])


def model_option(function: Function) -> Function:
    """``--model``: the unquantized checkpoint."""
    return click.option(
        "--model",
        type=click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True),
        default=TINY,
        show_default=True,
    )(function)


def work_option(folder: str) -> Callable[[Function], Function]:
    """``--work``: where builds are made, by default in ``folder`` of the checkout."""

    def add(function: Function) -> Function:
        kind = click.Path(file_okay=False, path_type=Path, resolve_path=True)
        return click.option("--work", type=kind, default=REPOSITORY / folder)(function)

    return add


def json_option(function: Function) -> Function:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def outliers_option(function: Function) -> Function:
    """``--outliers``: a copy of the model that is harder to round."""
    return click.option("--outliers", is_flag=True, help="Measure a copy of the model with outliers.")(function)


def results_option(name: str) -> Callable[[Function], Function]:
    """``--results``: the file of figures, by default that in evals/results."""

    def add(function: Function) -> Function:
        kind = click.Path(dir_okay=False, path_type=Path, resolve_path=True)
        return click.option("--results", type=kind, default=REPOSITORY / "evals/results" / name, show_default=True)(
            function
        )

    return add
