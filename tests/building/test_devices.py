"""Builds calibrated on devices: on one and on two the bytes of the CPU's, wherever a run is stopped and goes on."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.building import arithmetic
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.imatrix_pipeline import write_model_imatrix
from qconv.building.pipeline import quantize
from qconv.building.several_pipeline import quantize_several
from qconv.calibration import squares
from qconv.core.devices import CPU, Lending
from qconv.core.settings import TextSettings
from qconv.errors import ResourceError, StaleJournalError, UsageError
from qconv.folders.journal import WORK_FOLDER
from qconv.folders.state import REPORT_NAME
from qconv.planning.gguf_recipe import GgufRecipe, parse_gguf_recipe
from qconv.planning.recipe import Recipe
from tests import accelerator
from tests.conftest import REPOSITORY, folder_bytes, random_model, save_model, small_recipe
from tests.gguf_families import MODELS

TEXT = {"tokens": 128, "sequence_length": 32, "shrinkage_tokens": 16}
REFINED = {"refine": {"sweeps": 1, "refits": 1}}
RECIPES: dict[str, Recipe | GgufRecipe] = {
    "awq": small_recipe("awq", "awq"),
    "gptq": small_recipe("gptq", "gptq"),
    "gptq-refined-matched": small_recipe("gptq", "gptq", calibration={"propagate": "matched"}, **REFINED),
    "gptq-desc-act": small_recipe("gptq", "gptq", gptq={"ordering": "desc_act"}),
    "awq+gptq": small_recipe("awq+gptq", "w4a16"),
    "nvfp4-gptq": small_recipe("gptq", "nvfp4", grid={"bits": 4, "group_size": 16}),
    "fp8-static": small_recipe("rtn", "fp8_static", grid={"bits": 8, "group_size": -1}),
    "gguf-gptq": parse_gguf_recipe({"type": "Q4_0", "calibration": TEXT, **REFINED}),
    "gguf-imatrix": parse_gguf_recipe({"type": "IQ4_NL", "method": "rtn", "calibration": TEXT}),
    "all-experts": small_recipe("gptq", "gptq", calibration={"routing": "all-experts", "token_weights": "router"}),
}
DEVICES = ("emu:0", "emu:0,1")


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    accelerator.load()


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model whose routing llama.cpp can express."""
    return save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path_factory.mktemp("sparse") / "model")


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with attention of single operations, which the pretended device can take gradients back through."""
    model = random_model("gpt_oss", num_local_experts=6, num_experts_per_tok=2)
    return save_model(model, tmp_path_factory.mktemp("eager") / "model")


def make(model: Path, out: Path, recipe: Recipe | GgufRecipe, **options: Any) -> dict[str, bytes]:
    """Every file of a build."""
    given: Mapping[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None, **options}
    if isinstance(recipe, GgufRecipe):
        return folder_bytes(quantize_gguf(model, out, recipe, **given).out)
    return folder_bytes(quantize(model, out, recipe, **given).out)


@pytest.fixture(scope="module")
def on_cpu(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """Gives the processor's build of a recipe by name."""
    made: dict[str, dict[str, bytes]] = {}

    def of(name: str) -> dict[str, bytes]:
        if name not in made:
            made[name] = make(sparse, tmp_path_factory.mktemp(name) / "out", RECIPES[name])
        return made[name]

    return of


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", RECIPES)
def test_a_build_has_the_cpu_s_bytes(
    name: str, devices: str, sparse: Path, on_cpu: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    before = [accelerator.counters(index) for index in range(2)]
    assert make(sparse, tmp_path / "out", RECIPES[name], devices=devices) == on_cpu(name)
    used = [(accelerator.counters(index) - before[index]).launches for index in range(2)]
    assert used[0] > 300
    assert (used[1] > 300) == (devices == "emu:0,1")


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next", "gpt_oss", "llama4_text", "glm4_moe"])
def test_other_attention_shared_experts_and_routers(name: str, tmp_path: Path) -> None:
    """Latent and linear attention, sinks and biases, factors on inputs, experts that all tokens see."""
    kind, changes = MODELS[name]
    model = save_model(random_model(kind, **changes), tmp_path / "model")
    recipe = small_recipe("gptq", "w4a16")
    assert make(model, tmp_path / "emu", recipe, devices="emu:0,1") == make(model, tmp_path / "cpu", recipe)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_make_no_difference(
    threads: int, sparse: Path, on_cpu: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    made = make(sparse, tmp_path / "out", RECIPES["awq+gptq"], devices="emu:0,1", threads=threads)
    assert made == on_cpu("awq+gptq")


def test_what_a_layer_makes_stays_on_the_device_while_it_fits(
    sparse: Path, on_cpu: Callable[[str], dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it lies in files, as on the processor; the bytes are the same."""
    work, copied = tmp_path / "out" / WORK_FOLDER, []

    def look(*_: object) -> None:
        assert (work / "middle.bin").exists() != has_room

    for has_room in (True, False):
        monkeypatch.setattr(Lending, "has_room", lambda *_, fits=has_room: fits)
        before = accelerator.counters(0)
        options: Mapping[str, Any] = {"devices": "emu:0", "restart": True, "threads": 1}
        made = make(sparse, tmp_path / "out", RECIPES["awq"], **options, progress=look_once(look))
        assert made == on_cpu("awq")
        copied.append(accelerator.counters(0) - before)
    resident, in_files = copied
    assert resident.bytes_to_device < in_files.bytes_to_device


def look_once(look: Callable[..., None]) -> Callable[..., None]:
    """Looks when a layer's modules come."""

    def progress(what: str, *_: object) -> None:
        if "layer" in what and "check" not in what:
            told.append(what)
        if len(told) == 8:
            look()

    told: list[str] = []
    return progress


BUDGETS = {
    "awq": {"to_device": 1000, "to_host": 1200, "waits": 2130, "launches": 62000, "bytes_to_device": 3_800_000},
    "gptq": {"to_device": 330, "to_host": 650, "waits": 985, "launches": 59000, "bytes_to_device": 3_400_000},
    "awq+gptq": {"to_device": 720, "to_host": 1370, "waits": 2060, "launches": 100_000, "bytes_to_device": 3_600_000},
    "gguf-gptq": {"to_device": 565, "to_host": 1360, "waits": 1885, "launches": 9000, "bytes_to_device": 6_800_000},
}
"""As measured of two layers of six experts, the arithmetic's digest included, and a hundredth more: a copy, wait or
operation that comes to each expert shows."""


@pytest.mark.parametrize("name", BUDGETS)
def test_copies_waits_and_launches_keep_to_their_budgets(name: str, sparse: Path, tmp_path: Path) -> None:
    before = accelerator.counters(0)
    make(sparse, tmp_path / "out", RECIPES[name], devices="emu:0", threads=1)
    used = accelerator.counters(0) - before
    assert {key: getattr(used, key) for key, most in BUDGETS[name].items() if getattr(used, key) > most} == {}
    # Experts' weights come through pinned memory: three linears of six experts in two layers, again in AWQ's search.
    assert used.to_device - used.pageable == (72 if "awq" in name else 36)


def test_several_builds_of_one_calibration(sparse: Path, tmp_path: Path) -> None:
    recipes = {name: RECIPES[name] for name in ("awq", "gguf-gptq", "gguf-imatrix", "gptq")}
    given: Mapping[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
    quantize_several(sparse, tmp_path / "cpu", recipes, **given)
    quantize_several(sparse, tmp_path / "emu", recipes, devices="emu:0,1", **given)
    assert folder_bytes(tmp_path / "emu") == folder_bytes(tmp_path / "cpu")


def test_an_importance_matrix_has_the_cpu_s_bytes(sparse: Path, tmp_path: Path) -> None:
    text = TextSettings(tokens=128, sequence_length=32)
    given: Mapping[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
    for devices in ("cpu", *DEVICES):
        write_model_imatrix(sparse, tmp_path / devices, text, devices=devices, **given)
    assert folder_bytes(tmp_path / "emu:0") == folder_bytes(tmp_path / "emu:0,1") == folder_bytes(tmp_path / "cpu")


_SENSITIVITY = """
import sys
from pathlib import Path
from qconv.building.sensitivity_pipeline import measure_sensitivity
from qconv.core.settings import TextSettings
from tests import accelerator

accelerator.load()
model, out, gradients = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"
given = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None, "gradients": gradients}
for devices in ("cpu", "emu:0", "emu:0,1"):
    measure_sensitivity(model, out / devices, TextSettings(tokens=128, sequence_length=32), devices=devices, **given)
assert accelerator.counters(1).launches > 100
"""
"""Once torch has taken a gradient it takes none on devices that became known since: hence in a process of its own."""


@pytest.mark.parametrize("gradients", [True, False])
def test_a_sensitivity_has_the_cpu_s_bytes(gradients: bool, eager: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SENSITIVITY, str(eager), str(tmp_path), str(gradients)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr
    assert folder_bytes(tmp_path / "emu:0") == folder_bytes(tmp_path / "emu:0,1") == folder_bytes(tmp_path / "cpu")


def test_an_expert_with_many_tokens_is_passed_in_windows(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(squares, "WHOLE_TOKENS", 16)
    monkeypatch.setattr(squares, "WINDOW_TOKENS", 32)
    text = TextSettings(tokens=128, sequence_length=32)
    given: Mapping[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
    for devices in ("cpu", "emu:0,1"):
        write_model_imatrix(sparse, tmp_path / devices, text, devices=devices, **given)
    assert folder_bytes(tmp_path / "emu:0,1") == folder_bytes(tmp_path / "cpu")


class Stop(Exception):
    """The plug is pulled."""


def stopping(after: int) -> Callable[..., None]:
    """Pulls it when it was told of progress so often."""
    told = iter(range(after))

    def progress(*_: object) -> None:
        if next(told, None) is None:
            raise Stop

    return progress


@pytest.mark.parametrize("name", ["awq+gptq", "gguf-gptq"])
def test_a_run_moves_between_devices_of_the_same_arithmetic(
    name: str, sparse: Path, on_cpu: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    stops = 0
    for devices in ("emu:0,1", "cpu", "emu:1"):
        try:
            make(sparse, tmp_path / "out", RECIPES[name], devices=devices, progress=stopping(28))
        except Stop:
            stops += 1
    assert stops == 3
    assert make(sparse, tmp_path / "out", RECIPES[name], devices="emu:0") == on_cpu(name)


def nudged(monkeypatch: pytest.MonkeyPatch, *devices: str) -> None:
    """Have devices compute something else."""
    real = arithmetic.digest
    others = {torch.device(name) for name in devices}

    def digest(device: torch.device = CPU) -> str:
        return "0123456789abcdef" if device in others else real(device)

    monkeypatch.setattr(arithmetic, "digest", digest)


def test_another_arithmetic_is_refused_by_name_or_begun_anew(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = RECIPES["gptq"], tmp_path / "out"
    with pytest.raises(Stop):
        make(sparse, out, recipe, progress=stopping(20))
    nudged(monkeypatch, "emu:0")
    with pytest.raises(StaleJournalError, match=r"arithmetic.*emu:0") as refused:
        make(sparse, out, recipe, devices="emu:0")
    assert "--restart" in str(refused.value)
    report = json.loads(make(sparse, out, recipe, devices="emu:0", restart=True)[REPORT_NAME])
    assert report["fingerprints"]["arithmetic"].endswith(" emu=0123456789abcdef")


def test_devices_of_unlike_arithmetic_are_refused(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nudged(monkeypatch, "emu:1")
    with pytest.raises(UsageError, match=r"emu:0 .*and emu:1 .*other last bits"):
        make(sparse, tmp_path / "out", RECIPES["gptq"], devices="emu:0,1")


def test_a_device_s_memory_is_given_back(sparse: Path, tmp_path: Path) -> None:
    gc.collect()
    before = torch.accelerator.memory_allocated(0)
    make(sparse, tmp_path / "out", RECIPES["gptq"], devices="emu:0")
    gc.collect()
    assert torch.accelerator.memory_allocated(0) == before


def test_a_device_without_memory_is_told(sparse: Path, tmp_path: Path) -> None:
    full = accelerator.capped(1, torch.accelerator.memory_allocated(1) + 2**16)
    with full, pytest.raises(ResourceError, match="emu:1 has no memory left"):
        make(sparse, tmp_path / "out", RECIPES["gptq"], devices="emu:1")


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_too_small_a_memory_is_told_with_what_plan_models(
    share: float, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In attention and where there is room for that alone; nothing is lost: the processor goes on."""
    recipe, digest = RECIPES["gptq"], arithmetic.digest()
    monkeypatch.setattr(arithmetic, "digest", lambda *_: digest)  # which takes more than so small a model
    gc.collect()
    accelerator.reset_peak(0)
    expected = make(sparse, tmp_path / "whole", recipe, devices="emu:0", threads=1)
    gc.collect()
    left = torch.accelerator.memory_allocated(0)
    capped = accelerator.capped(0, left + int(share * (accelerator.peak(0) - left)))
    with capped, pytest.raises(ResourceError, match="does not fit into the memory of emu:0") as told:
        make(sparse, tmp_path / "out", recipe, devices="emu:0", threads=1)
    assert "plan models" in str(told.value)
    assert make(sparse, tmp_path / "out", recipe) == expected
