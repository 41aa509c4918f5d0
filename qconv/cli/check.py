"""``qconv check``: what engines make of a build, by rules with their sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qconv.cli.console import print_json, print_table, say, stdout
from qconv.cli.examples import examples
from qconv.cli.numbers import COUNT
from qconv.cli.options import json_option
from qconv.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from qconv.engines.rule import Judgement

NAMES = ("vllm", "sglang", "tensorrt-llm", "llamacpp", "transformers", "mlx", "all")
_ALL = NAMES[-1]
_FAILS = 1
_STYLES = {
    "loads and right": "green",
    "loads and WRONG": "bold red",
    "refused": "red",
    "unknown to the rules": "yellow",
}


@click.command(
    short_help="Tell which engines load a build, and which get it wrong.",
    epilog=examples(
        "qconv check BUILD",
        "qconv check BUILD --engine vllm --tp 8 --ep 8",
    ),
)
@click.argument("build")
@click.option(
    "--engine", "engines", type=click.Choice(NAMES), multiple=True, help="Repeatable; all of them by default."
)
@click.option("--tp", type=COUNT, default=1, metavar="N", help="Serve with N tensor-parallel ranks.")
@click.option("--ep", type=COUNT, default=1, metavar="N", help="Serve with N expert-parallel ranks.")
@json_option
def command(build: str, engines: Sequence[str], tp: int, ep: int, as_json: bool) -> int:
    """Tell what engines make of BUILD: a folder, a GGUF file or a Hub id, of which only headers are read.

    Each verdict is of one version of an engine: loads and right, loads and WRONG, refused, or unknown to the rules. A
    rule says where it is known from (run: a build was loaded; read: the engine's code; thread: its users or developers)
    and what to do. Nothing is loaded here, and rules know only what somebody found out.

    Exits with 1 if something is WRONG, if a named engine refuses the build, or if all engines do.

    \b
    Examples:
      qconv check Qwen3-Coder-480B-awq
      qconv check model.Q4_K_M.gguf --engine llamacpp
      qconv check Qwen3-Coder-480B-fp8 --engine vllm --tp 8 --ep 8 --json
    """
    from qconv.artifacts.subject import subject_of
    from qconv.boundary.content import is_gguf
    from qconv.checkpoint.hub import is_hub_id, resolve_build, resolve_model
    from qconv.engines.launch import command as launch
    from qconv.folders.state import require_finished
    from qconv.planning.engines import Deployment, engine_values, fails, judgements

    if _ALL in engines and len(engines) > 1:
        raise UsageError("--engine: all is every engine.", hint="Leave the others out.")
    remote = build if not Path(build).exists() and is_hub_id(build) else None
    path = resolve_build(build) if remote is None else resolve_model(remote, weights=False)
    if remote is None:
        require_finished(path if path.is_dir() else path.parent)
    subject = subject_of(path, remote)
    named = tuple(name for name in dict.fromkeys(engines) if name != _ALL)
    deployment = Deployment(tp, ep)
    served = str(path / min(subject.files)) if subject.files and subject.keys is not None and path.is_dir() else build
    found = judgements(subject, named, deployment)
    starts = {one.engine.name: launch(one.engine.name, served, subject, deployment) for one in found}
    if as_json:
        values = [{**one, "start": starts[one["engine"]]} for one in engine_values(found)]
        print_json({"build": build, "layout": subject.layout, "tp": tp, "ep": ep, "engines": values})
    else:
        console = stdout()
        say(console, f"{build}: {subject.layout}", style="bold")
        say(console, "")
        print_verdicts(console, found)
        if remote is not None and not is_gguf(path):
            say(console, "note: of a repository only headers are read, no values: rules about these did not run")
        ready = [line for one in found if one.verdict.value == "loads and right" and (line := starts[one.engine.name])]
        for line in ready:
            say(console, f"start  {line}")
    return _FAILS if fails(found, bool(named)) else 0


def print_verdicts(console: Console, found: Sequence[Judgement]) -> None:
    """The table of engines, then every finding with its remedy."""
    rows = [(one.engine.name, one.verdict.value, one.known or "", one.engine.version) for one in found]
    print_table(console, ("engine", "verdict", "known by", "version"), rows)
    say(console, "")
    for one in found:
        for finding in one.findings:
            rule = finding.rule
            style = "bold red" if rule.effect.value == "loads and WRONG" else ""
            say(console, f"{rule.effect.value}: {one.engine.name} {rule.what}", style=style)
            more = (
                f" and {_count(finding.count - len(finding.where))} more" if finding.count > len(finding.where) else ""
            )
            say(console, f"  at      {', '.join(finding.where)}{more}")
            say(console, f"  instead {rule.remedy}")
            say(console, f"  known   {rule.known}: {rule.source} ({rule.key})")
        if one.verdict.value == "unknown to the rules":
            say(console, f"note: no rule knows whether {one.engine.version} reads this; try it")


def _count(number: int) -> str:
    return f"{number:,}" if number < 990 else "many"
