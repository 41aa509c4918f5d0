"""What a shell is offered."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from qconv.cli.main import qconv


def offered(*words: str, incomplete: str) -> list[str]:
    found = ShellComplete(qconv, {}, "qconv", "_QCONV_COMPLETE").get_completions([*words], incomplete)
    return [item.value for item in found]


@pytest.mark.parametrize(
    ("words", "incomplete", "names"),
    [
        ((), "qu", {"quantize"}),
        (("eval",), "r", {"reference", "run", "report"}),
        (("quantize", "MODEL"), "--targ", {"--target-size", "--target-bits"}),
        (("quantize", "MODEL", "--fmt"), "nvfp4", {"nvfp4", "nvfp4-w4a4", "nvfp4-modelopt"}),
        (("quantize", "MODEL", "--fmt"), "gguf:Q4_K", {"gguf:Q4_K_M", "gguf:Q4_K_S"}),
        (("plan", "MODEL", "--recipe"), "w4a16-f", {"w4a16-fp8"}),
        (("eval", "run", "BUILD", "--suite"), "sm", {"smoke"}),
        (("check", "BUILD", "--engine"), "vl", {"vllm"}),
    ],
)
def test_names_are_offered(words: tuple[str, ...], incomplete: str, names: set[str]) -> None:
    assert set(offered(*words, incomplete=incomplete)) == names


def test_where_no_name_begins_so_files_are_completed() -> None:
    found = ShellComplete(qconv, {}, "qconv", "_QCONV_COMPLETE").get_completions(["plan", "M", "--recipe"], "./my")
    assert [item.type for item in found] == ["file"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from qconv.cli.main import main; main()"],
        env={**os.environ, "_QCONV_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "_qconv_completion" in done.stdout
