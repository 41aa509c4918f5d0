"""podman, rootless, where there is no bubblewrap: the same view of the machine in a container without an image."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from qconv.evaluation.sandbox.inside import ENVIRONMENT, KEPT_COMMAND, hidden_folders, mounts
from qconv.evaluation.sandbox.limits import Limits


@dataclass(frozen=True, slots=True)
class Podman:
    """Starts guests with ``podman run --rootfs`` on an empty folder, into which everything is mounted.

    A container does not end with the podman that started it, but its standard input does: the guest is kept by a
    process that ends the container then (``guest.keep``).
    """

    executable: str
    name: str = "podman"
    _root: str = field(default_factory=lambda: _empty_root(), repr=False)

    @classmethod
    def find(cls) -> Podman | None:
        """The installed one, or None; root's podman is not rootless."""
        executable = shutil.which("podman")
        return cls(executable) if executable and os.geteuid() != 0 else None

    def start(self, limits: Limits, group: int) -> subprocess.Popen[bytes]:
        """See :class:`~qconv.evaluation.sandbox.candidate.Backend`.

        Raises:
            OSError: podman cannot be executed.
        """
        return subprocess.Popen(
            [self.executable, *self._options(limits), "--rootfs", self._root, *KEPT_COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            process_group=group,
        )

    def _options(self, limits: Limits) -> list[str]:
        options = ["run", "--rm", "--interactive", "--log-driver", "none", "--timeout", str(limits.longest_seconds)]
        options += ["--network", "none", "--ipc", "none", "--pid", "private", "--uts", "private"]
        options += ["--hostname", "sandbox", "--no-hosts", "--passwd=false", "--unsetenv-all", "--user", "65534:65534"]
        options += [
            "--cap-drop",
            "all",
            "--cap-add",
            "sys_admin",
            "--security-opt",
            "no-new-privileges",
            "--security-opt",
            "mask=/sys",
        ]
        options += ["--read-only", "--read-only-tmpfs=false", "--ulimit", "nofile=64:64", "--ulimit", "nproc=64:64"]
        options += ["--tmpfs", f"/tmp:rw,nosuid,nodev,size={limits.disk},mode=1777,notmpcopyup", "--workdir", "/tmp"]
        for source, target in mounts():
            options += ["--volume", f"{source}:{target}:ro"]
        for folder in hidden_folders():
            options += ["--tmpfs", f"{folder}:ro,size=4096,notmpcopyup"]
        for key, value in ENVIRONMENT.items():
            options += ["--env", f"{key}={value}"]
        return options


def _empty_root() -> str:
    root = Path(tempfile.mkdtemp(prefix="qconv-sandbox-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    # The candidate's user is not the one who owns it; a mount takes the mode of the folder under it.
    root.chmod(0o755)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    return str(root)
