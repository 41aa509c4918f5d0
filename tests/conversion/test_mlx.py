"""MLX's layout: the same numbers there and back, for every mode, or nothing; and damage is met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.building.output import Outcome
from qconv.checkpoint.reader import Checkpoint
from qconv.conversion import mlx
from qconv.conversion.mlx_weights import MlxWeights
from qconv.conversion.pipeline import Wanted, convert
from qconv.core.qtensor import Grid, QTensor
from qconv.errors import CheckpointError, UsageError
from qconv.runtime.loading import load
from qconv.verification.build import verify
from tests.conftest import build, folder_bytes, random_model, random_qtensor, save_model, small_recipe

SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64}
BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4-g32": ("w4a16", {"group_size": 32}),
    "int4-g64": ("w4a16", {"group_size": 64}),
    "int8": ("w4a16", {"bits": 8, "group_size": 32}),
    "channel": ("w4a16", {"bits": 8, "group_size": -1}),
    "gptq": ("gptq", {"group_size": 128}),
    "int3": ("gptq", {"bits": 3, "group_size": 32}),
    "int2": ("gptq", {"bits": 2, "group_size": 64}),
    "mxfp4": ("mxfp4", {"group_size": 32}),
    "mxfp8": ("mxfp8", {"bits": 8, "group_size": 32}),
}
MODES = {"int3": (3, 32, "affine"), "int8": (8, 32, "affine"), "mxfp4": (4, 32, "mxfp4"), "mxfp8": (8, 32, "mxfp8")}


def converted(path: Path, out: Path, layout: str, **options: Any) -> Outcome:
    said = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None, **options}
    return convert(path, out, Wanted(layout, said.pop("size", None)), **said)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model("qwen3_moe", **SIZES), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def builds(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("builds")
    for name, (output_format, grid) in BUILDS.items():
        build(source, folder / name, small_recipe("rtn", output_format, grid=grid))
    return {name: folder / name for name in BUILDS}


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    rows=st.integers(1, 5),
    words=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_words_hold_codes_in_a_stream_of_bits(bits: int, rows: int, words: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, 32 * words), generator=made, dtype=torch.uint8)
    found = mlx.packed(codes, bits)
    assert found.dtype is torch.uint32
    assert found.shape == (rows, words * bits)
    assert torch.equal(mlx.unpacked(found, bits), codes)
    number = int.from_bytes(found[0].view(torch.uint8).numpy().tobytes(), "little")
    assert [(number >> (bits * place)) & ((1 << bits) - 1) for place in range(32 * words)] == codes[0].tolist()


@given(bits=st.sampled_from([2, 3, 4, 8]), size=st.sampled_from([32, 64, 128]), seed=st.integers(0, 2**31))
def test_a_weight_is_code_times_scale_plus_bias(bits: int, size: int, seed: int) -> None:
    weight = random_qtensor(Grid(bits, size, True, torch.bfloat16), 6, 256, seed)
    mode = mlx.mode_of(weight.grid, 256)
    assert isinstance(mode, mlx.Mode)
    assert mlx.misfit(weight) is None
    found = mlx.pieces(weight, mode)
    groups = weight.codes.view(6, -1, size).float()
    by_hand = groups * found["scales"].float().unsqueeze(-1) + found["biases"].float().unsqueeze(-1)
    assert torch.equal(mlx.dense(found, mode), by_hand.view(6, 256))
    assert torch.equal(mlx.dense(found, mode), weight.dequantize())
    again = mlx.whole(found, mode)
    assert isinstance(again, QTensor)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scales, weight.scales)


@pytest.mark.parametrize("name", BUILDS)
def test_there_and_back_every_number_is_kept(name: str, builds: dict[str, Path], source: Path, tmp_path: Path) -> None:
    outcome = converted(builds[name], tmp_path / "there", "mlx")
    assert outcome.report["converted"] == {
        "from": BUILDS[name][0],
        "rounded_again": {},
        "method_known": True,
    }
    config = json.loads((tmp_path / "there/config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    if name in MODES:
        section = config["quantization"]
        assert (section["bits"], section["group_size"], section["mode"]) == MODES[name]
    before = Build.open(builds[name])
    there = MlxWeights.of(tmp_path / "there", None)
    for layer in before.architecture.layers:
        for linear in layer.linears():
            if before.is_quantized(linear):
                assert torch.equal(there.read(linear.weight), before.qtensor(linear).dequantize()), linear.name
    stacked = Checkpoint.open(tmp_path / "there").entry("model.layers.0.mlp.switch_mlp.up_proj.weight")
    experts = [name for name in there.places if name.startswith("model.layers.0.") and name.endswith("up_proj.weight")]
    assert stacked.shape[0] == len(experts) > 1
    if name in ("channel", "mxfp8"):
        return  # groups of 128 are finer than whole rows, and stay so; the layout of MXFP8 says that inputs are rounded
    converted(tmp_path / "there", tmp_path / "back", BUILDS[name][0].replace("_", "-"))
    shards = [
        {file: data for file, data in folder_bytes(one).items() if file.endswith(".safetensors")}
        for one in (builds[name], tmp_path / "back")
    ]
    assert shards[0] == shards[1]
    assert not verify(tmp_path / "back", source).problems


def test_in_files_of_a_size_interrupted_it_ends_with_the_same_bytes(builds: dict[str, Path], tmp_path: Path) -> None:
    converted(builds["int4-g64"], tmp_path / "whole", "mlx", size=100_000)
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 3

    class Stop(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        converted(builds["int4-g64"], tmp_path / "out", "mlx", size=100_000, progress=stop)
    converted(builds["int4-g64"], tmp_path / "out", "mlx", size=100_000)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert converted(builds["int4-g64"], tmp_path / "out", "mlx", size=100_000).already_complete


@pytest.mark.parametrize(
    ("output_format", "grid", "reason"),
    [
        ("awq", {"group_size": 32}, "zero points times scales are no numbers of float16"),
        ("w4a16", {"group_size": 16}, "groups of 32, 64 and 128, not of 16"),
        ("fp8", {"bits": 8, "group_size": 128}, "no such floats"),
    ],
)
def test_what_mlx_does_not_hold_is_named_and_nothing_is_written(
    output_format: str, grid: dict[str, int], reason: str, source: Path, tmp_path: Path
) -> None:
    build(source, tmp_path / "build", small_recipe("rtn", output_format, grid=grid))
    with pytest.raises(UsageError, match=reason):
        converted(tmp_path / "build", tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_names_are_not_known_is_refused(tmp_path: Path) -> None:
    model = save_model(random_model("gpt_oss"), tmp_path / "model")
    build(model, tmp_path / "build", small_recipe())
    with pytest.raises(UsageError, match="how mlx-lm stores a gpt_oss model is not known"):
        converted(tmp_path / "build", tmp_path / "out", "mlx")


def test_biases_that_are_no_zero_points_become_plain_alone(builds: dict[str, Path], tmp_path: Path) -> None:
    converted(builds["int4-g64"], tmp_path / "there", "mlx")
    file = tmp_path / "there/model-00001-of-00001.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.biases"][0, 0] *= 1.0078125
    save_file(tensors, file, metadata={"format": "mlx"})
    with pytest.raises(UsageError, match="biases of its groups are no whole number of steps"):
        converted(tmp_path / "there", tmp_path / "out", "w4a16")
    converted(tmp_path / "there", tmp_path / "dense", "f32")
    stored = MlxWeights.of(tmp_path / "there", None)
    assert torch.equal(Checkpoint.open(tmp_path / "dense").read(f"{name}.weight"), stored.read(f"{name}.weight"))


@pytest.mark.parametrize("damage", ["missing", "unknown", "misshapen", "experts"])
def test_damage_is_met(damage: str, builds: dict[str, Path], tmp_path: Path) -> None:
    converted(builds["int4-g64"], tmp_path / "there", "mlx")
    file = tmp_path / "there/model-00001-of-00001.safetensors"
    (tmp_path / "there/model.safetensors.index.json").unlink()
    tensors = load_file(file)
    name = "model.layers.1.mlp.switch_mlp.down_proj"
    if damage == "missing":
        del tensors[f"{name}.biases"]
    elif damage == "unknown":
        tensors["model.extra"] = torch.zeros(3)
    elif damage == "misshapen":
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:, :-1].contiguous()
    else:
        tensors = {key: value[:-1].contiguous() if key.startswith(name) else value for key, value in tensors.items()}
    file.unlink()
    save_file(tensors, tmp_path / "there/model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(CheckpointError):
        converted(tmp_path / "there", tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


def test_who_does_not_read_it_says_what_does(builds: dict[str, Path], tmp_path: Path) -> None:
    converted(builds["int4-g64"], tmp_path / "there", "mlx")
    with pytest.raises(CheckpointError, match="kind that qconv does not run") as refused:
        load(tmp_path / "there")
    assert "qconv convert" in str(refused.value.hint)
    with pytest.raises(CheckpointError, match="already quantized") as unread:
        Source.open(tmp_path / "there")
    assert "qconv convert" in str(unread.value.hint)
