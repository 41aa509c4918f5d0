"""Whole models through the CUDA backend with the emulator in the place of the device."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import qconv
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.runtime import loading
from qconv.runtime.backends import Backend, get_backend
from qconv.runtime.backends.cuda.backend import CudaBackend
from qconv.runtime.backends.cuda.operators import CudaExperts, CudaLinear
from qconv.runtime.modules import PackedExperts, PackedLinear
from tests.conftest import build, small_recipe
from tests.kernels.launchers import EmulatorLauncher

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++"),
]

IDS = torch.arange(100, 109).view(1, -1)
BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "awq": ("awq", {"grid": {"group_size": 128}}),
    "gptq": ("gptq", {"grid": {"group_size": 64, "symmetric": False}}),
    "act-order": ("gptq", {"method": "gptq", "grid": {"group_size": 32}, "gptq": {"ordering": "desc_act"}}),
    "w4a16": ("w4a16", {"grid": {"group_size": -1}}),
    "fp8": ("fp8", {"grid": {"bits": 8, "group_size": 128}}),
}


def with_emulator(monkeypatch: pytest.MonkeyPatch) -> EmulatorLauncher:
    """Let ``qconv.load(backend="cuda")`` use the emulator; returns its launcher."""
    launcher = EmulatorLauncher(multiprocessors=8, check=False)
    backend = CudaBackend(torch.device("cpu"), launcher)

    def chosen(name: str, device: torch.device | str | None) -> Backend:
        return backend if name == "cuda" else get_backend(name, device)

    monkeypatch.setattr(loading, "get_backend", chosen)
    return launcher


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(IDS).logits
    return output.double()


def assert_computes(path: Path) -> None:
    """Every packed module is on the kernels, and what they compute is as near to float32 as torch's float16 is."""
    model = qconv.load(path, backend="cuda", dtype="float16")
    operators = [module.operator for module in model.modules() if isinstance(module, (PackedLinear, PackedExperts))]
    assert operators
    assert all(isinstance(operator, (CudaLinear, CudaExperts)) for operator in operators)
    exact = logits(qconv.load(path, backend="reference", dtype="float32"))
    rounded = logits(qconv.load(path, backend="reference", dtype="float16"))
    ours = logits(model)
    # Attention, norms and router round to float16 in both; of the products, ours round only inputs and outputs.
    assert float((ours - exact).norm()) < 1.5 * float((rounded - exact).norm())
    assert torch.equal(ours.argmax(-1), exact.argmax(-1))


@pytest.mark.parametrize("name", BUILDS)
def test_a_build_of_every_format(name: str, bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output_format, changes = BUILDS[name]
    changes = dict(changes)
    out = build(bundled, tmp_path / "build", small_recipe(changes.pop("method", "rtn"), output_format, **changes)).out
    launcher = with_emulator(monkeypatch)
    assert_computes(out)
    gathers = sum(launch.kernel == "qconv_gather_columns" for launch in launcher.launches)
    assert (gathers > 0) == (name == "act-order")


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "Q6_K"])
def test_a_gguf_file(file_type: str, bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
    quantize_gguf(bundled, tmp_path / "gguf", GgufRecipe(type=file_type), **values)
    with_emulator(monkeypatch)
    assert_computes(tmp_path / "gguf")


def test_generates_with_a_cache_and_a_batch(bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = build(bundled, tmp_path / "build", small_recipe("rtn", "awq", grid={"group_size": 128})).out
    launcher = with_emulator(monkeypatch)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    batch = torch.arange(60).view(3, 20)
    answer = qconv.load(out, backend="cuda", dtype="float16").generate(batch, **options)
    assert torch.equal(answer, qconv.load(out, backend="reference", dtype="float32").generate(batch, **options))
    kernels = {launch.kernel for launch in launcher.launches}
    assert {"qconv_awq_m64_f16", "qconv_awq_m8_f16"} <= kernels  # 60 tokens at first, then 3
