"""From GGUF to safetensors and from builds to GGUF: the same numbers, of every family, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.output import Outcome
from qconv.checkpoint.reader import Checkpoint
from qconv.conversion.pipeline import Wanted, convert
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.reader import GgufModel
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.verification.build import verify
from qconv.verification.gguf import verify_gguf
from tests.conftest import build, folder_bytes, random_model, save_model, small_recipe
from tests.gguf_families import MODELS, saved

SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "norm_topk_prob": True}
CODED = ["Q4_0", "Q8_0", "MXFP4_MOE"]


def converted(path: Path, out: Path, layout: str, **options: Any) -> Outcome:
    said = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None, **options}
    return convert(path, out, Wanted(layout, said.pop("size", None)), **said)


def to_gguf(model: Path, out: Path, type: str) -> Path:
    recipe = parse_gguf_recipe({"format": "gguf", "type": type})
    quantize_gguf(model, out, recipe, progress=lambda *_: None, log=lambda _: None)
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model("qwen3_moe", **SIZES), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def files(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {type: to_gguf(source, folder / type, type) for type in (*CODED, "Q4_K_M", "F16")}


def held(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a GGUF model, decoded by the gguf package."""
    model = GgufModel.open(folder)
    found = {}
    for file in model.files:
        for tensor in gguf.GGUFReader(file).tensors:
            found[tensor.name] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
    for name in [name for name in found if name.endswith(".scale")]:
        scales, weight = found.pop(name), name.removesuffix("scale") + "weight"
        found[weight] *= scales.view(-1, *(1,) * (found[weight].dim() - 1))
    return found


def in_gguf(folder: Path, out: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint in float32 as a GGUF of it holds it."""
    return held(to_gguf(folder, out, "F32"))


OTHERS = {"qwen3_moe": {"norm_topk_prob": True}, "llama": {}, "mixtral": {}, "qwen3": {}}
NEVER_THE_SAME = ("A_log",)
"""llama.cpp holds a function of them, which is undone in float32."""


@pytest.mark.parametrize("family", [*OTHERS, *MODELS])
def test_there_and_back_every_tensor_of_a_family_is_the_same(family: str, tmp_path: Path) -> None:
    if family in MODELS:
        model = saved(family, tmp_path / "model")[1]
    else:
        model = save_model(random_model(family, **OTHERS[family]), tmp_path / "model")
    whole = to_gguf(model, tmp_path / "gguf", "F32")
    converted(whole, tmp_path / "back", "f32", like=model)
    source, back = Source.open(model), Source.open(tmp_path / "back")
    assert back.architecture.family == source.architecture.family
    for name, _ in source.architecture.tensors():
        before, after = source.read(name).float(), back.read(name).float()
        if name.endswith(NEVER_THE_SAME):
            assert torch.allclose(before, after, rtol=1e-6), name
        else:
            assert torch.equal(before, after), name


@pytest.mark.parametrize("like", [False, True])
@pytest.mark.parametrize("type", CODED)
def test_codes_become_those_of_compressed_tensors_and_come_back(
    type: str, like: bool, files: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    out = converted(files[type], tmp_path / "there", "compressed-tensors", like=source if like else None)
    assert out.report["converted"]["rounded_again"] == {}
    assert not verify(tmp_path / "there", None).problems
    made = Build.open(tmp_path / "there")
    before = held(files[type])
    name = "model.layers.1.mlp.experts.3.down_proj"
    linear = next(one for layer in made.architecture.layers for one in layer.linears() if one.name == name)
    assert torch.equal(made.qtensor(linear).dequantize(), before["blk.1.ffn_down_exps.weight"][3])
    converted(tmp_path / "there", tmp_path / "back", "gguf")
    after = held(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert not verify_gguf(tmp_path / "back", None).problems


@pytest.mark.parametrize(
    ("output_format", "grid", "type"),
    [
        ("w4a16", {"group_size": 32}, "Q4_0"),
        ("w4a16", {"group_size": 64}, "Q4_0"),
        ("gptq", {"group_size": 128}, "Q4_0"),
        ("gptq", {"bits": 3, "group_size": 32}, "Q4_0"),
        ("w4a16", {"bits": 8, "group_size": 32}, "Q8_0"),
        ("w8a8", {"bits": 8, "group_size": -1}, "Q8_0"),
        ("mxfp4", {"group_size": 32}, "MXFP4"),
        ("nvfp4", {"group_size": 16}, "NVFP4"),
        ("nvfp4_modelopt", {"group_size": 16}, "NVFP4"),
    ],
)
def test_builds_become_blocks_of_the_same_numbers(
    output_format: str, grid: dict[str, int], type: str, source: Path, tmp_path: Path
) -> None:
    build(source, tmp_path / "build", small_recipe("rtn", output_format, grid=grid))
    converted(tmp_path / "build", tmp_path / "out", "gguf")
    types = {name: entry.type.name for name, entry in GgufModel.open(tmp_path / "out").entries.items()}
    assert types["blk.0.ffn_gate_exps.weight"] == types["blk.1.attn_q.weight"] == type
    converted(tmp_path / "build", tmp_path / "dense", "f32")
    expected, found = in_gguf(tmp_path / "dense", tmp_path / "expected"), held(tmp_path / "out")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert not verify_gguf(tmp_path / "out", source).problems


def test_plain_layouts_are_code_times_scale_rounded_once(files: dict[str, Path], source: Path, tmp_path: Path) -> None:
    converted(files["Q4_K_M"], tmp_path / "bf16", "bf16", like=source)
    converted(files["Q4_K_M"], tmp_path / "gguf", "gguf:F16")
    before = held(files["Q4_K_M"])
    whole, dense = held(tmp_path / "gguf"), Checkpoint.open(tmp_path / "bf16")
    for name, values in before.items():
        wanted = values.half().float() if values.dim() > 1 and "gate_inp" not in name else values
        assert torch.equal(whole[name], wanted), name
    experts = before["blk.0.ffn_up_exps.weight"]
    assert torch.equal(dense.read("model.layers.0.mlp.experts.2.up_proj.weight"), experts[2].bfloat16())
    assert (tmp_path / "bf16" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_what_has_no_place_is_named_and_nothing_is_written(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="blocks of Q4_K are no codes"):
        converted(files["Q4_K_M"], tmp_path / "out", "compressed-tensors")
    with pytest.raises(UsageError, match="holds no codes"):
        converted(files["F16"], tmp_path / "out", "w4a16")
    assert not (tmp_path / "out").exists()


def test_codes_that_a_type_does_not_hold_are_rounded_on_request(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build", small_recipe("rtn", "w4a16", grid={"bits": 8, "group_size": 32}))
    with pytest.raises(UsageError, match="whole numbers from -8 to 7"):
        converted(tmp_path / "build", tmp_path / "out", "gguf:Q4_0")
    outcome = converted(tmp_path / "build", tmp_path / "out", "gguf:Q4_0", requantize=True)
    assert len(outcome.report["converted"]["rounded_again"]) > 10
    assert GgufModel.open(tmp_path / "out").entry("blk.0.attn_q.weight").type.name == "Q4_0"


def test_the_model_that_it_is_like_must_be_that_model(files: dict[str, Path], source: Path, tmp_path: Path) -> None:
    other = save_model(random_model("qwen3_moe", **SIZES, num_experts_per_tok=3), tmp_path / "other")
    with pytest.raises(UsageError, match="num_experts_per_tok is 3"):
        converted(files["Q8_0"], tmp_path / "out", "bf16", like=other)
    dense = save_model(random_model("llama"), tmp_path / "dense")
    with pytest.raises((UsageError, CheckpointError)):
        converted(files["Q8_0"], tmp_path / "out", "bf16", like=dense)
    build(source, tmp_path / "build", small_recipe())
    with pytest.raises(UsageError, match="is for GGUF"):
        converted(tmp_path / "build", tmp_path / "out", "bf16", like=source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["compressed-tensors", "gguf:F16"])
def test_interrupted_it_goes_on_and_ends_with_the_same_bytes(
    layout: str, files: dict[str, Path], tmp_path: Path
) -> None:
    converted(files["Q8_0"], tmp_path / "whole", layout, size=200_000)

    class Stop(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        converted(files["Q8_0"], tmp_path / "out", layout, size=200_000, progress=stop)
    converted(files["Q8_0"], tmp_path / "out", layout, size=200_000)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_damaged_file_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    (file,) = files["Q8_0"].glob("*.gguf")
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError):
        converted(tmp_path / "short.gguf", tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()
