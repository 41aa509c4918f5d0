"""A model of the Hub through a window: a local run's bytes, through faults and kills, in no more disk than allowed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Start
from tests.hub_server import COMMIT, TOKEN, HubServer

MODEL = "owner/tiny-coder-moe"  # as the local folder is called, so that reports are the same
BUDGET = 22_000_000  # of 30 MB in five shards, of which three are needed at once
RTN = ("--fmt", "w4a16", "--method", "rtn")
GPTQ = ("--fmt", "gptq", "--tokens", "1024", "--sequence-length", "256")


@pytest.fixture
def hub(tiny: Path) -> Iterator[HubServer]:
    with HubServer(tiny, MODEL) as server:
        yield server


class Machine:
    """Runs the command as on a machine whose Hub is the server, and watches the window's folder."""

    def __init__(self, start: Start, hub: HubServer, home: Path) -> None:
        self.start, self.home = start, home
        self.shards = home / "qconv/hub/owner--tiny-coder-moe" / COMMIT / "shards"
        hugging = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(home / "hf")}
        self.environment = {"XDG_CACHE_HOME": str(home), **hugging, "OMP_NUM_THREADS": "1"}
        self.most = 0
        self.said = ""

    def begin(self, *arguments: object) -> subprocess.Popen[str]:
        return self.start(*arguments, env=self.environment)

    def run(self, *arguments: object, code: int = 0) -> None:
        process = self.begin(*arguments)
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,))
        watch.start()
        self.said = "".join(process.communicate(timeout=300))
        over.set()
        watch.join()
        assert process.returncode == code, self.said
        assert TOKEN not in self.said
        assert "Signature" not in self.said

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(0.005):
            self.most = max(self.most, self.held())

    def held(self) -> int:
        """Bytes in the window's folder; what goes while it is looked at counts as gone."""
        total = 0
        for file in self.shards.glob("*"):
            try:
                total += file.stat().st_size
            except FileNotFoundError:
                continue
        return total


@pytest.fixture
def machine(start: Start, hub: HubServer, tmp_path: Path) -> Machine:
    return Machine(start, hub, tmp_path / "home")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def require_same(one: Path, other: Path) -> None:
    ours, theirs = files(one), files(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name] != theirs[name]]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Mapping[Any, Path]:
    """Builds of the folder by recipe, made when they are asked for."""
    from click.testing import CliRunner

    from qconv.cli.main import qconv

    class Builds(dict[Any, Path]):
        def __missing__(self, recipe: tuple[str, ...]) -> Path:
            out = self[recipe] = tmp_path_factory.mktemp("local") / "out"
            command = recipe if recipe[0] in ("imatrix", "sensitivity") else ("quantize", *recipe)
            result = CliRunner().invoke(qconv, [command[0], str(tiny), "-o", str(out), *command[1:]])
            assert result.exit_code == 0, result.output
            return out

    return Builds()


def test_a_build_through_faults_is_the_local_one(
    machine: Machine, hub: HubServer, local: Mapping[Any, Path], tmp_path: Path
) -> None:
    shards = [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]
    hub.faults.update(
        {("cut", shards[0]): 2, ("flip", shards[1]): 1, ("refuse", shards[2]): 2, ("whole", shards[3]): 1}
    )
    machine.run("quantize", MODEL, "-o", tmp_path / "out", *RTN, "--disk-budget", f"{BUDGET}B")
    require_same(tmp_path / "out", local[RTN])
    assert not any(hub.faults.values())
    assert not hub.leaked
    assert 0 < machine.most <= BUDGET
    assert not list(machine.shards.iterdir())


def test_a_calibrated_build_killed_inside_a_shard_goes_on(
    machine: Machine, hub: HubServer, local: Mapping[Any, Path], tmp_path: Path
) -> None:
    command = ("quantize", MODEL, "-o", tmp_path / "out", *GPTQ, "--disk-budget", f"{BUDGET}B")
    hub.pause = 0.02
    process = machine.begin(*command)
    until = time.monotonic() + 120
    while not list(machine.shards.glob("*00002*.partial")):
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.pause = 0.0
    sent = hub.sent["model-00002-of-00005.safetensors"]
    assert sent > 0
    machine.run(*command)
    require_same(tmp_path / "out", local[GPTQ])
    assert machine.most <= BUDGET
    # The stand-in's pages come once; what had come of the shard is not asked for again, but for what was on its way.
    whole = (hub.folder / "model-00002-of-00005.safetensors").stat().st_size
    assert hub.sent["model-00002-of-00005.safetensors"] < 1.5 * whole + 2**20


def test_verify_imatrix_and_sensitivity(machine: Machine, local: Mapping[Any, Path], tmp_path: Path) -> None:
    machine.run("verify", local[RTN], "--against", MODEL, "--disk-budget", f"{BUDGET}B")
    assert "good" in machine.said
    imatrix = ("imatrix", "--tokens", "1024", "--sequence-length", "256")
    machine.run("imatrix", MODEL, "-o", tmp_path / "imatrix", *imatrix[1:], "--disk-budget", f"{BUDGET}B")
    require_same(tmp_path / "imatrix", local[imatrix])
    sensitivity = ("sensitivity", *imatrix[1:])
    machine.run("sensitivity", MODEL, "-o", tmp_path / "sensitivity", *imatrix[1:], "--disk-budget", f"{BUDGET}B")
    require_same(tmp_path / "sensitivity", local[sensitivity])
    assert machine.most <= BUDGET


def test_a_part_fetches_the_shards_of_its_own_layers(
    machine: Machine, hub: HubServer, local: Mapping[Any, Path], tmp_path: Path, tiny: Path
) -> None:
    command = ("quantize", MODEL, "-o", tmp_path / "out", *RTN, "--disk-budget", f"{BUDGET}B")
    machine.run(*command, "--part", "2/2")
    first = "model-00002-of-00005.safetensors"  # the bundled model's first layer; its head lies in the first shard
    assert hub.sent[first] < 0.5 * (hub.folder / first).stat().st_size, "the pages of its stand-in alone"
    machine.run(*command, "--part", "1/2")
    machine.run("collect", tmp_path / "out", code=2)
    assert "Name the model with --model" in machine.said
    machine.run("collect", tmp_path / "out", "--model", tiny)
    require_same(tmp_path / "out", local[RTN])


def test_too_small_a_budget_is_refused_with_what_is_needed(machine: Machine, hub: HubServer, tmp_path: Path) -> None:
    machine.run("quantize", MODEL, "-o", tmp_path / "out", *RTN, "--disk-budget", "10MB", code=2)
    assert "Allow at least 21MB" in machine.said
    assert not machine.held()
    assert not (tmp_path / "out").exists()
    for fmt in ("w4a16", "gguf:Q8_0"):
        machine.run("plan", MODEL, "--fmt", fmt)
        assert "disk budget  at least 21MB" in machine.said
    assert not machine.held()
    machine.run("quantize", MODEL, "-o", tmp_path / "out", *RTN, "--disk-budget", "21MB")


def test_a_folder_has_no_budget(machine: Machine, tiny: Path, tmp_path: Path) -> None:
    machine.run("quantize", tiny, "-o", tmp_path / "out", *RTN, "--disk-budget", "40GB", code=2)
    assert "--disk-budget is for a model that comes from the Hub" in machine.said


def test_a_run_goes_from_a_window_to_a_folder(
    machine: Machine, hub: HubServer, local: Mapping[Any, Path], tmp_path: Path, tiny: Path
) -> None:
    hub.pause = 0.02
    process = machine.begin("quantize", MODEL, "-o", tmp_path / "out", *RTN, "--disk-budget", f"{BUDGET}B")
    journal = tmp_path / "out/.qconv/journal.jsonl"
    until = time.monotonic() + 120
    while not (journal.exists() and b"layer-00000" in journal.read_bytes()):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    copy = tmp_path / "tiny-coder-moe"
    shutil.copytree(tiny, copy)
    machine.run("quantize", copy, "-o", tmp_path / "out", *RTN)
    assert "resuming" in machine.said
    require_same(tmp_path / "out", local[RTN])
