"""AutoGPTQ, which defined the layout, computes our weights bit for bit.

As in ``test_unpacking``: a code less its zero point is an integer of at most 9 bits, its product with a float16 scale
of 11 is exact in float32, and casting that to float16 rounds once, as multiplying in float16 does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.formats.gptq import FORMAT
from tests.interop.conftest import Client

pytestmark = pytest.mark.interop

# tiny-coder-moe: 4 layers of 4 attention projections and 16 experts of 3.
QUANTIZED_LINEARS = 4 * (4 + 16 * 3)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_autogptq_computes_the_weights_of_a_build(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, method: str
) -> None:
    folder = build("gptq", method)
    client("autoawq", "autogptq_unpack", folder, tmp_path / "unpacked.safetensors")
    theirs = load_file(tmp_path / "unpacked.safetensors")

    made = Build.open(folder)
    linears = [linear for layer in made.architecture.layers for linear in layer.linears() if made.is_quantized(linear)]
    assert len(linears) == QUANTIZED_LINEARS
    for linear in linears:
        _assert_same(theirs, linear.name, made.qtensor(linear))
    assert not theirs


@pytest.mark.parametrize(("bits", "group_size"), [(2, 128), (3, 64), (4, 32), (8, CHANNEL)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_autogptq_computes_weights_of_other_grids(
    client: Client, tmp_path: Path, bits: int, group_size: int, symmetric: bool, act_order: bool
) -> None:
    weight = _random_qtensor(Grid(bits, group_size, symmetric, torch.float16, act_order=act_order), seed=bits)
    save_file(dict(FORMAT.pack("linear", weight)), tmp_path / "model.safetensors")
    config = {"quantization_config": FORMAT.config({weight.grid: ["linear"]}, [])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    client("autoawq", "autogptq_unpack", tmp_path, tmp_path / "unpacked")
    theirs = load_file(tmp_path / "unpacked")
    _assert_same(theirs, "linear", weight)
    assert not theirs


def _random_qtensor(grid: Grid, seed: int) -> QTensor:
    """Random codes and scales over their range, and zero points from 1, the least that AutoGPTQ can hold."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = 96, 256
    groups = grid.groups(in_features)
    codes = torch.randint(0, grid.levels, (out_features, in_features), generator=generator).byte()
    scales = (0.001 + 0.1 * torch.rand(out_features, groups, generator=generator)).half()
    zero_points = torch.randint(1, grid.levels, (out_features, groups), generator=generator).byte()
    shuffled = torch.randperm(in_features, generator=generator)
    group_index = (shuffled // grid.width(in_features)).to(torch.int32) if grid.act_order else None
    return QTensor(grid, codes, scales, None if grid.symmetric else zero_points, group_index)


def _assert_same(theirs: dict[str, Tensor], name: str, ours: QTensor) -> None:
    """The same bits in the dtype of the scales and in float32; takes what it compared out of ``theirs``."""
    for dtype in (torch.float16, torch.float32):
        weight, expected = theirs.pop(f"{name}.{str(dtype).removeprefix('torch.')}"), ours.dequantize(dtype)
        assert weight.dtype == expected.dtype, name
        assert torch.equal(weight.view(torch.uint8), expected.view(torch.uint8)), f"{name} as {dtype}"
