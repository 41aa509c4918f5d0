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
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.core.qtensor import Grid, QTensor
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


@pytest.mark.parametrize(
    ("fmt", "method"), [("w4a16", "rtn"), ("w4a16", "awq"), ("w4a16", "gptq"), ("w4a16-asym", "gptq")]
)
def test_compressed_tensors_decompresses_our_weights_bit_for_bit(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, fmt: str, method: str
) -> None:
    made = build(fmt, method)
    client("compressed-tensors", "compressed_tensors_unpack", made, tmp_path / "unpacked.safetensors")
    theirs = load_file(tmp_path / "unpacked.safetensors")

    for name, ours in _quantized(made):
        # compressed-tensors counts codes from the middle of the grid, a QTensor from its low end.
        assert torch.equal(theirs.pop(f"{name}.codes").int() + ours.grid.mid, ours.codes.int()), name
        assert (ours.zero_points is not None) == (fmt == "w4a16-asym")
        if ours.zero_points is not None:
            found = theirs.pop(f"{name}.zero_points").int() + ours.grid.mid
            assert torch.equal(found, ours.zero_points.int()), name
        for dtype in (torch.bfloat16, torch.float32):
            _assert_same_bits(theirs.pop(f"{name}.{_short(dtype)}"), ours.dequantize(dtype), name)
    assert not theirs


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("fmt", ["w8a8", "w4a8", "w4a16-fp8"])
def test_compressed_tensors_decompresses_what_comes_with_rounded_inputs(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, fmt: str, method: str
) -> None:
    made = build(fmt, method)
    client("compressed-tensors", "compressed_tensors_groups", made, tmp_path / "unpacked.safetensors")
    theirs = load_file(tmp_path / "unpacked.safetensors")
    for name, ours in _quantized(made):
        _assert_same_bits(theirs.pop(name), ours.dequantize(torch.float32), name)
    assert not theirs


MIXTURES: list[dict[str, Any]] = [
    {"format": "w4a16", "rules": [{"match": "self_attn.*", "grid": "int8-channel"}]},
    {
        "format": "w4a16",
        "grid": {"group_size": 64},
        "rules": [
            {"match": "layers.[12].self_attn.*", "grid": "fp8-channel"},
            {"match": "self_attn.o_proj", "grid": "fp8-block"},
            {"match": "layers.3.mlp.experts.*", "grid": "int8-g32-asym"},
        ],
    },
]


@pytest.mark.parametrize("values", MIXTURES, ids=["one layout", "two layouts, by layers"])
def test_compressed_tensors_gives_every_linear_of_a_mixture_its_scheme(
    build_recipe: Callable[[dict[str, Any]], Path], client: Client, tmp_path: Path, values: dict[str, Any]
) -> None:
    made = build_recipe({"method": "rtn", **values})
    client("compressed-tensors", "compressed_tensors_groups", made, tmp_path / "unpacked.safetensors")
    theirs, grids = load_file(tmp_path / "unpacked.safetensors"), set()
    for name, ours in _quantized(made):
        grids.add(ours.grid)
        _assert_same_bits(theirs.pop(name), ours.dequantize(torch.float32), name)
    assert not theirs
    assert len(grids) == (2 if len(values["rules"]) == 1 else 4)


def test_compressed_tensors_gives_every_linear_its_chosen_scheme(
    build_to_bits: Callable[..., Path], client: Client, tmp_path: Path
) -> None:
    """Layers differ in all that engines hold as one: q, k, v; o; the experts."""
    made = build_to_bits(4.58)
    client("compressed-tensors", "compressed_tensors_groups", made, tmp_path / "unpacked.safetensors")
    theirs = load_file(tmp_path / "unpacked.safetensors")
    of_experts, of_attention = set[Grid](), set[Grid]()
    for name, ours in _quantized(made):
        (of_experts if ".experts." in name else of_attention).add(ours.grid)
        _assert_same_bits(theirs.pop(name), ours.dequantize(torch.float32), name)
    assert not theirs
    assert len(of_experts) > 1
    assert {grid.bits for grid in of_experts | of_attention} == {4, 8}


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
