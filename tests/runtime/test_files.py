"""Safetensors builds as other tools write them, made from ours by rewriting tensors and config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qconv
from qconv.core.qtensor import Grid
from qconv.errors import CheckpointError
from qconv.formats import get_format, gptq
from qconv.formats.packed import unpack_rows
from qconv.runtime.dense import write_dense
from qconv.runtime.files import open_files
from qconv.runtime.packed import IntegerWeight
from qconv.runtime.stream import stream_logits
from tests.conftest import build, random_qtensor, small_recipe

IDS = torch.arange(3, 43)


def logits(path: Path) -> Tensor:
    """[length, vocabulary] in float32."""
    model = qconv.load(path, dtype=torch.float32)
    with torch.no_grad():
        output: Tensor = model(IDS.unsqueeze(0)).logits[0]
    return output


def rewrite(source: Path, out: Path, edit: Callable[[dict[str, Tensor]], None], **section: Any) -> Path:
    """A copy in one shard with other tensors and other keys of its ``quantization_config``; None removes a key."""
    tensors: dict[str, Tensor] = {}
    for shard in source.glob("*.safetensors"):
        tensors |= load_file(shard)
    edit(tensors)
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    merged = config["quantization_config"] | section
    config["quantization_config"] = {key: value for key, value in merged.items() if value is not None}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def eight_bits(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``moe`` rounded to eight bits in compressed-tensors' words."""
    recipe = small_recipe(grid={"bits": 8})
    return build(moe, tmp_path_factory.mktemp("files") / "build", recipe).out


@pytest.mark.parametrize("desc_act", [False, True])
def test_gptqs_asymmetric_zero_points_less_one(moe: Path, tmp_path: Path, desc_act: bool) -> None:
    """``checkpoint_format: gptq`` of a grid that qconv itself writes as ``gptq_v2``."""
    ordering = {"ordering": "desc_act" if desc_act else "static"}
    recipe = small_recipe("gptq" if desc_act else "rtn", "gptq", grid={"symmetric": False}, gptq=ordering)
    made = build(moe, tmp_path / "build", recipe).out

    def less_one(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            zeros = gptq.unpack_words(tensors[name], 4)
            assert int(zeros.min()) > 0
            tensors[name] = gptq.pack_words(zeros - 1, 4)

    out = rewrite(made, tmp_path / "v1", less_one, checkpoint_format="gptq")
    assert torch.equal(logits(out), logits(made))


def test_groups_in_their_order_need_no_g_idx(moe: Path, tmp_path: Path) -> None:
    made = build(moe, tmp_path / "build", small_recipe("rtn", "gptq")).out

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            del tensors[name]

    assert torch.equal(logits(rewrite(made, tmp_path / "bare", drop)), logits(made))


@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.experts.3.up_proj"])
def test_biases_that_config_says_nothing_of(moe: Path, tmp_path: Path, part: str) -> None:
    """AutoGPTQ stored one for every linear, of zeros where the model has none; another one counts or is refused."""
    made = build(moe, tmp_path / "build", small_recipe("rtn", "gptq")).out
    linear = f"model.layers.1.{part}"

    def store(tensors: dict[str, Tensor], value: float) -> None:
        for name in [name for name in tensors if name.endswith(".scales")]:
            tensors[name.replace("scales", "bias")] = torch.zeros(tensors[name].shape[1])
        tensors[f"{linear}.bias"] += value

    zeros = rewrite(made, tmp_path / "zeros", lambda tensors: store(tensors, 0.0))
    assert torch.equal(logits(zeros), logits(made))
    others = rewrite(made, tmp_path / "others", lambda tensors: store(tensors, 0.5))
    if "experts" not in part:
        bias = qconv.load(others).get_submodule(linear).bias
        assert torch.equal(bias, torch.full_like(bias, 0.5))
    else:
        with pytest.raises(CheckpointError, match=rf"{linear} has a bias that is not zero"):
            qconv.load(others)
        with pytest.raises(CheckpointError, match=rf"{linear} has a bias that is not zero"):
            list(stream_logits(others, [IDS]))
    with pytest.raises(CheckpointError, match=rf"{linear} has a bias that is not zero"):
        write_dense(others, tmp_path / "dense", torch.float32)


def to_whole_numbers(tensors: dict[str, Tensor]) -> None:
    """Words of four codes, each with 128 added, become int8."""
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        codes = unpack_rows(tensors.pop(name), 8).to(torch.int16) - 128
        tensors[name.replace("weight_packed", "weight")] = codes.to(torch.int8)
        del tensors[name.replace("weight_packed", "weight_shape")]


def test_int_quantized_is_pack_quantized_written_out(eight_bits: Path, tmp_path: Path) -> None:
    whole = rewrite(eight_bits, tmp_path / "whole", to_whole_numbers, format="int-quantized")
    assert torch.equal(logits(whole), logits(eight_bits))
    streamed = next(iter(stream_logits(whole, [IDS], dtype="float32")))
    assert float((streamed - logits(whole)).abs().max()) < 1e-5 * float(streamed.abs().max())


def test_int_quantized_of_another_kind_is_refused(eight_bits: Path, moe: Path, tmp_path: Path) -> None:
    zero_points = build(moe, tmp_path / "build", small_recipe(grid={"bits": 8, "symmetric": False})).out
    with pytest.raises(CheckpointError, match=r"config\.json: int-quantized weights with symmetric false"):
        qconv.load(rewrite(zero_points, tmp_path / "zero points", lambda _: None, format="int-quantized"))

    def cut(tensors: dict[str, Tensor]) -> None:
        to_whole_numbers(tensors)
        name = "model.layers.1.self_attn.o_proj.weight"
        tensors[name] = tensors[name][:, :32]

    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor '.*o_proj\.weight' is int8 \[64, 32\]"):
        qconv.load(rewrite(eight_bits, tmp_path / "cut", cut, format="int-quantized"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_head_is_loaded_and_streamed(moe: Path, tmp_path: Path, symmetric: bool) -> None:
    made = build(moe, tmp_path / "build", small_recipe(grid={"symmetric": symmetric})).out
    grid = Grid(4, 32, symmetric, torch.bfloat16)

    def pack_head(tensors: dict[str, Tensor]) -> None:
        rows, columns = tensors.pop("lm_head.weight").shape
        head = random_qtensor(grid, rows, columns, seed=0)
        tensors |= dict(get_format("w4a16").pack("lm_head", head))

    out = rewrite(made, tmp_path / "head", pack_head)
    linear = open_files(out).architecture.lm_head
    assert linear is not None
    whole = open_files(out).weight(linear).dequantize(torch.float32)
    assert torch.equal(open_files(out).rows(linear, 16, 40).dequantize(torch.float32), whole[16:40])
    loaded, plain = logits(out), logits(made)
    assert not torch.allclose(loaded, plain, rtol=0.1)
    streamed = next(iter(stream_logits(out, [IDS], dtype="float32")))
    assert float((streamed - loaded).abs().max()) < 1e-5 * float(loaded.abs().max())


def test_groups_of_inputs_in_an_order_of_their_own(rtn_build: Path, tmp_path: Path) -> None:
    """compressed-tensors' ``actorder: group``: the same codes, other groups."""
    name = "model.layers.0.self_attn.o_proj"
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).to(torch.int32) // 32

    def reorder(tensors: dict[str, Tensor]) -> None:
        for packed in [key for key in tensors if key.endswith(".weight_packed")]:
            columns = tensors[packed].shape[1] * 8
            index = order if packed.startswith(name) else torch.arange(columns, dtype=torch.int32) // 32
            tensors[packed.replace("packed", "g_idx")] = index

    groups = json.loads((rtn_build / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["actorder"] = "group"
    out = rewrite(rtn_build, tmp_path / "ordered", reorder, config_groups=groups)
    linear = open_files(out).architecture.layers[0].heads.o
    before, after = (open_files(path).weight(linear) for path in (rtn_build, out))
    assert isinstance(before, IntegerWeight)
    codes, scales = before.unpack().codes.float() - 8, before.unpack().scales.float()
    assert torch.equal(after.dequantize(torch.float32), codes * scales[:, order.long()])
    assert not torch.equal(logits(out), logits(rtn_build))
    tensors = load_file(out / "model.safetensors")
    tensors[f"{name}.weight_g_idx"][5] = 3
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"o_proj\.weight_g_idx: names a group that there is not"):
        open_files(out).weight(linear).dequantize(torch.float32)


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ({"quant_method": "awq", "version": "gemv", "bits": 4, "zero_point": True}, "AWQ of version 'gemv'"),
        ({"quant_method": "awq", "version": "gemm", "bits": 3, "zero_point": True}, "'gemm' with 3 bits"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True, "group_size": 0}, "group_size is 0"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "bits is 5; GPTQ is read with 2, 3, 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "is 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "is_marlin_format": True}, "is_marlin_format is True"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "lm_head": True}, "lm_head is True"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"down": {"bits": 8}}}, "the rule 'down'"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config is"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
        ({"config_groups": {}}, "config_groups is no group that tells how linears are quantized"),
        ({"config_groups": {"a": {"weights": {"num_bits": 3, "strategy": "group"}}}}, "weights is 3-bit int"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "tensor"}}}}, "strategy is 'tensor'"),
    ],
)
def test_what_is_not_read_is_refused_by_file_key_and_remedy(
    section: dict[str, Any], error: str, rtn_build: Path, tmp_path: Path
) -> None:
    others = {"format": None, "version": None} if "quant_method" in section else {}
    out = rewrite(rtn_build, tmp_path / "out", lambda _: None, **others | section)
    with pytest.raises(CheckpointError, match=error) as refusal:
        qconv.load(out)
    assert str(refusal.value).startswith(f"{out / 'config.json'}: ")
    assert refusal.value.hint


def test_awqs_zero_points_are_read_whatever_config_says_of_them(awq_build: Path, tmp_path: Path) -> None:
    assert torch.equal(
        logits(rewrite(awq_build, tmp_path / "out", lambda _: None, zero_point=False)), logits(awq_build)
    )


def test_scales_count_in_the_dtype_that_they_are_stored_in(awq_build: Path, tmp_path: Path) -> None:
    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if name.endswith(".scales")}

    out = rewrite(awq_build, tmp_path / "out", shorten)
    linear = open_files(out).architecture.layers[1].heads.v
    before, after = (open_files(path).weight(linear) for path in (awq_build, out))
    assert isinstance(before, IntegerWeight)
    weight = before.unpack()
    rounded = replace(weight, scales=weight.scales.bfloat16()).dequantize(torch.float32)
    assert torch.equal(after.dequantize(torch.float32), rounded)
    assert not torch.equal(before.dequantize(torch.float32), rounded)
    assert not torch.equal(logits(out), logits(awq_build))


def test_keys_that_say_nothing_about_weights_are_no_reason(rtn_build: Path, tmp_path: Path) -> None:
    """A cache's scheme, its scales, a list of exceptions with expressions that are met by nobody."""

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.02])

    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    ignore = ["lm_head", r"re:.*mlp\.gate$", r"re:.*visual.*"]
    out = rewrite(rtn_build, tmp_path / "out", add, kv_cache_scheme=scheme, ignore=ignore, sparsity_config=None)
    assert torch.equal(logits(out), logits(rtn_build))
