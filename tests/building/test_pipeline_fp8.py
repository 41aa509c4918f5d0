"""Whole FP8 builds: made, interrupted, verified, inspected, dequantized; and every damage to one found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.inspection import inspect
from qconv.artifacts.source import Source
from qconv.checkpoint import reader
from qconv.checkpoint.reader import INDEX_NAME
from qconv.core import rounding
from qconv.core.qtensor import Grid, QTensor
from qconv.errors import VerificationError
from qconv.formats import float8
from qconv.grids import e4m3
from qconv.planning.estimate import estimate
from qconv.planning.recipe import Recipe
from qconv.runtime.dense import write_dense
from qconv.verification.build import verify
from qconv.verification.floors import FLOAT_SNR_FLOOR_DB
from qconv.verification.weights import weight_error
from tests.conftest import BUNDLED, build, folder_bytes, random_model, save_model, small_recipe
from tests.verification.test_build import edit, problems, reseal

EXPERT = "model.layers.1.mlp.experts.2"
KINDS: dict[str, Recipe] = {
    "blocks": small_recipe("rtn", "fp8", grid={"bits": 8, "group_size": 128}),
    "rows": small_recipe("rtn", "fp8_dynamic", grid={"bits": 8, "group_size": -1}, clip={"enabled": True}),
    "compressed blocks": small_recipe("rtn", "fp8_dynamic", grid={"bits": 8, "group_size": 128}),
    "static": small_recipe("rtn", "fp8_static", grid={"bits": 8, "group_size": -1}),
}
SCALE = dict.fromkeys(KINDS, "weight_scale") | {"blocks": "weight_scale_inv"}
SCHEME = dict.fromkeys(KINDS, "FP8 128x128") | {"rows": "FP8 channel", "static": "FP8 tensor"}


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sparse model of whole blocks of 128, which is as small as blocks allow; do not write to it."""
    sizes = {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4, "moe_intermediate_size": 128}
    return save_model(random_model("qwen3_moe", **sizes), tmp_path_factory.mktemp("whole") / "model", "900KB")


@pytest.fixture(scope="session")
def made(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``moe`` in every kind; do not write to them."""
    folder = tmp_path_factory.mktemp("fp8")
    return {kind: build(moe, folder / kind.replace(" ", "-"), recipe).out for kind, recipe in KINDS.items()}


@pytest.fixture
def copied(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Gives a build to be damaged, by kind."""
    return lambda kind: Path(shutil.copytree(made[kind], tmp_path / "build"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_build_verifies_and_loses_what_three_bits_of_fraction_lose(
    kind: str, made: dict[str, Path], moe: Path
) -> None:
    assert verify(made[kind]).problems == []
    result = verify(made[kind], moe)
    assert (result.problems, result.notices) == ([], [])
    assert len(result.snr_db) == 2 * (4 + 6 * 3)
    # 31.5 dB for a gaussian, half a dB more or less for two thousand weights; the search over short rows gains two.
    assert all(30.5 < value < 35 for value in result.snr_db.values())
    card = (made[kind] / "README.md").read_text()
    assert json.loads((made[kind] / "qconv-report.json").read_text())["scheme"] in card
    assert ("None: the method rounds weights" in card) == (kind != "static")


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_the_methods_and_everything_else_the_sources(
    kind: str, made: dict[str, Path], moe: Path
) -> None:
    source, opened = Source.open(moe), Build.open(made[kind])
    recipe = KINDS[kind]
    for layer in opened.architecture.layers:
        for linear in layer.linears():
            assert opened.is_quantized(linear)
            weight = opened.qtensor(linear)
            if kind == "static":  # fused linears share a scale: tests/calibration/test_static_inputs.py
                continue
            clip = recipe.clip if recipe.searches_clipping else None
            expected = e4m3.quantize(source.read(linear.weight), opened.grid_of(linear), clip)
            assert torch.equal(weight.codes.view(torch.uint8), expected.codes.view(torch.uint8))
            assert torch.equal(weight.scales, expected.scales)
        for router in layer.routers():
            assert not opened.is_quantized(router)
            assert torch.equal(opened.checkpoint.read(router.weight), source.read(router.weight))


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_how_much_of_a_weight_is_mapped_at_once_makes_no_difference(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(BUNDLED, tmp_path / "whole", KINDS[kind]).out
    monkeypatch.setattr(reader, "BLOCK_BYTES", 150 * 256 * 2)  # rows that no block of scales ends with
    parts = build(BUNDLED, tmp_path / "parts", KINDS[kind]).out
    for shard in whole.glob("*.safetensors"):
        assert (parts / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_or_on_other_threads_the_bytes_are_the_same(
    kind: str, made: dict[str, Path], moe: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(key: str, *_: int) -> None:
        if key == "layer-00001":
            raise Stop

    with pytest.raises(Stop):
        build(moe, tmp_path / "out", KINDS[kind], progress=stop)
    build(moe, tmp_path / "out", KINDS[kind], threads=1)
    assert folder_bytes(tmp_path / "out") == folder_bytes(made[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_planned_and_inspected_as_they_are(kind: str, made: dict[str, Path], moe: Path) -> None:
    planned, found = estimate(moe, KINDS[kind]), inspect(made[kind])
    assert planned.output_bytes == sum(file.stat().st_size for file in made[kind].glob("*.safetensors"))
    schemes = {row.name.rpartition(".")[2]: row.scheme for row in planned.classes}
    assert (schemes["up_proj"], schemes["gate"]) == (SCHEME[kind], "BF16")
    assert (found.format, found.weights) == (KINDS[kind].format, planned.weights)
    assert found.bits_per_weight == pytest.approx(planned.bits_per_weight)
    (up,) = (one for one in found.classes if one.name.endswith("experts.*.up_proj"))
    assert {(leaf, dtype) for leaf, dtype, _ in up.tensors} == {
        ("weight", "F8_E4M3"),
        (SCALE[kind], "F32" if kind == "blocks" else "BF16"),
        *([("input_scale", "F32")] if kind == "static" else []),
    }
    assert up.weights == up.modules * 128 * 128


def test_static_inputs_have_a_scale_each_that_linears_with_one_input_share(made: dict[str, Path]) -> None:
    opened = Build.open(made["static"])
    for layer in opened.architecture.layers:
        q, k, v, o = (opened.qtensor(linear).input_scale for linear in layer.attention.linears())
        assert None not in (q, k, v, o)
        # Engines that fuse them have one scale for all, and refuse or take the largest of different ones.
        assert q == k == v != o
        for mlp in layer.mlps():
            gate, up, down = (opened.qtensor(linear).input_scale for linear in (mlp.gate, mlp.up, mlp.down))
            assert gate == up != down


def test_lists_of_numbers_are_values_and_lists_of_names_are_not(made: dict[str, Path]) -> None:
    values = inspect(made["blocks"]).quantization
    assert values is not None
    assert values["weight_block_size"] == [128, 128]
    assert "modules_to_not_convert" not in values


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_model_is_the_dequantized_build(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    write_dense(made[kind], tmp_path / "dense", torch.float32)
    dense, opened = Source.open(tmp_path / "dense"), Build.open(made[kind])
    assert {entry.dtype for entry in dense.checkpoint.entries.values()} == {torch.float32}
    for layer in opened.architecture.layers:
        for linear in layer.linears():
            assert torch.equal(dense.read(linear.weight), opened.qtensor(linear).dequantize())


@pytest.mark.parametrize("kind", KINDS)
def test_a_build_is_the_source_of_another_as_its_dense_twin_is(
    kind: str, made: dict[str, Path], tmp_path: Path
) -> None:
    source, opened = Source.open(made[kind]), Build.open(made[kind])
    linear = opened.architecture.layers[1].heads.o
    assert torch.equal(source.read(linear.weight), opened.qtensor(linear).dequantize(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_recipe_skips_stays(kind: str, moe: Path, tmp_path: Path) -> None:
    values = KINDS[kind].model_dump(mode="json") | {"skip": ["model.layers.0.self_attn.*", "*.1.mlp.experts.*"]}
    recipe = small_recipe(**{("output_format" if key == "format" else key): value for key, value in values.items()})
    out = build(moe, tmp_path / "out", recipe).out
    result = verify(out, moe)
    assert result.problems == []
    assert len(result.snr_db) == 4 + 6 * 3  # one attention block and one set of experts
    opened = Build.open(out)
    assert [opened.is_quantized(layer.heads.q) for layer in opened.architecture.layers] == [False, True]


def nan_code(tensors: dict[str, Tensor], scale: str) -> None:
    """One code lost."""
    tensors[f"{EXPERT}.gate_proj.weight"].view(torch.uint8)[3, 5] = 0x7F


def negative_nan_code(tensors: dict[str, Tensor], scale: str) -> None:
    """A NaN has either sign."""
    tensors[f"{EXPERT}.gate_proj.weight"].view(torch.uint8)[3, 5] = 0xFF


def nan_scale(tensors: dict[str, Tensor], scale: str) -> None:
    tensors[f"{EXPERT}.gate_proj.{scale}"].view(-1)[0] = float("nan")


def zero_scale(tensors: dict[str, Tensor], scale: str) -> None:
    tensors[f"{EXPERT}.gate_proj.{scale}"].view(-1)[0] = 0.0


def negative_scale(tensors: dict[str, Tensor], scale: str) -> None:
    tensors[f"{EXPERT}.gate_proj.{scale}"].view(-1)[0] *= -1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (nan_code, "a code is not a number"),
        (negative_nan_code, "a code is not a number"),
        (nan_scale, "a scale is not finite"),
        (zero_scale, "a scale is not positive"),
        (negative_scale, "a scale is not positive"),
    ],
)
def test_what_is_no_code_and_no_scale_is_found_without_the_source(
    kind: str, damage: Callable[[dict[str, Tensor], str], None], what: str, copied: Callable[[str], Path], moe: Path
) -> None:
    folder = copied(kind)
    edit(folder, f"{EXPERT}.gate_proj.weight", lambda tensors: damage(tensors, SCALE[kind]))
    assert f"{EXPERT}.gate_proj: {what}" in problems(folder)
    assert f"{EXPERT}.gate_proj: {what}" in problems(folder, moe)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_scale_of_inputs_is_found(value: float, copied: Callable[[str], Path], moe: Path) -> None:
    folder, name = copied("static"), f"{EXPERT}.down_proj.input_scale"
    edit(folder, name, lambda tensors: tensors.update({name: torch.tensor([value])}))
    for found in (problems(folder), problems(folder, moe)):
        assert f"{EXPERT}.down_proj: the scale of its inputs is not finite and positive" in found
    edit(folder, name, lambda tensors: tensors.__delitem__(name))
    assert f"tensor {name} is missing" in problems(folder)


def other_expert(tensors: dict[str, Tensor], scale: str) -> None:
    """Two experts' codes exchanged, of one shape and nearly one scale."""
    one, other = f"{EXPERT}.gate_proj.weight", "model.layers.1.mlp.experts.3.gate_proj.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def halved_scale(tensors: dict[str, Tensor], scale: str) -> None:
    """As from an exponent bias that is off by one."""
    tensors[f"{EXPERT}.gate_proj.{scale}"] /= 2


def inverted_scale(tensors: dict[str, Tensor], scale: str) -> None:
    """Divided by in place of multiplied with, as the name says."""
    name = f"{EXPERT}.gate_proj.{scale}"
    tensors[name] = (1.0 / tensors[name].float()).to(tensors[name].dtype)


def fewer_bits(tensors: dict[str, Tensor], scale: str) -> None:
    """The last bit of the fraction lost everywhere."""
    tensors[f"{EXPERT}.gate_proj.weight"].view(torch.uint8).bitwise_and_(0xFE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [other_expert, halved_scale, inverted_scale, fewer_bits])
def test_wrong_weights_under_true_checksums_are_found(
    kind: str, damage: Callable[[dict[str, Tensor], str], None], copied: Callable[[str], Path], moe: Path
) -> None:
    folder = copied(kind)
    edit(folder, f"{EXPERT}.gate_proj.weight", lambda tensors: damage(tensors, SCALE[kind]))
    assert problems(folder) == ""  # each of them is a build, of another model
    assert f"{EXPERT}.gate_proj: signal to noise" in problems(folder, moe)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leaf", ["weight", "scale"])
def test_a_missing_or_misshapen_tensor_is_named(kind: str, leaf: str, copied: Callable[[str], Path]) -> None:
    folder = copied(kind)
    name = f"{EXPERT}.down_proj.{SCALE[kind] if leaf == 'scale' else leaf}"
    edit(folder, name, lambda tensors: tensors.update({name: tensors[name].repeat_interleave(2, 0)}))
    assert f"tensor {name} is [" in problems(folder)
    edit(folder, name, lambda tensors: tensors.__delitem__(name))
    assert f"tensor {name} is missing" in problems(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_weight_in_place_of_a_quantized_one_is_found(kind: str, copied: Callable[[str], Path]) -> None:
    folder, name = copied(kind), f"{EXPERT}.down_proj.weight"
    edit(folder, name, lambda tensors: tensors.update({name: tensors[name].to(torch.bfloat16)}))
    found = problems(folder)
    assert f"{EXPERT}.down_proj is not quantized but is not on the skip list" in found
    assert f"tensor {EXPERT}.down_proj.{SCALE[kind]} is not part of the model" in found


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_that_the_skip_list_forgets_is_found(kind: str, copied: Callable[[str], Path]) -> None:
    folder = copied(kind)
    config = json.loads((folder / "config.json").read_text())
    listed = config["quantization_config"]["modules_to_not_convert" if kind == "blocks" else "ignore"]
    listed.remove("model.layers.1.mlp.gate")
    (folder / "config.json").write_text(json.dumps(config))
    reseal(folder)
    assert "model.layers.1.mlp.gate is not quantized but is not on the skip list" in problems(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_other_dtypes_are_read(dtype: torch.dtype, copied: Callable[[str], Path], moe: Path) -> None:
    folder = copied("blocks")
    for path in folder.glob("model-*.safetensors"):
        tensors = load_file(path)
        save_file({name: tensor.to(dtype) if "scale" in name else tensor for name, tensor in tensors.items()}, path)
    reseal(folder)
    result = verify(folder, moe)
    assert result.problems == []
    linear = Build.open(folder).architecture.layers[0].heads.q
    assert Build.open(folder).qtensor(linear).scales.dtype == dtype


def test_a_format_that_packs_wrongly_is_stopped_before_its_shard_has_a_name(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = float8.Float8Layout.pack

    def transposed(self: Any, module: str, weight: QTensor) -> Any:
        for name, tensor in pack(self, module, weight):
            yield name, tensor.t().contiguous().view(tensor.shape) if name.endswith(".weight") else tensor

    monkeypatch.setattr(float8.Float8Layout, "pack", transposed)
    with pytest.raises(VerificationError, match=r"layer-00000.*does not stand for the source.*dB, below 24"):
        build(moe, tmp_path / "out", KINDS["blocks"])
    assert not (tmp_path / "out" / "model-00002-of-00004.safetensors").exists()


@pytest.mark.parametrize("block_rows", [128, -1])
def test_no_weights_at_all_fall_below_the_floor(block_rows: int) -> None:
    # The worst that rounding to the nearest can meet: all just below the middle of the first step of a power of two.
    worst = torch.full((128, 128), 1.0 + 2.0**-4 - 2.0**-20)
    worst[0, 0] = 1.75  # of the largest code's fraction, so that the scale is a power of two
    grid = Grid(8, 128 if block_rows > 0 else -1, True, torch.float32, number="e4m3", block_rows=block_rows)
    weight = e4m3.quantize(worst, grid)
    noise = (weight.dequantize().double() - worst.double()).square().sum()
    snr = 10 * float(torch.log10(worst.double().square().sum() / noise))
    # 20 log10(17) is 24.6.
    assert FLOAT_SNR_FLOOR_DB < snr < FLOAT_SNR_FLOOR_DB + 1


def test_errors_are_summed_by_parts_that_hold_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.randn(11, 10, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 12)[:, None]
    for block_rows in (4, -1):
        grid = Grid(8, 3, True, torch.float32, number="e4m3", block_rows=block_rows)
        weight = e4m3.quantize(source, grid)
        noise = float((weight.dequantize().double() - source.double()).square().sum())
        monkeypatch.setattr(rounding, "_BLOCK_ELEMENTS", 30)  # three rows, where blocks have four or eleven
        assert weight_error(source, weight, None, None).noise == pytest.approx(noise, rel=1e-5)
        monkeypatch.undo()


def test_blocks_of_the_bundled_model_are_many_and_whole(tmp_path: Path) -> None:
    # moe's linears are smaller than a block; here each has several, and shards are cut between them.
    values = {"output": {"max_shard_size": 10**6}, "grid": {"bits": 8, "group_size": 128}}
    out = build(BUNDLED, tmp_path / "out", small_recipe("rtn", "fp8", **values)).out
    result = verify(out, BUNDLED)
    assert result.problems == []
    assert all(31 < value < 32 for value in result.snr_db.values())
    weight_map = json.loads((out / INDEX_NAME).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 10
