"""Each direction grows by one new file: put into an installed package, all commands work with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FAMILIES, random_model, save_model

REPOSITORY = Path(__file__).parents[2]
NEW = Path(__file__).parent / "new"
RUN = """
import contextlib, io, json, sys
from qconv.cli.main import main
results = []
for arguments in json.load(sys.stdin):
    sys.argv, out = ["qconv", *arguments], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
    results.append([code or 0, out.getvalue()])
json.dump(results, sys.stdout)
"""
KILLED = """
import os, signal, sys
from qconv.cli.main import main
from qconv.folders.journal import Journal
commit = Journal.commit
def until_two(self, key, record):
    commit(self, key, record)
    if len(self.units) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.commit = until_two
main()
"""
TEXT = ("--tokens", "128", "--sequence-length", "32")


@dataclass(frozen=True, slots=True)
class Case:
    """A new file, the model that is quantized, and the arguments that ask for it."""

    file: str
    arguments: tuple[str, ...]
    model: str = "qwen3_moe"
    recipe: str = "format: w4a16\nmethod: gptq\ngrid: {group_size: 32}\n"


CASES = {
    "models": Case("models_qwen2.py", TEXT, model="qwen2"),
    "grids": Case(
        "grids_shifts.py", TEXT, recipe="format: w4a16\nmethod: gptq\ngrid: {group_size: 32, values: shifts}\n"
    ),
    "methods": Case("methods_in_order.py", (*TEXT, "--method", "in_order")),
    "formats": Case(
        "formats_plain8.py", TEXT, recipe="format: plain8\nmethod: gptq\ngrid: {bits: 8, group_size: 32}\n"
    ),
    "executors": Case("executors_one.py", (*TEXT, "--executor", "one")),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel has it, with the new files of all directions."""
    folder = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "qconv", folder / "qconv", ignore=ignored)
    for name in ("recipes", "kernels"):
        shutil.copytree(REPOSITORY / name, folder / "qconv" / name, ignore=ignored)
    shutil.copytree(REPOSITORY / "evals/suites", folder / "qconv/evals/suites", ignore=ignored)
    shutil.copytree(REPOSITORY / "evals/gates", folder / "qconv/evals/gates", ignore=ignored)
    for case in CASES.values():
        direction, _, name = case.file.partition("_")
        shutil.copy(NEW / case.file, folder / "qconv" / direction / name)
    return folder


def run(site: Path, script: str, arguments: Sequence[str] = (), commands: Sequence[Sequence[str]] = ()) -> Any:
    """What a script printed as JSON, in a process that imports the package from ``site``; None if it was killed."""
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
        timeout=300,
        check=False,
    )
    if ran.returncode == -9:
        return None
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("direction", CASES)
def test_one_file_is_enough(direction: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[direction]
    monkeypatch.setitem(FAMILIES, "qwen2", {})
    model = save_model(random_model(case.model), tmp_path / "model")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(case.recipe)
    build = [str(model), "--recipe", str(recipe), *case.arguments]
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(site, KILLED, ["quantize", *build, "-o", str(out)]) is None
    assert (out / ".qconv/journal.jsonl").is_file()
    without_executor = [one for one in build if one not in ("--executor", "one")]
    results = run(
        site,
        RUN,
        commands=[
            ["plan", *without_executor, "--json"],
            ["quantize", *build, "-o", str(out)],
            ["quantize", *without_executor, "-o", str(whole)],
            ["verify", str(out), "--against", str(model), "--json"],
            ["inspect", str(out), "--json"],
            ["generate", str(out), "--prompt", "def add(", "--max-tokens", "4"],
        ],
    )
    assert [code for code, _ in results] == [0] * 6, results
    planned, _, _, verified, inspected, generated = (text for _, text in results)
    made = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    assert made == {file.name: file.read_bytes() for file in whole.glob("*.safetensors")}
    assert made
    assert json.loads(planned)["output_bytes"] == sum(map(len, made.values()))
    assert json.loads(verified)["problems"] == []
    assert inspected
    assert generated.strip()
