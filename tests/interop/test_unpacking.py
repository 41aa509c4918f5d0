"""The archived and the current definition of each format read our codes, and compute our weights bit for bit.

In which dtype: a weight is ``(code - zero_point) * scale`` with an integer of at most 5 bits and a scale of 11
(float16) or 8 (bfloat16) significant bits. Their product has at most 16, so it is exact in float32, where qconv
computes it; casting it to the scale's dtype rounds once. AutoAWQ and compressed-tensors multiply in the scale's dtype,
which rounds the same exact product once. So both dtypes must agree in every bit: the scale's, in which those two really
compute, and float32, which hides no difference behind a rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.core.qtensor import QTensor
from tests.interop.conftest import Client

pytestmark = pytest.mark.interop

# tiny-coder-moe: 4 layers of 4 attention projections and 16 experts of 3.
QUANTIZED_LINEARS = 4 * (4 + 16 * 3)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_autoawq_unpacks_our_weights_bit_for_bit(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, method: str
) -> None:
    made = build("awq", method)
    client("autoawq", "autoawq_unpack", made, tmp_path / "unpacked.safetensors")
    theirs = load_file(tmp_path / "unpacked.safetensors")

    for name, ours in _quantized(made):
        assert ours.zero_points is not None
        assert torch.equal(theirs.pop(f"{name}.codes"), ours.codes), name
        assert torch.equal(theirs.pop(f"{name}.zero_points"), ours.zero_points), name
        for dtype in (torch.float16, torch.float32):
            _assert_same_bits(theirs.pop(f"{name}.{_short(dtype)}"), ours.dequantize(dtype), name)
    assert not theirs


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_compressed_tensors_decompresses_our_weights_bit_for_bit(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, method: str
) -> None:
    made = build("w4a16", method)
    client("compressed-tensors", "compressed_tensors_unpack", made, tmp_path / "unpacked.safetensors")
    theirs = load_file(tmp_path / "unpacked.safetensors")

    for name, ours in _quantized(made):
        # compressed-tensors counts codes from the middle of the grid, a QTensor from its low end.
        assert torch.equal(theirs.pop(f"{name}.codes").int() + ours.grid.mid, ours.codes.int()), name
        for dtype in (torch.bfloat16, torch.float32):
            _assert_same_bits(theirs.pop(f"{name}.{_short(dtype)}"), ours.dequantize(dtype), name)
    assert not theirs


def _quantized(folder: Path) -> Iterator[tuple[str, QTensor]]:
    made = Build.open(folder)
    linears = [linear for layer in made.architecture.layers for linear in layer.linears() if made.is_quantized(linear)]
    assert len(linears) == QUANTIZED_LINEARS
    for linear in linears:
        yield linear.name, made.qtensor(linear)


def _assert_same_bits(theirs: Tensor, ours: Tensor, name: str) -> None:
    assert theirs.dtype == ours.dtype, name
    assert torch.equal(theirs.view(torch.uint8), ours.view(torch.uint8)), f"{name} as {ours.dtype}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
