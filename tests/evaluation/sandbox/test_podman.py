"""What replaces bubblewrap's own means where a container is used: a keeper."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qconv.evaluation.sandbox import proof
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.candidate import Candidate
from qconv.evaluation.sandbox.forgeries import FORGERIES, HONEST
from qconv.evaluation.sandbox.forgery import CHECK
from qconv.evaluation.sandbox.inside import COMMAND, KEPT_COMMAND
from qconv.evaluation.sandbox.judge import judge
from qconv.evaluation.sandbox.limits import Limits
from qconv.evaluation.sandbox.podman import Podman
from qconv.evaluation.sandbox.proof import prove
from qconv.evaluation.sandbox.verdict import Status
from tests.evaluation.sandbox.test_survivors import descendants, survivors

KEEP = "from qconv.evaluation.sandbox.guest import keep; keep()"
FILTERED = ("a child process", "a thread that survives", "a local socket", "a memory file", "a new namespace")


@dataclass(frozen=True, slots=True)
class Kept:
    """bubblewrap as a container would be: a keeper starts the guest."""

    executable: str
    name: str = "kept"

    def start(self, limits: Limits, group: int) -> subprocess.Popen[bytes]:
        command = [self.executable, *Bubblewrap(self.executable).options(limits), *KEPT_COMMAND]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, process_group=group)


@pytest.mark.parametrize("name", FILTERED)
def test_a_kept_guest_is_filtered_too(backend: Bubblewrap, name: str) -> None:
    forgery = next(item for item in FORGERIES if item.name == name)
    assert judge(Kept(backend.executable), CHECK, forgery.program, forgery.limits).status is Status.FAIL


def test_a_kept_guest_serves(backend: Bubblewrap) -> None:
    for honest in HONEST:
        assert judge(Kept(backend.executable), CHECK, honest.program, honest.limits).status is Status.PASS


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("import os\n    os.kill(os.getpid(), 11)", Status.FAIL),
        ("import os\n    os._exit(0)", Status.FAIL),
        ("while True: pass", Status.TIMEOUT),
    ],
)
def test_the_keeper_passes_on_how_the_guest_ended(backend: Bubblewrap, ending: str, status: Status) -> None:
    program = f"def double(x):\n    {ending}"
    assert judge(Kept(backend.executable), CHECK, program, Limits(cpu_seconds=1, wall_seconds=6.0)).status is status


def test_the_keeper_ends_with_its_input() -> None:
    # In a PID namespace its end is the end of all; here the guest sees the same end of input itself.
    pipe = subprocess.PIPE
    keeper = subprocess.Popen([sys.executable, "-c", KEEP], stdin=pipe, stdout=pipe)
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    keeper.stdin.write(b'{"limits": {}, "tmpfs": null, "seccomp": null, "nonce": "1"}\n')
    keeper.stdin.flush()
    assert keeper.stdout.readline() == b'{"nonce":"1"}\n'
    family = descendants(keeper.pid)
    assert family
    keeper.stdin.close()
    assert keeper.wait(5) == 0
    keeper.stdout.close()
    assert not survivors(family)


def test_a_container_sees_what_a_bubblewrap_sees(tmp_path: Path) -> None:
    # A podman that only shows its command line: the real one is tried below where it is installed.
    script = tmp_path / "podman"
    script.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    script.chmod(0o755)
    started = Podman(str(script)).start(Limits(), 0)
    words = started.communicate(timeout=10)[0].decode().splitlines()
    inside = [word for word in words if word.endswith(":ro") and not word.startswith("/usr/lib:")]
    assert any(word.endswith(":/python/bin/python3:ro") for word in inside)
    assert any("guest.py:/sandbox/" in word for word in inside)
    assert words[words.index("--network") + 1] == "none"
    assert {"--read-only", "--unsetenv-all", "--rm"} <= set(words)
    assert words[-1] == KEPT_COMMAND[-1]
    assert COMMAND[:-1] == KEPT_COMMAND[:-1]


def test_podman_proves_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Podman.find()
    if found is None:
        pytest.skip("no rootless podman: not installed, or the tests run as root")
    monkeypatch.setattr(proof, "FORGERIES", [item for item in FORGERIES if item.name in FILTERED])
    with Candidate(found, Limits()) as candidate:
        candidate.load("def f(): return 1", "f")
        assert candidate.call() == 1
    assert prove(found, [], Limits()).forgeries == len(FILTERED)
