"""``qconv inspect --html``: a build's report as one page; and the lines with which ``qconv quantize`` ends."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconv.cli.console import say, stdout
from qconv.errors import UsageError

if TYPE_CHECKING:
    from qconv.artifacts.bits import BitsByLayer

_HEAD = 400
"""Bytes of a page that hold what made it."""


def require_writable(page: Path, build: Path) -> None:
    """Check, before any work, that a page can be written there.

    Raises:
        UsageError: it would lie in the build's folder, whose files are the build and nothing else; or in no folder; or
            there is a file that qconv did not make.
    """
    from qconv.evaluation.report.build_page import GENERATOR

    folder = build if build.is_dir() else build.parent
    if build.is_dir() and page.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"--html {page}: lies in {folder}.", hint="Write the page beside it.")
    if not page.resolve().parent.is_dir():
        raise UsageError(f"--html {page}: there is no such folder.", hint="Choose a folder that exists.")
    if page.is_dir():
        raise UsageError(f"--html {page}: is a folder.", hint="Give the name of a file.")
    if page.exists():
        with page.open("rb") as file:
            ours = f'content="{GENERATOR}"'.encode() in file.read(_HEAD)
        if not ours:
            raise UsageError(f"--html {page}: is a file that qconv did not make.", hint="Choose another name.")


def write_page(page: Path, build: Path, nbytes: int, weights: int, bits: BitsByLayer) -> None:
    """Write the page of a build.

    Args:
        page: Where.
        build: Its folder, or its one file.
        nbytes: Bytes of its tensors.
        weights: How many weights they hold.
        bits: Bits by layer and role.

    Raises:
        ArtifactError: the build's report is damaged.
        OutputError: the page cannot be written.
    """
    from qconv.checkpoint.writer import write_atomically
    from qconv.evaluation.build_report import read_report
    from qconv.evaluation.report.build_page import build_page

    report = read_report(build if build.is_dir() else build.parent)
    if report is not None and build.is_file() and build.name not in report.files:
        report = None  # of another build, in whose folder this file lies
    bits_per_weight = 8.0 * nbytes / weights if weights else None
    text = build_page(build.resolve().name, nbytes, bits_per_weight, bits.rows(), report)
    write_atomically(page, text.encode())
    say(stdout(), str(page))


def error_values(report: Mapping[str, Any]) -> dict[str, Any]:
    """Where the error of a build's weights sits, from its report: squared error over squared weights in percent."""
    from qconv.evaluation.build_report import parse_report
    from qconv.evaluation.report.error_view import mean_errors

    told = {key: report[key] for key in ("layers", "tensors") if key in report}
    by_role, by_layer = mean_errors(parse_report(told, "qconv-report.json"))
    return {"error_percent_by_role": by_role, "error_percent_by_layer": by_layer}


def print_error(result: Mapping[str, Any]) -> None:
    """Print what :func:`error_values` gave of the build in ``path``, and where the rest of it is to be had."""
    from qconv.evaluation.report.error_view import error_lines

    lines = error_lines(result["error_percent_by_role"], result["error_percent_by_layer"])
    for title, line in zip(("error", ""), lines, strict=False):
        say(stdout(), f"{title:<13}{line}")
    path = Path(result["path"])
    say(stdout(), f"{'page':<13}{shlex.join(('qconv', 'inspect', str(path), '--html', f'{path.name}.html'))}")
