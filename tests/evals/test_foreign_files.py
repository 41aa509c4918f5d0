"""The sweep's own parts: what it plants and notices, how it kills; and a command that removes too much is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evals.foreign_files import MINE, PLANTS, Count, changed, plant, report, state
from tests.conftest import REPOSITORY


def test_every_pattern_is_planted_and_any_change_is_noticed(tmp_path: Path) -> None:
    for number, what in enumerate(PLANTS):
        out = tmp_path / str(number) / "out"
        name = plant(out, what)
        assert name is not None
        before = state(out.parent, [name])
        assert changed(before, out.parent) == []
        path = out.parent / name
        if path.is_symlink():
            path.unlink()
            path.symlink_to("elsewhere else")
        elif path.is_dir():
            path.rmdir()
        else:
            os.utime(path, ns=(0, 0))
        assert changed(before, out.parent) == [f"{name} is {'changed' if os.path.lexists(path) else 'gone'}"]


def test_what_a_link_leads_to_is_watched_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    name = plant(out, "link -> file")
    assert name is not None
    before = state(tmp_path, [name])
    (tmp_path / "elsewhere/file").write_bytes(MINE + b"more")
    assert changed(before, tmp_path) == ["elsewhere/file is changed"]


def test_nothing_is_planted_through_a_link_or_below_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert plant(out, ".qconv -> folder") is not None
    assert plant(out, ".qconv/notes.txt") is None
    assert plant(out, "build") is not None
    assert plant(out, "build/a.o") is None


KILLED = """
import sys
sys.path.insert(0, ".")
from pathlib import Path
from evals.foreign_files import hooked
count = hooked(int(sys.argv[2]))
folder = Path(sys.argv[1])
folder.mkdir()
(folder / "a").write_bytes(b"1")
(folder / "a").rename(folder / "b")
(folder / "b").read_bytes()
(folder / "b").unlink()
print(count())
"""


@pytest.mark.parametrize(("kill", "left"), [(0, []), (1, None), (2, []), (3, ["a"]), (4, ["b"])])
def test_a_run_dies_before_the_change_that_is_asked_for(tmp_path: Path, kill: int, left: list[str] | None) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, out, str(kill)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    assert (sorted(path.name for path in out.iterdir()) if out.exists() else None) == left
    assert kill or done.stdout == "4\n"  # mkdir, open, rename, unlink


GREEDY = """
import sys
sys.path.insert(0, ".")
from pathlib import Path
from evals import foreign_files

class Greedy:
    def main(self, prog_name):
        out = Path(sys.argv[1])
        out.mkdir(exist_ok=True)
        for file in out.glob("*.json"):
            file.unlink()
        (out / "made").touch()
        sys.exit(0)

foreign_files.qconv = Greedy()
case = foreign_files.Case("greedy", lambda out: (out,), restarts=False)
for count in foreign_files.sweep(case, Path(sys.argv[1]), 1).values():
    print(*count.problems, sep="\\n")
"""


def test_a_command_that_removes_by_pattern_is_found(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GREEDY, tmp_path / "work"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {line.rpartition(": ")[2] for line in done.stdout.splitlines() if line}
    assert {"out/results.json is gone", "out/config.json is gone", "out/key.json is gone"} <= found
    assert all(line.endswith(".json is gone") for line in found)


def test_what_was_changed_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    bad = Count(problems=["quantize: notes.txt is gone"])
    assert report({"quantize": {"foreign": Count()}}) == []
    assert "nothing that is not qconv's was changed" in capsys.readouterr().out
    assert report({"quantize": {"foreign": bad}}) == bad.problems
    assert "notes.txt is gone" in capsys.readouterr().out
