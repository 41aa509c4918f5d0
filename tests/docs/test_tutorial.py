"""The tutorial, typed: every command ends with exit code 0 and prints what stands below it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.console import CHECKOUT, commands, is_shown

TUTORIAL = CHECKOUT / "docs" / "tutorial.md"
INSTALLATION = ("make install", "export ")
"""What makes the environment that this test runs in."""


@pytest.mark.slow
def test_every_command_does_what_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "evals").symlink_to(CHECKOUT / "evals")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "QCONV_CACHE": str(tmp_path / "cache"),
        "COLUMNS": "120",
    }
    bash = shutil.which("bash")
    assert bash is not None
    typed = [each for each in commands(TUTORIAL.read_text()) if not each.text.startswith(INSTALLATION)]
    assert len(typed) >= 10
    for command in typed:
        done = subprocess.run(
            [bash, "-c", command.text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command.text}\n{done.stderr}"
        assert is_shown(command.shown, done.stdout), f"{command.text}\n{done.stdout}\nis not what the page shows"
