"""Tensors beside the model: copied bit for bit, resumed, listed, counted, verified; unknown ones refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qconv
from evals.families import IDS
from qconv.artifacts.build import Build
from qconv.artifacts.inspection import inspect
from qconv.artifacts.source import Source
from qconv.artifacts.verbatim import Verbatim
from qconv.building.several_pipeline import quantize_several
from qconv.checkpoint.reader import INDEX_NAME
from qconv.checkpoint.stream import same_bits
from qconv.errors import CheckpointError
from qconv.folders.state import CHECKSUMS_NAME
from qconv.formats import get_format
from qconv.planning.estimate import Estimate, estimate
from qconv.planning.gguf_outline import outline
from qconv.planning.gguf_recipe import GgufRecipe, parse_gguf_recipe
from qconv.planning.plan import plan_of
from qconv.planning.recipe import Recipe
from qconv.runtime.stream import stream_logits
from qconv.verification.build import verify
from qconv.verification.checksums import parse_checksums, render_checksums
from qconv.verification.gguf import verify_gguf
from tests.artifacts.test_source import edit_tensors, refused
from tests.building.test_pipeline import Stop, calls_of, stop_at
from tests.conftest import build, folder_bytes, small_recipe
from tests.models.discovery.test_discovered_builds import source as source

LAYER = "model.layers.3"
"""glm4_moe of three layers: the one behind them."""
RECIPE = small_recipe(output={"max_shard_size": 1_000_000})


def mtp_tensors() -> dict[str, Tensor]:
    """A layer that predicts a further token, of every kind of tensor, and what no rounding would leave as it is."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    special = random(64, 128)
    special[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-40])
    return {
        f"{LAYER}.eh_proj.weight": special,
        f"{LAYER}.enorm.weight": random(64),
        f"{LAYER}.shared_head.head.weight": random(2048, 256),
        f"{LAYER}.mlp.gate.weight": random(4, 64).float(),
        f"{LAYER}.mlp.gate.e_score_correction_bias": random(4).float(),
        f"{LAYER}.mlp.position": torch.arange(5),
        f"{LAYER}.mlp.step": torch.tensor(3.0),
        f"{LAYER}.mlp.joined": random(4, 512, 256),
        f"{LAYER}.other.experts.gate_up_proj": random(4, 8, 4),
        f"{LAYER}.other.experts.down_proj": random(4, 4, 4),
        **{
            f"{LAYER}.mlp.experts.{number}.{leaf}_proj.weight": random(*((64, 32) if leaf == "down" else (32, 64)))
            for number in range(4)
            for leaf in ("gate", "up", "down")
        },
    }


@pytest.fixture(scope="module")
def glm(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A glm4_moe checkpoint with such a layer; do not write to it."""
    folder = Path(shutil.copytree(source("glm4_moe"), tmp_path_factory.mktemp("glm") / "model"))
    return edit_tensors(folder, lambda tensors: tensors.update(mtp_tensors()))


@pytest.fixture(scope="module")
def made(glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its build in w4a16; do not write to it."""
    return build(glm, tmp_path_factory.mktemp("made") / "build", RECIPE).out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}


def test_every_tensor_is_in_the_build_bit_for_bit(glm: Path, made: Path) -> None:
    found = tensors_of(made)
    for name, tensor in mtp_tensors().items():
        assert same_bits(found[name], tensor), name
    assert not (found.keys() - tensors_of(glm).keys()) & {name for name in found if name.startswith(LAYER)}


def test_it_is_listed_counted_and_said(glm: Path, made: Path) -> None:
    report, card = json.loads((made / "qconv-report.json").read_text()), (made / "README.md").read_text()
    nbytes = sum(one.nbytes for one in mtp_tensors().values())
    said = {"part": "MTP", "tensors": len(mtp_tensors()), "nbytes": nbytes, "dequantized": 0}
    assert report["verbatim"] == [said]
    assert f"{len(mtp_tensors())} tensors of MTP ({nbytes:,} bytes) are copied" in card
    config = json.loads((made / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    for leaf in ("eh_proj", "shared_head.head", "mlp.gate", "mlp.experts.3.down_proj"):
        assert f"{LAYER}.{leaf}" in ignored
    for leaf in ("", ".0.gate_proj", ".0.up_proj", ".3.down_proj"):
        assert f"{LAYER}.other.experts{leaf}" in ignored
    # The module of a matrix of all experts, but no module that holds another which is quantized, and no norm.
    assert f"{LAYER}.enorm" not in ignored
    planned = estimate(glm, RECIPE)
    shards = sum(file.stat().st_size for file in made.glob("*.safetensors"))
    assert planned.output_bytes == shards
    assert planned.source_bytes == sum(one.nbytes for one in tensors_of(glm).values())
    assert planned.weights == report["parameters"] == sum(one.numel() for one in tensors_of(glm).values())
    assert any("MTP" in notice and "copied" in notice for notice in planned.notices)
    assert not any("refuse" in notice for notice in planned.notices)


def test_block_fp8_lists_them(glm: Path) -> None:
    plan, fp8 = plan_of(Source.open(glm), RECIPE), get_format("fp8")
    grid = fp8.grid(small_recipe("rtn", "fp8", grid={"bits": 8, "group_size": 128}).grid, torch.bfloat16)
    names = [linear.name for linear in plan.quantized]
    described = fp8.read_config(fp8.config({grid: names}, plan.skipped), torch.bfloat16)
    for one in plan.verbatim:
        assert all(fp8.is_skipped(module, described.skipped) for module in one.modules), one.name
    assert not [name for name in names if fp8.is_skipped(name, described.skipped)]


@pytest.mark.parametrize("output_format", ["awq", "gptq", "fp8_dynamic"])
def test_each_format_lists_them_in_its_own_way(glm: Path, tmp_path: Path, output_format: str) -> None:
    grid = {"bits": 8, "group_size": -1} if output_format == "fp8_dynamic" else {"group_size": 32}
    out = build(glm, tmp_path / "out", small_recipe("rtn", output_format, grid=grid)).out
    opened = Build.open(out)
    for one in opened.verbatim():
        for module in one.modules:
            assert opened.format.is_skipped(module, opened.skipped), module
    quantized = [linear.name for layer in opened.architecture.layers for linear in layer.linears()]
    assert not [name for name in quantized if opened.is_skipped(name)]
    if output_format == "awq":  # engines look for the experts of a layer as one module, in which they find a substring
        assert opened.format.is_skipped(f"{LAYER}.mlp.experts", opened.skipped)
    found = verify(out, against=glm)
    assert not found.problems


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_killed_anywhere_and_resumed_the_bytes_are_the_same(glm: Path, tmp_path: Path, method: str) -> None:
    recipe = small_recipe(method, output={"max_shard_size": 1_000_000})
    keys = calls_of(glm, tmp_path / "whole", recipe)
    copies = [number for number, key in enumerate(keys) if key.startswith("verbatim")]
    assert len({keys[number] for number in copies}) > 3
    expected = folder_bytes(tmp_path / "whole")
    for call in [keys.index("head"), copies[0], copies[len(copies) // 2], copies[-1]]:
        out = tmp_path / str(call)
        with pytest.raises(Stop):
            build(glm, out, recipe, progress=stop_at(call))
        assert not (out / CHECKSUMS_NAME).exists()
        build(glm, out, recipe)
        assert folder_bytes(out) == expected, f"stopped at call {call}, {keys[call]}"


def test_verify_finds_nothing_in_a_sound_build(glm: Path, made: Path) -> None:
    for against in (None, glm):
        found = verify(made, against=against)
        assert not found.problems
        assert not found.not_checked
    assert any("MTP" in sentence and "bit for bit" in sentence for sentence in found.checked)


def damaged(made: Path, folder: Path, change: Callable[[dict[str, Tensor]], None], name: str) -> Path:
    """A copy of a build of which the shard that holds a tensor is changed, with checksums that say so."""
    out = Path(shutil.copytree(made, folder))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shard = out / index["weight_map"][name]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})
    index["weight_map"] = {
        key: file for key, file in index["weight_map"].items() if file != shard.name
    } | dict.fromkeys(tensors, shard.name)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return resummed(out)


def resummed(out: Path) -> Path:
    """The folder with checksums of what it holds now."""
    sums = parse_checksums((out / CHECKSUMS_NAME).read_text())
    sums = {one: hashlib.sha256((out / one).read_bytes()).hexdigest() for one in sums}
    (out / CHECKSUMS_NAME).write_text(render_checksums(sums))
    return out


def test_verify_finds_a_changed_bit(glm: Path, made: Path, tmp_path: Path) -> None:
    name = f"{LAYER}.eh_proj.weight"

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.int16)[0, 0] = 0  # it was -0.0, which equals 0.0

    out = damaged(made, tmp_path / "out", flip, name)
    assert not verify(out).problems
    assert verify(out, against=glm).problems == [f"{name}: differs from the source"]


def test_verify_finds_a_tensor_that_is_lacking_or_unlisted(glm: Path, made: Path, tmp_path: Path) -> None:
    name = f"{LAYER}.enorm.weight"
    out = damaged(made, tmp_path / "lacking", lambda tensors: tensors.__delitem__(name), name)
    assert "the build's report says" in verify(out).problems[0]
    out = damaged(made, tmp_path / "other", lambda tensors: tensors.update({name: tensors[name].half()}), name)
    (problem,) = [one for one in verify(out, against=glm).problems if one.startswith(name)]
    assert "is F16 [64], BF16 [64] in the source" in problem
    out = Path(shutil.copytree(made, tmp_path / "unlisted"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"].remove(f"{LAYER}.eh_proj")
    (out / "config.json").write_text(json.dumps(config))
    assert f"{LAYER}.eh_proj is not quantized but is not on the skip list" in verify(resummed(out)).problems


def test_others_builds_may_hold_them_in_any_way_or_not_at_all(glm: Path, made: Path, tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.experts.1.up_proj"

    def pack(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.weight_packed": torch.zeros(32, 8, dtype=torch.int32)}
        tensors |= {f"{name}.weight_scale": torch.ones(32, 2).bfloat16()}

    packed = damaged(made, tmp_path / "packed", pack, f"{name}.weight")
    for file in ("qconv-report.json", CHECKSUMS_NAME):
        (packed / file).unlink()
    found = verify(packed, against=glm)
    assert not found.problems
    assert any("MTP" in notice and "not looked at" in notice for notice in found.notices)
    assert any("1 tensors of MTP" in notice and "missing" in notice for notice in found.notices)


def test_the_runtime_does_not_load_them(glm: Path, made: Path, source: Callable[[str], Path], tmp_path: Path) -> None:
    plain = build(source("glm4_moe"), tmp_path / "plain", small_recipe()).out
    with torch.no_grad():
        expected = qconv.load(plain, dtype="float32")(IDS).logits
        assert torch.equal(qconv.load(made, dtype="float32")(IDS).logits, expected)
        assert torch.allclose(torch.stack(list(stream_logits(glm, list(IDS), dtype="float32"))), expected, atol=3.0)
    assert inspect(made).format == "w4a16"
    assert inspect(made).known


def test_a_tensor_that_nobody_declares_is_refused(glm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(glm, tmp_path / "model"))
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.4.eh_proj.weight": torch.zeros(2, 2)}))
    refused(folder, "1 tensors are not part of a glm4_moe model", "'model.layers.4.eh_proj.weight'")
    assert any("'model.layers.4.eh_proj.weight': quantize will refuse" in one for one in _notices(folder))
    inside = Path(shutil.copytree(glm, tmp_path / "inside"))
    edit_tensors(inside, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.zeros(2, 2)}))
    refused(inside, "'model.layers.2.eh_proj.weight'")


def _notices(folder: Path) -> tuple[str, ...]:
    """What a plan says where an index lists the tensors."""
    names = {name: "model.safetensors" for name in tensors_of(folder)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return estimate(folder, RECIPE).notices


def test_without_shards_a_plan_counts_what_the_index_leaves(glm: Path, tmp_path: Path) -> None:
    shutil.copyfile(glm / "config.json", tmp_path / "config.json")
    tensors = tensors_of(glm)
    names = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")

    def planned(metadata: dict[str, int]) -> Estimate:
        (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": metadata, "weight_map": names}))
        return estimate(tmp_path, RECIPE)

    found = planned({})
    said = f"{len(mtp_tensors())} tensors beside the model"
    assert any(said in notice and "not counted" in notice for notice in found.notices)
    assert not any(unit.key.startswith("verbatim") for unit in found.plan.units)
    total = sum(one.nbytes for one in tensors.values())
    counted = planned({"total_size": total})
    assert any(said in notice and "that the index leaves for them" in notice for notice in counted.notices)
    assert counted.source_bytes == total
    beside = total - found.source_bytes
    assert counted.output_bytes == found.output_bytes + beside
    # What float32 and int64 tensors take is counted as bf16.
    assert counted.weights == found.weights + beside // 2
    for wrong in (-1, 0, 2**60, True, 5):
        assert planned({"total_size": wrong}).output_bytes == found.output_bytes


def test_fp8_is_dequantized_once_and_said(source: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source("glm4_moe"), tmp_path / "model"))
    codes = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.37]])
    name = f"{LAYER}.eh_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update(mtp_tensors() | {name: codes, f"{name}_scale_inv": scale}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    made = build(folder, tmp_path / "out", small_recipe()).out
    assert same_bits(tensors_of(made)[name], (codes.float() * 0.37).bfloat16())
    (part,) = json.loads((made / "qconv-report.json").read_text())["verbatim"]
    assert part["dequantized"] == 1
    assert "1 of them, stored quantized, are dequantized once" in (made / "README.md").read_text()
    assert not verify(made, against=folder).problems
    assert estimate(folder, small_recipe()).output_bytes == sum(
        file.stat().st_size for file in made.glob("*.safetensors")
    )


def test_a_gguf_file_leaves_them_out_and_says_so(glm: Path, made: Path, tmp_path: Path) -> None:
    """Beside a build that has a place for them, in one run."""
    log: list[str] = []
    gguf = parse_gguf_recipe({"type": "Q8_0"})
    recipes: dict[str, Recipe | GgufRecipe] = {"q8": gguf, "w4a16": RECIPE}
    quantize_several(glm, tmp_path / "out", recipes, threads=1, progress=lambda *_: None, log=log.append)
    out, said = tmp_path / "out" / "q8", f"{len(mtp_tensors())} tensors of MTP"
    assert any(said in line and "left out" in line for line in log)
    assert said in (out / "README.md").read_text()
    (part,) = json.loads((out / "qconv-report.json").read_text())["left_out"]
    assert part["part"] == "MTP"
    assert not verify_gguf(out, against=glm).problems
    assert any(said in notice and "left out" in notice for notice in outline(glm, gguf).notices)
    shards = {name: data for name, data in folder_bytes(tmp_path / "out" / "w4a16").items() if name.startswith("model")}
    assert shards == {name: data for name, data in folder_bytes(made).items() if name.startswith("model")}


def test_elements_that_share_bytes_are_refused(glm: Path) -> None:
    entry = Source.open(glm).checkpoint.entry(f"{LAYER}.enorm.weight")
    with pytest.raises(CheckpointError, match="F4"):
        Verbatim.of(replace(entry, packed="F4"), "MTP", False)
