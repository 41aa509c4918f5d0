"""The report as one offline HTML page, as Markdown, and as JUnit XML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qconv import __version__
from qconv.boundary.printable import markdown_block, markdown_text, printable
from qconv.evaluation.report.figures import NOTHING
from qconv.evaluation.report.gate_rows import GateRow, style_of
from qconv.evaluation.report.overview import anchor, overview
from qconv.evaluation.report.view import RunView, summary
from qconv.evaluation.report.words import sign
from qconv.folders.ownership import ledger, own_folder, require_free, write_own

NAMES = {"html": "report.html", "markdown": "report.md", "junit": "junit.xml", "json": "report.json"}
"""What is written, by kind."""


LEGEND = (
    "✓ within its limit · ✗ beyond it, and not by chance · ? the data cannot tell · ○ not measured or not judged. "
    "Ranges are 95 % intervals. Every sign leads to what it says."
)


def write_report(
    folder: Path,
    views: Sequence[RunView],
    kinds: Sequence[str] = tuple(NAMES),
    absent: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Write the report of one or more runs in every form that is asked for.

    Args:
        folder: Where the files go.
        views: The runs.
        kinds: Keys of :data:`NAMES`.
        absent: Builds that could not be made or measured, and why; the page and the Markdown name them.

    Raises:
        OutputError: the folder cannot be written, or holds a file of that name which qconv did not write.
    """
    made = {
        "html": lambda: html(views, absent),
        "markdown": lambda: markdown(views, absent),
        "junit": lambda: junit(views),
        "json": lambda: as_json(views),
    }
    own_folder(folder)
    require_free(folder, [NAMES[kind] for kind in kinds], ledger(folder) or {})
    written = []
    for kind in kinds:
        path = folder / NAMES[kind]
        write_own(path, made[kind]().encode())
        written.append(path)
    return written


def html(views: Sequence[RunView], absent: Sequence[tuple[str, str]] = ()) -> str:
    """One page without any outside reference: style and charts are part of it."""
    return rendered(
        "report.html.j2",
        views=views,
        first=overview(views, absent),
        anchor=anchor,
        style_of=style_of,
        sign=sign,
        legend=LEGEND,
        title=_title(views),
    )


def rendered(template: str, **values: Any) -> str:
    """A page of a template, everything in it escaped."""
    environment = Environment(
        loader=PackageLoader("qconv.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    return environment.get_template(template).render(version=__version__, **values)


def _shown(value: object) -> object:
    """A value as the page shows it: of text, what would act on the page or on the direction of writing as an escape."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def markdown(views: Sequence[RunView], absent: Sequence[tuple[str, str]] = ()) -> str:
    """For a pull request or a chat: verdicts, gates, numbers."""
    first = overview(views, absent)
    lines = [f"# {markdown_text(_title(views))}", ""]
    if len(views) > 1 or absent:
        lines += [f"**{markdown_text(first.verdict)}**", "", *(f"- {markdown_text(line)}" for line in first.advice), ""]
    lines += [f"{markdown_text(name)}: {markdown_text(why)}\n" for name, why in absent]
    if len(views) > 1:
        lines += [*_table(*summary(views)), ""]
    for one in views:
        lines += [f"## {markdown_text(one.heading)}", "", f"**{markdown_text(one.verdict)}**", ""]
        if one.gates:
            lines += [*_table(("gate", "result", "measured", "limit", "what that says"), map(_gate_row, one.gates)), ""]
        if one.error is not None and one.error.bits is not None:
            bits = one.error.bits
            cells = [(layer, *("" if cell is None else cell[0] for cell in row)) for layer, row in bits.rows]
            lines += ["Bits per weight:", "", *_table(("layer", *bits.roles), cells), ""]
        lines += [f"{name}: {markdown_text(said)}\n" for name, said in one.facts if name == "KL divergence"]
        for task in one.tasks:
            lines += [f"### {markdown_text(task.name)}", "", markdown_text(task.summary), ""]
            rows = [(row.name, row.value, row.between) for row in task.metrics]
            lines += [*_table(("metric", "value", "95 % interval"), rows), ""]
            if task.flips:
                lost, gained = (
                    ", ".join(sorted(markdown_text(flip.problem) for flip in task.flips if flip.lost is way)) or "none"
                    for way in (True, False)
                )
                lines += [f"Lost: {lost}. Gained: {gained}.", ""]
        for left in one.run.unmeasured:
            lines += [f"### {markdown_text(left.name)}", "", f"Not measured: {markdown_text(left.sentence)}", ""]
        lines += [markdown_block(f"$ {printable(one.command)}\n", "console"), ""]
    return "\n".join(lines)


def junit(views: Sequence[RunView]) -> str:
    """A test suite for each run, a test case for each gate and each unmeasured task that no gate asks for.

    Regressions fail; what cannot tell, and what was not measured, is skipped.
    """
    root = ElementTree.Element("testsuites")
    for one in views:
        statuses = [row.gate.status for row in one.gates]
        gated = {row.gate.task for row in one.gates}
        left_out = [task for task in one.run.unmeasured if task.name not in gated]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=printable(f"{one.name} {one.run.suite}"),
            tests=str(len(statuses) + len(left_out)),
            failures=str(statuses.count("fail")),
            skipped=str(len(statuses) - statuses.count("fail") - statuses.count("pass") + len(left_out)),
            errors="0",
            timestamp=printable(one.run.started),
            time=f"{one.run.seconds:.3f}",
        )
        for gate in (row.gate for row in one.gates):
            case = ElementTree.SubElement(
                suite, "testcase", name=printable(gate.name), classname=f"qconv.{gate.against}"
            )
            if gate.status != "pass":
                kind = "failure" if gate.status == "fail" else "skipped"
                ElementTree.SubElement(case, kind, message=printable(f"{gate.status}: {gate.sentence}"))
        for task in left_out:
            case = ElementTree.SubElement(suite, "testcase", name=printable(task.name), classname="qconv.task")
            ElementTree.SubElement(case, "skipped", message=printable(f"not measured: {task.sentence}"))
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_json(views: Sequence[RunView]) -> str:
    """The records, without the items."""
    exclude = {"tasks": {"__all__": {"items", "reference_items"}}}
    return json.dumps([one.run.model_dump(mode="json", exclude=exclude) for one in views], indent=1) + "\n"


def _title(views: Sequence[RunView]) -> str:
    if len(views) == 1:
        return views[0].heading
    references = dict.fromkeys(one.run.reference.name for one in views if one.run.reference is not None)
    of = f" of {next(iter(references))}" if len(references) == 1 else ""
    builds = dict.fromkeys(one.name for one in views)
    what = f"{len(builds)} builds{of}" if len(builds) > 1 else f"{len(views)} runs of {next(iter(builds))}"
    return f"{what}, {max(one.run.started for one in views)[:10]}"


def _gate_row(row: GateRow) -> tuple[str, ...]:
    name = f"{row.where}: {row.name}" if row.where else row.name
    between = "" if row.between == NOTHING else f" ({row.between})"
    return name, f"{row.sign} {row.word}", f"{row.value}{between}", row.limit, row.said


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(markdown_text, cells)) + " |"

    return [line(head), "| " + " | ".join(["---"] * len(head)) + " |", *map(line, rows)]
