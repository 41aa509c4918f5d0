"""FP8 with static activations: the scale of each input is the largest magnitude that calibration saw, over 448."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.calibration.corpus import build_tokens
from qconv.checkpoint.reader import Checkpoint
from qconv.core.qtensor import QTensor
from qconv.grids import e4m3
from qconv.verification.build import verify
from tests.conftest import build, random_model, save_model, small_recipe

RECIPE = small_recipe("rtn", "fp8_static", grid={"bits": 8, "group_size": -1}, calibration={"propagate": False})


def peaks_in_transformers(model: Any, tokens: Tensor) -> dict[str, float]:
    """The largest input magnitude of each attention projection, over all tokens."""
    peaks: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj")):

            def keep(_: Any, arguments: tuple[Tensor, ...], name: str = name) -> None:
                peaks[name] = max(peaks.get(name, 0.0), float(arguments[0].abs().max()))

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return peaks


def input_scale(weight: QTensor) -> float:
    """The scale, which must be there."""
    assert weight.input_scale is not None
    return float(weight.input_scale)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama"])
def test_scales_are_the_peaks_over_448(model_type: str, tmp_path: Path) -> None:
    model = random_model(model_type)
    folder = save_model(model, tmp_path / "model")
    build(folder, tmp_path / "out", RECIPE)
    assert not verify(tmp_path / "out", against=folder).problems
    made, source = Build.open(tmp_path / "out"), Checkpoint.open(folder)
    expected = peaks_in_transformers(model, build_tokens(RECIPE.calibration, folder).ids.long())
    for layer in made.architecture.layers:
        attention = layer.heads
        found = {linear.name: made.qtensor(linear) for linear in layer.linears()}
        for linear in (attention.q, attention.o):
            # Activations lie in bf16 between layers: a relative 2**-8 a layer, and outliers carry it on.
            assert input_scale(found[linear.name]) * 448 == pytest.approx(expected[linear.name], rel=0.03)
        gates = [linear for mlp in layer.mlps() for linear in (mlp.gate, mlp.up)]
        # Engines run q, k and v, and all experts of a layer, on one scale of their input.
        for linears in (attention.linears()[:3], gates):
            assert len({input_scale(found[linear.name]) for linear in linears}) == 1
        # Linears that engines fuse have one scale, that of the largest weight of them all.
        pairs = [(mlp.gate, mlp.up) for mlp in layer.mlps()]
        for fused in (attention.linears()[:3], (attention.o,), *pairs, *((mlp.down,) for mlp in layer.mlps())):
            weights = [source.read(linear.weight).float() for linear in fused]
            together = e4m3.quantize(torch.cat(weights), made.grid_of(fused[0]))
            ours = [found[linear.name] for linear in fused]
            assert torch.equal(
                torch.cat([one.codes for one in ours]).view(torch.uint8), together.codes.view(torch.uint8)
            )
            assert all(torch.equal(one.scales, together.scales) for one in ours)


def test_a_dense_input_that_was_always_zero_takes_the_scale_1(tmp_path: Path) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.zero_()
    folder = save_model(model, tmp_path / "model")
    build(folder, tmp_path / "out", RECIPE)
    made = Build.open(tmp_path / "out")
    assert input_scale(made.qtensor(made.architecture.layers[1].heads.q)) == 1.0
