"""``qconv verify``: whether a build is what it claims to be."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from qconv.cli.console import print_json, print_table, say, short_names, stdout
from qconv.cli.examples import examples
from qconv.cli.options import disk_budget_option, json_option
from qconv.cli.progress import reporting
from qconv.errors import UnreadLayoutError, VerificationError

if TYPE_CHECKING:
    from qconv.verification.outcome import Verification


@click.command(
    short_help="Check a build, alone or against its source.",
    epilog=examples(
        "qconv verify BUILD",
        "qconv verify BUILD --against MODEL",
    ),
)
@click.argument("build")
@click.option("--against", metavar="MODEL", help="Also compare every weight with this source, a folder or a Hub id.")
@disk_budget_option
@json_option
def command(build: str, against: str | None, disk_budget: int | None, as_json: bool) -> int:
    """Check BUILD: checksums, tensors, skip list, scales; with --against also its distance from the source.

    BUILD is a folder, a Hub id, or a GGUF file.

    Exits with 5 if anything is wrong, and with 2 if it is of a kind that qconv does not read and cannot check.
    """
    with reporting(quiet=as_json) as reporter:
        from qconv.boundary.content import is_gguf
        from qconv.checkpoint.hub import model_folder, resolve_build
        from qconv.folders.state import require_finished
        from qconv.verification.build import verify
        from qconv.verification.gguf import verify_gguf

        path = resolve_build(build)
        require_finished(path if path.is_dir() else path.parent)
        check = verify_gguf if is_gguf(path) else verify
        if against is None:
            result = check(path, None, reporter.progress)
        else:
            with model_folder(against, disk_budget, reporter.log) as source:
                result = check(path, source, reporter.progress)
    kinds = by_kind(result.snr_db)
    if as_json:
        print_json(
            {
                "path": str(path),
                "good": not result.problems and not result.not_checked,
                "checked": result.checked,
                "not_checked": result.not_checked,
                "problems": result.problems,
                "notices": result.notices,
                "kinds": kinds,
                "snr_db": result.snr_db,
            }
        )
    else:
        _print(str(path), result, kinds)
    if result.problems:
        return VerificationError.exit_code
    return UnreadLayoutError.exit_code if result.not_checked else 0


def by_kind(snr_db: Mapping[str, float]) -> list[dict[str, Any]]:
    """Signal to noise ratios of linears by kind: modules whose names differ in numbers alone."""
    from qconv.artifacts.inspection import name_class

    kinds: dict[str, dict[str, float]] = {}
    for module, value in snr_db.items():
        kinds.setdefault(name_class(module), {})[module] = value
    rows = []
    for kind, values in kinds.items():
        worst = min(values, key=lambda module: values[module])
        finite = [value for value in values.values() if math.isfinite(value)]
        mean = statistics.fmean(finite) if finite else math.inf
        rows.append({"kind": kind, "count": len(values), "least": values[worst], "mean": mean, "worst": worst})
    return rows


def _print(path: str, result: Verification, kinds: list[dict[str, Any]]) -> None:
    console = stdout()
    findings = [("ok", text) for text in result.checked]
    findings += [("note", text) for text in result.notices]
    findings += [("not checked", text) for text in result.not_checked]
    findings += [("BAD", text) for text in result.problems]
    for state, text in findings:
        say(console, f"{state:<4} {text}", style="bold red" if state == "BAD" else "")
    if kinds:
        say(console, "")
        rows = [
            (name, f"{row['count']:,}", f"{row['least']:.1f}", f"{row['mean']:.1f}", _place(row["worst"]))
            for name, row in zip(short_names([row["kind"] for row in kinds]), kinds, strict=True)
        ]
        print_table(console, ("linears", "count", "least SNR (dB)", "mean", "least at"), rows)
        say(console, "")
    verdict = f"bad: {len(result.problems)} problems" if result.problems else "good"
    say(console, f"{path}: {'not checked' if result.not_checked and not result.problems else verdict}")


def _place(module: str) -> str:
    """The numbers in a module's name, each with what it counts: ``layers 3 experts 17``."""
    parts = module.split(".")
    return " ".join(f"{what} {number}" for what, number in itertools.pairwise(parts) if number.isdigit())
