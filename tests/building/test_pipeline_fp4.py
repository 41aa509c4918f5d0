"""Whole builds of NVFP4, MXFP4 and MXFP8: made, interrupted, verified, run; what engines fuse shares global scales."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.inspection import inspect
from qconv.artifacts.source import Source
from qconv.grids.fp4 import Nvfp4Grid, global_scale, largest_magnitude
from qconv.planning.estimate import estimate
from qconv.planning.recipe import Recipe
from qconv.planning.schemes import matrices
from qconv.runtime.dense import write_dense
from qconv.runtime.engine_rounding import rounds_inputs
from qconv.runtime.files import open_files
from qconv.verification.build import verify
from tests.building.test_pipeline import Stop
from tests.conftest import GRIDS, build, folder_bytes, small_recipe
from tests.runtime.test_files import logits
from tests.verification.test_build import edit

MATCHED: dict[str, Any] = {"refine": {"sweeps": 1, "refits": 1}, "calibration": {"propagate": "matched"}}
MIXED: list[dict[str, Any]] = [
    {"match": "self_attn.*", "grid": "fp8-channel", "method": "rtn"},
    {"match": "layers.1.mlp.experts.*", "grid": "mxfp4"},
    {"match": "o_proj", "grid": "mxfp8"},
]


def recipe(output_format: str, method: str = "gptq", **changes: Any) -> Recipe:
    return small_recipe(method, output_format, grid=GRIDS[output_format], **changes)


KINDS: dict[str, Recipe] = {
    "nvfp4 rtn": recipe("nvfp4", "rtn"),
    "nvfp4": recipe("nvfp4", **MATCHED),
    "nvfp4-w4a4 rtn": recipe("nvfp4_w4a4", "rtn"),
    "nvfp4-w4a4": recipe("nvfp4_w4a4", **MATCHED),
    "nvfp4-modelopt": recipe("nvfp4_modelopt", **MATCHED),
    "mxfp4": recipe("mxfp4", **MATCHED),
    "mxfp8": recipe("mxfp8", **MATCHED),
    "mixed": recipe("nvfp4_w4a4", rules=MIXED),
}
SCHEME = {"nvfp4": "NVFP4", "mxfp4": "MXFP4", "mxfp8": "MXFP8", "mixed": "NVFP4, gptq"}


@pytest.fixture(scope="module")
def made(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of :data:`KINDS`; do not write to them."""
    folder = tmp_path_factory.mktemp("fp4")
    return {name: build(moe, folder / name.replace(" ", "-"), one).out for name, one in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_verifies(kind: str, made: dict[str, Path], moe: Path) -> None:
    assert verify(made[kind]).problems == []
    result = verify(made[kind], moe)
    assert (result.problems, result.notices) == ([], [])
    assert len(result.snr_db) == 2 * (4 + 6 * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_or_on_other_threads_the_bytes_are_the_same(
    kind: str, made: dict[str, Path], moe: Path, tmp_path: Path
) -> None:
    def stop(key: str, *_: int) -> None:
        if key == "layer-00001":
            raise Stop

    with pytest.raises(Stop):
        build(moe, tmp_path / "out", KINDS[kind], progress=stop)
    build(moe, tmp_path / "out", KINDS[kind], threads=1)
    assert folder_bytes(tmp_path / "out") == folder_bytes(made[kind])


@pytest.mark.parametrize("kind", ["nvfp4 rtn", "nvfp4", "nvfp4-w4a4", "nvfp4-modelopt"])
def test_what_engines_fuse_shares_a_global_scale_and_experts_differ(
    kind: str, made: dict[str, Path], moe: Path
) -> None:
    opened, source = Build.open(made[kind]), Source.open(moe)
    found = set()
    for layer in opened.architecture.layers:
        for linears in matrices(layer):
            largest = largest_magnitude(source.read(linear.weight) for linear in linears)
            assert {opened.qtensor(linear).global_scale for linear in linears} == {global_scale(largest)}
        found |= {opened.qtensor(linear).global_scale for linear in layer.linears()}
    assert len(found) > 1


def test_rounded_alone_a_weight_is_what_the_grid_makes_of_it(made: dict[str, Path], moe: Path) -> None:
    opened, source = Build.open(made["nvfp4 rtn"]), Source.open(moe)
    for layer in opened.architecture.layers:
        for linears in matrices(layer):
            weights = [source.read(linear.weight) for linear in linears]
            shared = Nvfp4Grid(search=False).shared(largest_magnitude(weights))
            for linear, weight in zip(linears, weights, strict=True):
                assert torch.equal(opened.qtensor(linear).dequantize(), shared.encode(weight).dequantize())


@pytest.mark.parametrize("kind", ["nvfp4-w4a4 rtn", "nvfp4-w4a4", "nvfp4-modelopt"])
def test_linears_that_share_an_input_share_its_scale(kind: str, made: dict[str, Path]) -> None:
    opened = Build.open(made[kind])
    for layer in opened.architecture.layers:
        gates = [linear for mlp in layer.mlps() for linear in (mlp.gate, mlp.up)]
        for linears in (layer.heads.linears()[:3], gates):
            (scale,) = {opened.input_scale(linear) for linear in linears}
            assert scale * 2688.0 > 0.1
        downs = {opened.input_scale(mlp.down) for mlp in layer.mlps()}
        assert len(downs) > 1


def test_the_two_layouts_of_nvfp4_hold_the_same_weights(made: dict[str, Path]) -> None:
    ours, theirs = (Build.open(made[kind]) for kind in ("nvfp4-w4a4", "nvfp4-modelopt"))
    for layer in ours.architecture.layers:
        for linear in layer.linears():
            assert torch.equal(ours.qtensor(linear).dequantize(), theirs.qtensor(linear).dequantize())
            assert ours.input_scale(linear) == pytest.approx(theirs.input_scale(linear), rel=2.0**-22)
    beside = json.loads((made["nvfp4-modelopt"] / "hf_quant_config.json").read_text())
    section = json.loads((made["nvfp4-modelopt"] / "config.json").read_text())["quantization_config"]
    assert beside["quantization"]["exclude_modules"] == section["ignore"]
    assert beside["quantization"]["quant_algo"] == section["quant_algo"] == "NVFP4"


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_planned_and_inspected_as_they_are(kind: str, made: dict[str, Path], moe: Path) -> None:
    planned, found = estimate(moe, KINDS[kind]), inspect(made[kind])
    assert planned.output_bytes == sum(file.stat().st_size for file in made[kind].glob("*.safetensors"))
    schemes = {row.name.rpartition(".")[2]: row.scheme for row in planned.classes if row.name.endswith("up_proj")}
    assert kind == "mixed" or schemes["up_proj"] == SCHEME[kind.partition("-")[0].partition(" ")[0]]
    assert (found.format, found.weights) == (
        "mixed_precision" if kind == "mixed" else KINDS[kind].format,
        planned.weights,
    )
    assert found.bits_per_weight == pytest.approx(planned.bits_per_weight)


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_as_the_dense_model_that_it_stands_for(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    write_dense(made[kind], tmp_path / "dense", torch.float32)
    ours, dense = logits(made[kind]), logits(tmp_path / "dense")
    assert float((ours - dense).abs().max()) < 1e-5 * float(dense.abs().max())
    assert rounds_inputs(open_files(made[kind])) == (kind.startswith(("nvfp4-", "mxfp8", "mixed")))


@pytest.mark.parametrize(
    ("kind", "leaf", "what"),
    [
        ("nvfp4", "weight_packed", "signal to noise"),
        ("nvfp4", "weight_scale", "a scale is not finite"),
        ("nvfp4", "weight_global_scale", "signal to noise"),
        ("nvfp4-w4a4", "input_global_scale", "scale of its inputs"),
        ("nvfp4-modelopt", "input_scale", "scale of its inputs"),
        ("mxfp4", "weight_scale", "a scale is not finite"),
        ("mxfp8", "weight", "a code is not a number"),
    ],
)
def test_damage_is_found(kind: str, leaf: str, what: str, made: dict[str, Path], moe: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made[kind], tmp_path / "out"))
    name = f"model.layers.1.mlp.experts.2.up_proj.{leaf}"

    def damage(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[name]
        if tensor.numel() == 1:
            tensor.mul_(1e4 if leaf == "input_scale" else 1e-4)
        elif leaf == "weight_packed":
            tensor.copy_(tensor >> 4 | tensor << 4)
        else:
            tensor.view(torch.uint8)[3, 0] = 0xFF

    edit(out, name, damage)
    found = verify(out, moe).problems
    assert any(what in problem for problem in found), found
