"""compressed-tensors and transformers compute our FP8 weights bit for bit; ``test_loaders`` decodes with them.

A code has 4 significant bits, a scale 8 (bfloat16) or 24 (float32). In bfloat16 their product is exact in float32 and
rounded once, on both sides; with a float32 scale both sides round the product once to float32, and once more where a
bfloat16 is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.core.qtensor import QTensor
from qconv.core.settings import GridSettings
from qconv.formats import get_format
from qconv.grids import e4m3
from tests.interop.conftest import Client

pytestmark = pytest.mark.interop

# tiny-coder-moe: 4 layers of 4 attention projections and 16 experts of 3.
QUANTIZED_LINEARS = 4 * (4 + 16 * 3)


@pytest.mark.parametrize("fmt", ["fp8-dynamic", "fp8-static"])
def test_compressed_tensors_decompresses_our_weights_bit_for_bit(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, fmt: str
) -> None:
    made = build(fmt, "rtn")
    client("compressed-tensors", "compressed_tensors_fp8", made, tmp_path / "unpacked")
    theirs = load_file(tmp_path / "unpacked")
    for name, ours in _quantized(made).items():
        for dtype in (torch.bfloat16, torch.float32):
            _assert_same(theirs.pop(f"{name}.{_short(dtype)}"), ours, dtype, name)
    assert not theirs


@pytest.mark.parametrize(
    ("output_format", "group_size"), [("fp8_dynamic", 128), ("fp8_dynamic", -1), ("fp8_static", -1)]
)
@pytest.mark.parametrize("shape", [(256, 384), (200, 320), (100, 60)], ids=["whole", "ragged", "less than a block"])
def test_compressed_tensors_decompresses_every_strategy_and_ragged_blocks(
    client: Client, tmp_path: Path, output_format: str, group_size: int, shape: tuple[int, int]
) -> None:
    format_ = get_format(output_format)
    grid = format_.grid(GridSettings(bits=8, group_size=group_size), torch.bfloat16)
    source = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3  # over many powers of two
    weight = e4m3.quantize(source, grid, None, torch.tensor(0.5))
    save_file(dict(format_.pack("linear", weight)), tmp_path / "model.safetensors")
    config = {"quantization_config": format_.config({grid: ["linear"]}, [])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    client("compressed-tensors", "compressed_tensors_fp8", tmp_path, tmp_path / "unpacked")
    theirs = load_file(tmp_path / "unpacked")
    for dtype in (torch.bfloat16, torch.float32):
        _assert_same(theirs.pop(f"linear.{_short(dtype)}"), weight, dtype, "linear")
    assert not theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_dequantizes_our_blocks_bit_for_bit(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, dtype: torch.dtype
) -> None:
    made = build("fp8", "rtn")
    client(None, "transformers_fp8", made, _short(dtype), tmp_path / "loaded")
    with safe_open(tmp_path / "loaded", "pt") as file:
        loading = json.loads(file.metadata()["loading"])
    assert not any(loading.values()), loading
    theirs, quantized = load_file(tmp_path / "loaded"), _quantized(made)
    for name, ours in quantized.items():
        _assert_same(theirs.pop(f"{name}.weight"), ours, dtype, name)
    opened = Build.open(made)
    # What is left was never quantized: embeddings, norms, routers, head.
    for name, tensor in theirs.items():
        assert torch.equal(tensor, opened.checkpoint.read(name).to(dtype)), name
    assert theirs.keys() | {f"{name}.weight" for name in quantized} == {n for n, _ in opened.architecture.tensors()}


def _quantized(folder: Path) -> Mapping[str, QTensor]:
    made = Build.open(folder)
    linears = [linear for layer in made.architecture.layers for linear in layer.linears() if made.is_quantized(linear)]
    assert len(linears) == QUANTIZED_LINEARS
    return {linear.name: made.qtensor(linear) for linear in linears}


def _assert_same(theirs: Tensor, weight: QTensor, dtype: torch.dtype, name: str) -> None:
    ours = weight.dequantize(dtype)
    assert theirs.dtype == ours.dtype, name
    assert torch.equal(theirs.view(torch.uint8), ours.view(torch.uint8)), f"{name} as {dtype}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
