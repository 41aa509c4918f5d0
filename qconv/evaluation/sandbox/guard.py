"""Ends a process and its children together, also if qconv is killed in between.

bubblewrap's ``--die-with-parent`` takes effect some milliseconds after its start. If it dies sooner, its child waits
for it without end. So it runs in the process group of a shell that does nothing but wait for its pipe from qconv to
close, however that happens, and then kills the group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading

_WAIT_THEN_KILL = "trap '' HUP INT TERM; read _; kill -KILL 0"


class Guard:
    """A process group that does not outlive this object, nor this process."""

    def __init__(self) -> None:
        """Start the shell.

        Raises:
            OSError: it cannot be started.
        """
        null = subprocess.DEVNULL
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _WAIT_THEN_KILL], stdin=subprocess.PIPE, stdout=null, stderr=null, env={}, process_group=0
        )
        self._lock = threading.Lock()

    @property
    def group(self) -> int:
        """Its id; processes are started into it."""
        return self._shell.pid

    def end(self) -> None:
        """Kill all that is in the group. May be called again, and from any thread."""
        with self._lock:
            if self._shell.returncode is None:  # until it is waited for, its id is not given to another
                os.killpg(self._shell.pid, signal.SIGKILL)
                self._shell.wait()
                if self._shell.stdin is not None:
                    with contextlib.suppress(BrokenPipeError):
                        self._shell.stdin.close()
