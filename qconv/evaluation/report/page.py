"""The report as one offline HTML page, as Markdown, and as JUnit XML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qconv import __version__
from qconv.boundary.printable import markdown_block, markdown_text, printable
from qconv.evaluation.record import Gate
from qconv.evaluation.report.view import RunView, number, summary
from qconv.folders.ownership import ledger, own_folder, require_free, write_own

NAMES = {"html": "report.html", "markdown": "report.md", "junit": "junit.xml", "json": "report.json"}
"""What is written, by kind."""


def write_report(folder: Path, views: Sequence[RunView], kinds: Sequence[str] = tuple(NAMES)) -> list[Path]:
    """Write the report of one or more runs in every form that is asked for.

    Raises:
        OutputError: the folder cannot be written, or holds a file of that name which qconv did not write.
    """
    made = {"html": html, "markdown": markdown, "junit": junit, "json": as_json}
    own_folder(folder)
    require_free(folder, [NAMES[kind] for kind in kinds], ledger(folder) or {})
    written = []
    for kind in kinds:
        path = folder / NAMES[kind]
        write_own(path, made[kind](views).encode())
        written.append(path)
    return written


def html(views: Sequence[RunView]) -> str:
    """One page without any outside reference: style and charts are part of it."""
    environment = Environment(
        loader=PackageLoader("qconv.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["number"] = number
    head, rows = summary(views)
    template = environment.get_template("report.html.j2")
    return template.render(views=views, head=head, rows=rows, version=__version__, title=_title(views))


def _shown(value: object) -> object:
    """A value as the page shows it: of text, what would act on the page or on the direction of writing as an escape."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def markdown(views: Sequence[RunView]) -> str:
    """For a pull request or a chat: verdicts, gates, numbers."""
    lines = [f"# {markdown_text(_title(views))}", ""]
    head, rows = summary(views)
    if len(views) > 1:
        lines += [*_table(head, rows), ""]
    for one in views:
        lines += [f"## {markdown_text(one.heading)}", "", f"**{markdown_text(one.run.verdict.sentence)}**", ""]
        if one.gates:
            columns = ("gate", "status", "value", "limit", "baseline", "noise", "detectable")
            lines += [*_table(columns, [_gate_row(gate) for gate in one.gates]), ""]
        if one.bits is not None:
            cells = [(layer, *("" if cell is None else cell[0] for cell in row)) for layer, row in one.bits.rows]
            lines += ["Bits per weight:", "", *_table(("layer", *one.bits.roles), cells), ""]
        lines += [f"{name}: {markdown_text(said)}\n" for name, said in one.facts if name == "KL divergence"]
        for task in one.tasks:
            lines += [f"### {markdown_text(task.name)}", "", markdown_text(task.summary), ""]
            lines += [*_table(("metric", "value", "unit", "over", "note"), task.metrics), ""]
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
        statuses = [gate.status for gate in one.gates]
        gated = {gate.task for gate in one.gates}
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
        for gate in one.gates:
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
        return f"{views[0].name}: {views[0].run.verdict.outcome}"
    return f"{len(views)} builds"


def _gate_row(gate: Gate) -> tuple[str, ...]:
    figures = (gate.value, gate.limit, gate.baseline, gate.noise, gate.detectable)
    return gate.name, gate.status, *map(number, figures)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(markdown_text, cells)) + " |"

    return [line(head), "| " + " | ".join(["---"] * len(head)) + " |", *map(line, rows)]
