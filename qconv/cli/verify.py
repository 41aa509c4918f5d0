"""``qconv verify``: whether a build is what it claims to be."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from qconv.cli.console import print_json, print_table, say, stdout
from qconv.cli.options import json_option
from qconv.cli.progress import reporting
from qconv.errors import VerificationError

if TYPE_CHECKING:
    from qconv.verify import Verification


@click.command()
@click.argument("build")
@click.option("--against", metavar="MODEL", help="Also compare every weight with this source, a folder or a Hub id.")
@json_option
def command(build: str, against: str | None, as_json: bool) -> int:
    """Check BUILD: checksums, tensors, skip list, scales; with --against also its distance from the source.

    Exits with 5 if anything is wrong.
    """
    with reporting(quiet=as_json) as reporter:
        from qconv.checkpoint.hub import resolve_model
        from qconv.verify import verify

        path = resolve_model(build)
        source = None if against is None else resolve_model(against)
        result = verify(path, source, reporter.progress)
    kinds = by_kind(result.snr_db)
    if as_json:
        print_json(
            {
                "path": str(path),
                "good": not result.problems,
                "checked": result.checked,
                "problems": result.problems,
                "notices": result.notices,
                "kinds": kinds,
                "snr_db": result.snr_db,
            }
        )
    else:
        _print(str(path), result, kinds)
    return VerificationError.exit_code if result.problems else 0


def by_kind(snr_db: Mapping[str, float]) -> list[dict[str, Any]]:
    """Signal to noise ratios of linears by kind: modules whose names differ in numbers alone."""
    kinds: dict[str, dict[str, float]] = {}
    for module, value in snr_db.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", module), {})[module] = value
    rows = []
    for kind, values in kinds.items():
        worst = min(values, key=lambda module: values[module])
        finite = [value for value in values.values() if math.isfinite(value)]
        mean = statistics.fmean(finite) if finite else math.inf
        rows.append({"kind": kind, "count": len(values), "least": values[worst], "mean": mean, "worst": worst})
    return rows


def _print(path: str, result: Verification, kinds: list[dict[str, Any]]) -> None:
    console = stdout()
    rows = [("ok", text) for text in result.checked]
    rows += [("note", text) for text in result.notices]
    rows += [("BAD", text) for text in result.problems]
    for state, text in rows:
        say(console, f"{state:<5}{text}", style="bold red" if state == "BAD" else "")
    if kinds:
        say(console, "")
        print_table(
            console,
            ("linears", "count", "least SNR (dB)", "mean", "worst"),
            [
                (row["kind"], f"{row['count']:,}", f"{row['least']:.1f}", f"{row['mean']:.1f}", row["worst"])
                for row in kinds
            ],
        )
        say(console, "")
    say(console, f"{path}: bad: {len(result.problems)} problems" if result.problems else f"{path}: good")
