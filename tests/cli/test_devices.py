"""``--devices`` of the commands: where they compute, what they say when that is not there, and the former name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import accelerator
from tests.cli.conftest import Invoke
from tests.conftest import folder_bytes, random_model, save_model

TEXT = ("--tokens", 128, "--sequence-length", 32)


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    accelerator.load()


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model whose routing llama.cpp can express."""
    return save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path_factory.mktemp("sparse") / "model")


def test_quantize_and_imatrix_compute_there(invoke: Invoke, sparse: Path, tmp_path: Path) -> None:
    """The processor's bytes, and the work of devices."""
    commands = {
        "awq": ("quantize", sparse, "--fmt", "awq", "--group-size", 32),
        "gguf": ("quantize", sparse, "--fmt", "gguf:Q4_0", "--calib", "python-stdlib"),
        "both": ("quantize", sparse, "--fmt", "awq", "--fmt", "w4a16", "--group-size", 32),
        "imatrix": ("imatrix", sparse),
    }
    for name, command in commands.items():
        before = [accelerator.counters(index).launches for index in range(2)]
        for devices in ("cpu", "emu:0,1"):
            given = invoke(*command, *TEXT, "--devices", devices, "-o", tmp_path / devices / name)
            assert given.exit_code == 0, given.stderr
        assert folder_bytes(tmp_path / "emu:0,1" / name) == folder_bytes(tmp_path / "cpu" / name)
        assert all(accelerator.counters(index).launches > before[index] + 100 for index in range(2))


@pytest.mark.parametrize(
    "command", [("quantize", "--fmt", "awq", "--group-size", "32"), ("imatrix",), ("quantize", "--fmt", "gguf:Q4_0")]
)
@pytest.mark.parametrize(("devices", "said"), [("emu:7", "there is no emu:7"), ("warp", "warp"), ("emu:0,0", "twice")])
def test_a_device_that_is_not_there_is_wrong_usage(
    command: tuple[str, ...], devices: str, said: str, invoke: Invoke, sparse: Path, tmp_path: Path
) -> None:
    given = invoke(command[0], sparse, *command[1:], "--devices", devices, "-o", tmp_path / "out")
    assert given.exit_code == 2
    assert said in given.stderr
    assert not (tmp_path / "out").exists()


def test_generate_takes_one_and_the_former_name_says_the_new_one(invoke: Invoke, build: Path) -> None:
    arguments = ("generate", build, "--prompt", "def f(", "--max-tokens", 2, "--backend", "reference")
    expected = invoke(*arguments, "--devices", "cpu")
    before = accelerator.counters(1).launches
    there = invoke(*arguments, "--devices", "emu:1")
    assert there.stdout == expected.stdout
    assert accelerator.counters(1).launches > before
    former = invoke(*arguments, "--device", "cpu")
    assert former.stdout == expected.stdout
    assert "--device is --devices now" in former.stderr
    assert "--device is" not in expected.stderr
    several = invoke(*arguments, "--devices", "emu:0,1")
    assert several.exit_code == 2
    assert "one device" in several.stderr
    assert "--device " not in invoke("generate", "--help").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_is_the_processor_without_a_gpu(invoke: Invoke, build: Path) -> None:
    given = invoke("generate", build, "--prompt", "def f(", "--max-tokens", 2, "--devices", "auto")
    assert given.exit_code == 0, given.stderr


def test_eval_s_option_has_the_new_name_too(invoke: Invoke) -> None:
    for command in ("run", "compare", "reference", "blame"):
        shown = invoke("eval", command, "--help").stdout
        assert "--devices" in shown
        assert "--device " not in shown


def test_plan_models_a_device_s_memory(invoke: Invoke, sparse: Path) -> None:
    arguments = ("plan", sparse, "--fmt", "gptq", "--group-size", 32)
    needed = json.loads(invoke(*arguments, "--json").stdout)["modelled_device_bytes"]
    assert needed > 0
    assert "device" not in invoke(*arguments).stdout
    assert "of each device's memory (modelled" in invoke(*arguments, "--devices", "emu").stdout
    with accelerator.capped(1, needed // 2):
        shown = invoke(*arguments, "--devices", "emu").stdout
    assert "emu:1 has" in shown
    assert "emu:0 has" not in shown
    rounding = ("plan", sparse, "--fmt", "w4a16", "--method", "rtn", "--group-size", 32, "--devices", "emu")
    assert "rounded on the processor" in invoke(*rounding).stdout
