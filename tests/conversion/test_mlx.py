"""MLX's layout: the same numbers there and back, for every mode, or nothing; and damage is met."""

from __future__ import annotations

import json
import re
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
from qconv.building.output import Outcome
from qconv.checkpoint.reader import Checkpoint
from qconv.conversion.pipeline import Wanted, convert
from qconv.core.qtensor import Grid
from qconv.errors import CheckpointError, RecipeError, UsageError
from qconv.formats import mlx
from qconv.grids.affine import AffineGrid
from qconv.runtime.loading import load
from qconv.verification.build import verify
from tests.conftest import build, folder_bytes, random_model, save_model, small_recipe

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


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight, as the build's own words have it."""
    opened = Build.open(folder)
    linears = (linear for layer in opened.architecture.layers for linear in layer.linears())
    return {one.name: opened.qtensor(one).dequantize() for one in linears if opened.is_quantized(one)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model("qwen3_moe", **SIZES), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def builds(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("builds")
    for name, (output_format, grid) in BUILDS.items():
        build(source, folder / name, small_recipe("rtn", output_format, grid=grid))
    return {name: folder / name for name in BUILDS}


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
    before, there = numbers(builds[name]), numbers(tmp_path / "there")
    assert before.keys() == there.keys()
    assert [key for key in before if not torch.equal(before[key], there[key])] == []
    assert verify(tmp_path / "there", source).problems == []
    stacked = Checkpoint.open(tmp_path / "there").entry("model.layers.0.mlp.switch_mlp.up_proj.weight")
    assert stacked.shape[0] == 6
    if name in ("channel", "mxfp8"):
        return  # groups of 128 are finer than whole rows, and stay so; the layout of MXFP8 says that inputs are rounded
    converted(tmp_path / "there", tmp_path / "back", BUILDS[name][0].replace("_", "-"))
    shards = [
        {file: data for file, data in folder_bytes(one).items() if file.endswith(".safetensors")}
        for one in (builds[name], tmp_path / "back")
    ]
    assert shards[0] == shards[1]
    assert not verify(tmp_path / "back", source).problems


def test_interrupted_it_ends_with_the_same_bytes(builds: dict[str, Path], tmp_path: Path) -> None:
    converted(builds["int4-g64"], tmp_path / "whole", "mlx")
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 3

    class Stop(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        converted(builds["int4-g64"], tmp_path / "out", "mlx", progress=stop)
    converted(builds["int4-g64"], tmp_path / "out", "mlx")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert converted(builds["int4-g64"], tmp_path / "out", "mlx").already_complete


@pytest.mark.parametrize(
    ("output_format", "grid", "reason"),
    [
        ("awq", {"group_size": 32}, "zero points times scales are no numbers of float16"),
        ("w4a16", {"group_size": 16}, "groups of 32, 64 and 128, not of 16"),
        ("fp8", {"bits": 8, "group_size": 128}, "no such floats"),
        ("nvfp4", {"group_size": 16}, "its scale of all scales is another number there"),
    ],
)
def test_what_mlx_does_not_hold_is_named_and_nothing_is_written(
    output_format: str, grid: dict[str, int], reason: str, source: Path, tmp_path: Path
) -> None:
    build(source, tmp_path / "build", small_recipe("rtn", output_format, grid=grid))
    with pytest.raises(UsageError, match=reason):
        converted(tmp_path / "build", tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


def test_zero_points_whose_products_with_scales_are_stored_exactly_have_a_place(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "awq", small_recipe("rtn", "awq", grid={"group_size": 32}))
    for file in (tmp_path / "awq").glob("*.safetensors"):
        tensors = load_file(file)
        for name in (
            one for one in tensors if one.endswith(".scales")
        ):  # 7 bits, which 4 of a zero point leave room for
            fractions, exponents = torch.frexp(tensors[name].float())
            tensors[name] = torch.ldexp((fractions * 128).round() / 128, exponents).half()
        save_file(tensors, file, metadata={"format": "pt"})
    for name in ("SHA256SUMS", "qconv-report.json"):
        (tmp_path / "awq" / name).unlink()
    outcome = converted(tmp_path / "awq", tmp_path / "there", "mlx")
    assert outcome.report["converted"]["rounded_again"] == {}
    before, there = numbers(tmp_path / "awq"), numbers(tmp_path / "there")
    assert [key for key in before if not torch.equal(before[key], there[key])] == []
    converted(tmp_path / "there", tmp_path / "back", "awq")
    assert [key for key, value in numbers(tmp_path / "back").items() if not torch.equal(before[key], value)] == []


def test_a_model_whose_names_are_not_known_is_refused(tmp_path: Path) -> None:
    model = save_model(random_model("gpt_oss"), tmp_path / "model")
    build(model, tmp_path / "build", small_recipe())
    with pytest.raises(RecipeError, match="how its readers would store a gpt_oss model is not known"):
        converted(tmp_path / "build", tmp_path / "out", "mlx")


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change a build's tensors, which then lie in one file, as another tool would leave it."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("model-*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    change(tensors)
    for name in ("model.safetensors.index.json", "SHA256SUMS", "qconv-report.json"):
        (folder / name).unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})


def test_biases_that_are_no_zero_points_become_plain_alone(builds: dict[str, Path], tmp_path: Path) -> None:
    converted(builds["int4-g64"], tmp_path / "there", "mlx")
    name = "model.layers.0.self_attn.q_proj"
    edit_tensors(tmp_path / "there", lambda tensors: tensors[f"{name}.biases"][0, 0].mul_(1.0078125))
    with pytest.raises(UsageError, match="no biases, and those of its groups are no whole number of steps"):
        converted(tmp_path / "there", tmp_path / "out", "w4a16")
    converted(tmp_path / "there", tmp_path / "dense", "f32")
    assert torch.equal(Checkpoint.open(tmp_path / "dense").read(f"{name}.weight"), numbers(tmp_path / "there")[name])


DOWN = "model.layers.1.mlp.switch_mlp.down_proj"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda tensors: tensors.pop(f"{DOWN}.biases"), r"experts\.0\.down_proj\.biases is missing"),
    "unknown": (
        lambda tensors: tensors.update({"model.extra": torch.zeros(3)}),
        "model.extra is not part of the model",
    ),
    "misshapen": (
        lambda tensors: tensors.update({f"{DOWN}.scales": tensors[f"{DOWN}.scales"][..., :-1].contiguous()}),
        r"mode 'affine' of 4 bits in groups of 128 is none|down_proj",
    ),
    "an expert less": (
        lambda tensors: tensors.update({f"{DOWN}.weight": tensors[f"{DOWN}.weight"][:-1].contiguous()}),
        r"down_proj\.weight' is \[5, 128, 16\], config\.json implies an expert 5",
    ),
    "an expert more": (
        lambda tensors: tensors.update(
            {
                f"{DOWN}.{leaf}": torch.cat([tensors[f"{DOWN}.{leaf}"].view(torch.uint8)] * 2).view(dtype)
                for leaf, dtype in (("weight", torch.uint32), ("scales", torch.bfloat16), ("biases", torch.bfloat16))
            }
        ),
        r"implies 6 experts",
    ),
    "words of another dtype": (
        lambda tensors: tensors.update({f"{DOWN}.weight": tensors[f"{DOWN}.weight"].view(torch.int32)}),
        "down_proj",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_met(damage: str, builds: dict[str, Path], tmp_path: Path) -> None:
    change, said = DAMAGES[damage]
    converted(builds["int4-g64"], tmp_path / "there", "mlx")
    edit_tensors(tmp_path / "there", change)
    assert re.search(said, "; ".join(verify(tmp_path / "there").problems))
    with pytest.raises(CheckpointError, match=said):
        converted(tmp_path / "there", tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


def with_ends(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Embedding, head and routers quantized as mlx-lm does: 4 bits in groups of 64, routers 8."""
    grids = {
        "model.embed_tokens": Grid(4, 64, False, torch.bfloat16, based=True),
        "lm_head": Grid(4, 64, False, torch.bfloat16, based=True),
        **{f"model.layers.{layer}.mlp.gate": Grid(8, 64, False, torch.bfloat16, based=True) for layer in range(2)},
    }
    config = json.loads((folder / "config.json").read_text())
    for name, grid in grids.items():
        weight = AffineGrid(grid).encode(tensors.pop(f"{name}.weight").float())
        tensors |= dict(mlx.FORMAT.pack(name, weight))
        if grid.bits == 8:
            config["quantization"][name] = {"group_size": 64, "bits": 8}
    config["quantization_config"] = config["quantization"]
    (folder / "config.json").write_text(json.dumps(config))


def test_embeddings_heads_and_routers_with_codes_are_read(
    builds: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    converted(builds["int4-g64"], folder, "mlx")
    edit_tensors(folder, lambda tensors: with_ends(folder, tensors))
    opened = Build.open(folder)
    names = [name for name in opened.checkpoint.entries if opened.checkpoint.is_dequantized(name)]
    assert names == [
        "model.embed_tokens.weight",
        *(f"model.layers.{one}.mlp.gate.weight" for one in range(2)),
        "lm_head.weight",
    ]
    for against in (None, source):
        result = verify(folder, against)
        assert (result.problems, result.not_checked) == ([], [])
    assert result.snr_db["lm_head"] > 15.0
    assert result.snr_db["model.layers.1.mlp.gate"] > 35.0
    assert inspect(folder).format == "mlx"
    assert inspect(folder).weights == inspect(source).weights
    converted(folder, tmp_path / "dense", "f32")
    dense = Source.open(tmp_path / "dense")
    for name in names:
        whole = opened.checkpoint.read(name)
        assert torch.equal(dense.read(name), whole), name
        assert torch.equal(torch.cat(list(opened.checkpoint.blocks(name))), whole)
        assert torch.equal(opened.checkpoint.gather(name, torch.tensor([3, 0, 3])), whole[[3, 0, 3]])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, plain = (
            load(one, backend="reference", dtype="float32")(ids).logits for one in (folder, tmp_path / "dense")
        )
    assert torch.equal(ours, plain)
    converted(folder, tmp_path / "int4", "w4a16")
    assert Checkpoint.open(tmp_path / "int4").entry("lm_head.weight").dtype is torch.float32  # no number is lost
    before, after = numbers(folder), numbers(tmp_path / "int4")
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_a_damaged_head_is_named(builds: dict[str, Path], source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    converted(builds["int4-g64"], folder, "mlx")

    def damage(tensors: dict[str, Tensor]) -> None:
        with_ends(folder, tensors)
        tensors["lm_head.scales"][40:80] = 0.0

    edit_tensors(folder, damage)
    assert any(one.startswith("lm_head.weight") for one in verify(folder, source).problems)
