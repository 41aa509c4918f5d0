"""A real vLLM on the CPU scores held-out text with builds of every format that it has a path for (``make engines``).

Each packaged recipe's build of a model is loaded by vLLM 0.32.0 and by qconv's runtime, which rounds inputs as the
format says. Their perplexities on the same tokens must agree within 0.3 %: loading alone proves nothing. What vLLM
refuses is told with its reason, and compared with what ``qconv check`` says of the build.

Exit codes: 0 where every loaded build agrees, 1 otherwise.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evals.quality import held_out_text, log_probabilities
from evals.recipes import general_recipes
from qconv.artifacts.subject import subject_of
from qconv.cli.console import LOG_WIDTH
from qconv.engines.rule import judge
from qconv.engines.subject import Deployment
from qconv.engines.vllm import ENGINE
from qconv.runtime.loading import load
from tests.interop import environments

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "evals/models/tiny-coder-moe"
TOLERANCE = 0.003
CALIBRATION = ("--tokens", "4096")
"""Enough for a comparison of engines, which see the same build."""


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a format.

    Attributes:
        name: The recipe's.
        verdict: What ``qconv check`` says of vLLM.
        ours: Perplexity by qconv's runtime, inputs rounded as the format says.
        theirs: Perplexity by vLLM; None if it loads nothing.
        apart: Mean difference of the log-probability of a token.
        reason: Why vLLM refused.
    """

    name: str
    verdict: str
    ours: float
    theirs: float | None = None
    apart: float | None = None
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether both perplexities are the same within the tolerance, or vLLM does not load the build."""
        return self.theirs is None or abs(self.theirs / self.ours - 1.0) <= TOLERANCE


@click.command(help=__doc__)
@click.option("--tokens", type=click.IntRange(min=1024), default=8192, show_default=True, help="Held-out tokens.")
@click.option("--only", multiple=True, metavar="RECIPE", help="Only these; repeatable.")
def main(tokens: int, only: Sequence[str]) -> None:
    """Build, score, print, and exit."""
    recipes = [name for name in general_recipes() if not name.startswith("qwen3-coder-480b")]
    held_out, rows, console = held_out_text(MODEL, tokens), [], Console(width=LOG_WIDTH)
    with tempfile.TemporaryDirectory(prefix="qconv-engines-") as name:
        work = Path(name)
        (work / "documents.json").write_text(json.dumps([ids[0].tolist() for ids in held_out]))
        for recipe in only or recipes:
            rows.append(row(recipe, work, held_out))
            console.print(f"{recipe}: {rows[-1].reason or 'loaded'}", markup=False, highlight=False)
    _print(rows, console)
    sys.exit(0 if all(one.agrees for one in rows) else 1)


def row(recipe: str, work: Path, held_out: Sequence[Tensor]) -> Row:
    """Build the model by a recipe, and score it both ways."""
    build, scores = work / recipe, work / f"{recipe}.json"
    command = [sys.executable, "-m", "qconv", "quantize", str(MODEL), "--fmt", recipe, *CALIBRATION, "-o", str(build)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise click.ClickException(f"{recipe}: quantize ended with {made.returncode}: {made.stderr[-500:]}")
    own = of_tokens(log_probabilities(load(build, round_inputs=True), held_out), held_out)
    verdict, ours = judge(ENGINE, subject_of(build), Deployment()).verdict.value, math.exp(-float(own.mean()))
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(REPOSITORY)}
    client = [str(environments.make("vllm")), "-m", "evals.peers.clients.vllm_scores", str(build)]
    finished = subprocess.run(
        [*client, str(work / "documents.json"), str(scores)],
        cwd=work,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        return Row(recipe, verdict, ours, reason=_reason(finished.stdout + finished.stderr))
    found = torch.tensor([one for document in json.loads(scores.read_text()) for one in document], dtype=torch.float64)
    return Row(recipe, verdict, ours, math.exp(-float(found.mean())), float((found - own).abs().mean()))


def of_tokens(found: Sequence[Tensor], held_out: Sequence[Tensor]) -> Tensor:
    """The log-probability of each token that came, float64 [tokens], of those of every token that might have."""
    pairs = zip(found, held_out, strict=True)
    return torch.cat([one.gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1).double() for one, ids in pairs])


def _reason(said: str) -> str:
    """The last error that a process told of."""
    told = [line.partition("] ")[2] or line for line in said.splitlines() if "Error: " in line]
    return told[-1].strip()[:120] if told else said.strip()[-120:]


def _print(rows: Sequence[Row], console: Console) -> None:
    table = Table("recipe", "qconv check", "perplexity", "in vLLM", "apart", "mean |log p|", "")
    for one in rows:
        if one.theirs is None or one.apart is None:
            table.add_row(one.name, one.verdict, f"{one.ours:.3f}", "refused", "", "", one.reason)
            continue
        apart = f"{100.0 * (one.theirs / one.ours - 1.0):+.3f} %"
        state = "" if one.agrees else "DIFFERS"
        table.add_row(one.name, one.verdict, f"{one.ours:.3f}", f"{one.theirs:.3f}", apart, f"{one.apart:.4f}", state)
    console.print(table)


if __name__ == "__main__":
    main()
