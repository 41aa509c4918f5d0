"""FP8 checkpoints as sources: what they read as, what a build of one is, and what is refused with which words."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.inspection import inspect
from qconv.artifacts.source import Source
from qconv.checkpoint import reader
from qconv.checkpoint.fp8 import Dequantized, Fp8Scheme
from qconv.checkpoint.reader import INDEX_NAME, SINGLE_NAME, Checkpoint
from qconv.errors import CheckpointError
from qconv.planning.estimate import estimate
from qconv.verification.build import verify
from tests.artifacts.test_source import edit_tensors, refused
from tests.conftest import build, folder_bytes, small_recipe
from tests.fp8 import KINDS, SHARDS, Kind, block_fp8, same_bits, write_fp8

Edit = Callable[..., None]

WEIGHT = "model.layers.1.mlp.experts.3.down_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"
GATE_SCALE = SCALE.replace("down_proj", "gate_proj")


@pytest.fixture(scope="session")
def twins(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """``moe`` in block FP8 and that, dequantized; do not write to them."""
    return write_fp8(moe, KINDS["blocks that divide nothing, f16 scales"], tmp_path_factory.mktemp("twins"))


@pytest.fixture
def fp8_copy(twins: tuple[Path, Path], tmp_path: Path) -> Path:
    """The FP8 one, to be damaged."""
    return Path(shutil.copytree(twins[0], tmp_path / "model"))


@pytest.mark.parametrize("name", KINDS)
def test_it_reads_as_its_dense_twin(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fp8, dense = (Source.open(path) for path in write_fp8(moe, KINDS[name], tmp_path))
    assert fp8.checkpoint.entries.keys() == dense.checkpoint.entries.keys()
    assert fp8.dtype == torch.bfloat16
    assert fp8.architecture == dense.architecture
    assert fp8.checkpoint.config == dense.checkpoint.config
    for tensor, entry in fp8.checkpoint.entries.items():
        twin = dense.checkpoint.entry(tensor)
        assert (entry.dtype, entry.shape, entry.nbytes) == (twin.dtype, twin.shape, twin.nbytes)
        assert same_bits(fp8.read(tensor), dense.read(tensor)), tensor
    # In blocks of 7 rows of 64 columns, which no block of scales is made of, and the same ones as of the dense twin.
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * 64 * 2)
    for tensor in fp8.checkpoint.entries:
        for ours, theirs in zip(fp8.blocks(tensor), dense.blocks(tensor), strict=True):
            assert same_bits(ours, theirs), tensor
    rows = torch.tensor([31, 0, 7, 31, 63])
    for tensor in (WEIGHT, "model.embed_tokens.weight"):
        assert same_bits(fp8.checkpoint.gather(tensor, rows), dense.checkpoint.gather(tensor, rows))


@pytest.mark.parametrize("kind", [block_fp8(16, 16, torch.float32), block_fp8(8, 32, torch.bfloat16), KINDS["static"]])
def test_it_reads_as_transformers_reads_it(moe: Path, tmp_path: Path, kind: Kind) -> None:
    """In blocks that divide every weight: of others transformers divides the last one's scale among more rows."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    # transformers knows a static build's scales by names of its own.
    kind = replace(kind, leaf="weight_scale_inv", input_leaf=kind.input_leaf and "activation_scale")
    path, _ = write_fp8(moe, kind, tmp_path)
    source = Source.open(path)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        dtype=torch.bfloat16,
    )
    theirs = model.state_dict()
    for layer in source.architecture.layers:
        for linear in layer.attention.linears():
            assert same_bits(source.read(linear.weight), theirs[linear.weight]), linear.name
        for number, expert in enumerate(layer.mlps()):
            gate, up, down = (source.read(linear.weight) for linear in expert.linears())
            fused = f"{layer.name}.mlp.experts"
            assert same_bits(torch.cat([gate, up]), theirs[f"{fused}.gate_up_proj"][number])
            assert same_bits(down, theirs[f"{fused}.down_proj"][number])


@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 9), across=st.integers(1, 20))
def test_every_code_is_rounded_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rows: int, columns: int, across: int
) -> None:
    """All 256 codes, NaN and the zeros among them, times any finite scale, into each dtype."""
    folder = tmp_path_factory.mktemp("codes")
    bits = torch.arange(256, dtype=torch.uint8).repeat(across).view(-1, across)
    down = math.ceil(len(bits) / rows)
    number = st.floats(-(2.0**99), 2.0**99, width=32)
    blocks = down * math.ceil(across / columns)
    drawn = data.draw(st.lists(number, min_size=1, max_size=8))
    scales = torch.tensor((drawn * blocks)[:blocks]).view(down, -1)
    save_file({"w.weight": bits.view(torch.float8_e4m3fn), "w.weight_scale": scales}, folder / SINGLE_NAME)
    (folder / "config.json").write_text("{}")
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    view = Dequantized.of(Checkpoint.open(folder), Fp8Scheme(rows, columns), dtype)
    found = view.read("w.weight")
    codes = bits.view(torch.float8_e4m3fn).float()
    for row in range(0, len(bits), 17):
        for column in range(across):
            exact = codes[row, column] * scales[row // rows, column // columns]
            if math.isnan(float(exact)):
                assert math.isnan(float(found[row, column]))
            else:
                assert same_bits(found[row, column], exact.to(dtype))


def test_the_fingerprint_holds_every_scale_and_not_samples_of_them(
    fp8_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a shard of the true size the stored checkpoint's own samples would miss one scale, as they do here.
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self: "the same")
    found = set()
    for name in (SCALE, GATE_SCALE):
        found.add(Source.open(fp8_copy).checkpoint.fingerprint())
        tensors = load_file(fp8_copy / SHARDS[1])
        tensors[name][0, 0] *= 2.0
        save_file(tensors, fp8_copy / SHARDS[1])
    found.add(Source.open(fp8_copy).checkpoint.fingerprint())
    assert len(found) == 3


# --- builds ---------------------------------------------------------------------------------------------------------

ODD = "blocks that divide nothing, f16 scales"
BUILDS = {
    "rtn": (ODD, small_recipe()),
    "rtn, o_proj left dense": (ODD, small_recipe(skip=["*.o_proj"])),
    "awq": ("compressed-tensors channel", small_recipe("awq", "awq")),
    "gptq": ("static", small_recipe("gptq", "gptq")),
}


@pytest.mark.parametrize("name", BUILDS)
def test_a_build_is_the_dense_twins_to_the_byte(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, recipe = BUILDS[name]
    fp8, dense = write_fp8(moe, KINDS[kind], tmp_path)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * 64 * 2)
    logged: list[str] = []
    ours = build(fp8, tmp_path / "ours", recipe, log=logged.append).out
    theirs = build(dense, tmp_path / "theirs", recipe).out
    assert any(line.startswith("source: 44 weights are FP8") for line in logged)
    left, right = folder_bytes(ours), folder_bytes(theirs)
    assert left.keys() == right.keys()
    same = {path for path in left if left[path] == right[path]}
    assert {"config.json", INDEX_NAME} | {path for path in left if path.endswith(".safetensors")} <= same
    # What is left names the source or its fingerprint.
    assert left.keys() - same == {"README.md", "SHA256SUMS", "qconv-report.json"}
    for source in (fp8, dense):
        result = verify(ours, source)
        assert not result.problems
        assert result.snr_db == verify(theirs, source).snr_db


def test_a_build_of_another_model_is_told_apart(twins: tuple[Path, Path], fp8_copy: Path, tmp_path: Path) -> None:
    out = build(twins[0], tmp_path / "out", small_recipe()).out
    tensors = load_file(fp8_copy / SHARDS[1])
    tensors[SCALE] *= 2.0
    save_file(tensors, fp8_copy / SHARDS[1])
    assert any(WEIGHT.removesuffix(".weight") in problem for problem in verify(out, fp8_copy).problems)


# --- what else reads it ---------------------------------------------------------------------------------------------


def test_plan_and_inspect_count_the_stored_bytes(moe: Path, tmp_path: Path) -> None:
    fp8, dense = write_fp8(moe, KINDS["blocks"], tmp_path, dense_linears="o_proj")
    stored = sum(entry.nbytes for entry in Checkpoint.open(fp8).entries.values())
    ours, theirs = (estimate(path, small_recipe()) for path in (fp8, dense))
    assert ours.source_bytes == stored
    assert ours.dtype == "F8_E4M3 and BF16"
    assert ours.notices == ()
    assert (ours.weights, ours.output_bytes, ours.costs) == (theirs.weights, theirs.output_bytes, theirs.costs)
    seen = inspect(fp8)
    assert (seen.weights, seen.nbytes) == (theirs.weights, stored)
    (row,) = [one for one in seen.classes if one.name.endswith("experts.*.down_proj")]
    # Eight bits, and a float32 for each block of 32 x 32.
    assert row.bits_per_weight == 8 + 32 / 1024
    # Without an index, the skip list tells.
    (fp8 / INDEX_NAME).unlink()
    assert estimate(fp8, small_recipe()).source_bytes == stored


def test_plan_says_when_index_and_config_do_not_agree(fp8_copy: Path, edit_json: Edit) -> None:
    listed = json.loads((fp8_copy / INDEX_NAME).read_text())["weight_map"]
    edit_json(fp8_copy / INDEX_NAME, weight_map=listed | {"model.norm.weight_scale_inv": SHARDS[1]})
    (notice,) = estimate(fp8_copy, small_recipe()).notices
    assert "1 tensors of the index are not part of the model, the first 'model.norm.weight_scale_inv'" in notice
    plain = {name: shard for name, shard in listed.items() if shard == SHARDS[0]}
    edit_json(fp8_copy / INDEX_NAME, weight_map=plain)
    assert "the index lists no scale" in estimate(fp8_copy, small_recipe()).notices[0]


def test_notices(moe: Path, twins: tuple[Path, Path], tmp_path: Path) -> None:
    (notice,) = Source.open(twins[0]).notices()
    assert notice.startswith("44 weights are FP8 (blocks of 40 x 28), read as BF16")
    assert Source.open(twins[1]).notices() == []
    _, ignored = Source.open(write_fp8(moe, KINDS["static"], tmp_path)[0]).notices()
    assert ignored.startswith("44 scales of static activations or of a cache are ignored, the first 'model.layers.0.")


@pytest.mark.parametrize(
    "leaves",
    [
        ("self_attn.k_scale", "self_attn.v_scale"),  # compressed-tensors
        ("self_attn.q_scale", "self_attn.k_scale", "self_attn.v_scale", "self_attn.prob_scale"),  # Quark
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),  # ModelOpt
        ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),  # AutoFP8
        ("self_attn.kv_scale",),
    ],
    ids=lambda leaves: leaves[0],
)
def test_scales_of_a_cache_are_no_damage(fp8_copy: Path, twins: tuple[Path, Path], leaves: tuple[str, ...]) -> None:
    extra = {f"model.layers.{layer}.{leaf}": torch.ones(()) for layer in (0, 1) for leaf in leaves}
    save_file(load_file(fp8_copy / SHARDS[1]) | extra, fp8_copy / SHARDS[1])
    index = json.loads((fp8_copy / INDEX_NAME).read_text())
    index["weight_map"] |= dict.fromkeys(extra, SHARDS[1])
    (fp8_copy / INDEX_NAME).write_text(json.dumps(index))
    source = Source.open(fp8_copy)
    assert any(notice.startswith(f"{2 * len(leaves)} scales of static") for notice in source.notices())
    assert estimate(fp8_copy, small_recipe()).notices == ()
    assert same_bits(source.read(WEIGHT), Source.open(twins[1]).read(WEIGHT))


# --- what is refused ------------------------------------------------------------------------------------------------


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """An edit of one tensor."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return edit


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "no scale": (lambda tensors: tensors.pop(SCALE), (repr(WEIGHT), "has neither of")),
    "two scales": (
        lambda tensors: tensors.update({SCALE.removesuffix("_inv"): tensors[SCALE].clone()}),
        (repr(WEIGHT), "has both of"),
    ),
    "turned scale": (
        replaced(GATE_SCALE, lambda scale: scale.t().contiguous()),
        (repr(GATE_SCALE), "is F16 [3, 1]; blocks of 40 x 28 of [32, 64] need [1, 3]"),
    ),
    "scale of rows": (
        replaced(SCALE, lambda scale: scale[:, :1].contiguous()),
        (repr(SCALE), "is F16 [2, 1]", "need [2, 2]"),
    ),
    "flat scale": (replaced(SCALE, lambda scale: scale.view(-1)), (repr(SCALE), "is F16 [4]", "need [2, 2]")),
    "scale of another dtype": (
        replaced(SCALE, lambda scale: scale.to(torch.float64)),
        (repr(SCALE), "is F64 [2, 2]", "of BF16, F16, F32"),
    ),
    "stray scale": (
        replaced(WEIGHT, lambda codes: codes.to(torch.bfloat16)),
        (repr(SCALE), "is the scale of no FP8 weight"),
    ),
    "scale without any weight": (
        lambda tensors: tensors.update({"model.layers.7.mlp.weight_scale": torch.ones(1)}),
        ("'model.layers.7.mlp.weight_scale'", "is the scale of no FP8 weight"),
    ),
    "stray activation scale": (
        lambda tensors: tensors.update({"model.norm.input_scale": torch.ones(())}),
        ("'model.norm.input_scale'", "not part of a qwen3_moe model"),
    ),
    "FP8 norm": (
        replaced("model.norm.weight", lambda norm: norm.to(torch.float8_e4m3fn)),
        ("'model.norm.weight'", "F8_E4M3 [64]", "only 2-D weights"),
    ),
    "E5M2": (
        replaced(WEIGHT, lambda codes: codes.float().to(torch.float8_e5m2)),
        (repr(SCALE), "is the scale of no FP8 weight"),
    ),
    "missing weight": (lambda tensors: tensors.pop(WEIGHT), (repr(SCALE), "is the scale of no FP8 weight")),
    "missing norm": (lambda tensors: tensors.pop("model.norm.weight"), ("missing", "'model.norm.weight'")),
    "weight of another shape": (
        replaced(WEIGHT, lambda codes: codes.view(torch.uint8)[:63].contiguous().view(torch.float8_e4m3fn)),
        (repr(WEIGHT), "is [63, 32], config.json implies [64, 32]"),
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_weights_and_scales_that_do_not_belong_together(fp8_copy: Path, case: str) -> None:
    change, parts = FAULTS[case]
    refused(edit_tensors(fp8_copy, change), *parts)


def test_a_truncated_shard(fp8_copy: Path) -> None:
    shard = fp8_copy / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(fp8_copy, shard.name, "truncated")


FP8 = {"quant_method": "fp8"}
GROUP = KINDS["compressed-tensors channel"].section
CONFIGS: list[tuple[Any, str]] = [
    (FP8 | {"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'"),
    (FP8 | {"weight_block_size": [128]}, "weight_block_size is [128]"),
    (FP8 | {"weight_block_size": [0, 128]}, "weight_block_size is [0, 128]"),
    (FP8 | {"weight_block_size": ["128", 128]}, "weight_block_size is ['128', 128]"),
    (FP8 | {"weight_block_size": True}, "weight_block_size is True"),
    (GROUP | {"format": "marlin-24"}, "quantization_config.format is 'marlin-24'"),
    (GROUP | {"transform_config": {"R1": {}}}, "quantization_config.transform_config is {'R1': {}}"),
    (GROUP | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "quantization_config.sparsity_config is"),
    (GROUP | {"config_groups": {}}, "already quantized (quant_method 'compressed-tensors')"),
    (
        GROUP | {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}},
        "already quantized (quant_method 'compressed-tensors')",
    ),
    (
        GROUP | {"config_groups": {**GROUP["config_groups"], "g": {"weights": {"num_bits": 4, "type": "float"}}}},
        "already quantized (quant_method 'compressed-tensors')",
    ),
    (
        GROUP | {"config_groups": {**GROUP["config_groups"], "g": {"weights": {"num_bits": 8, "type": "float"}}}},
        "groups with different scales",
    ),
    (
        GROUP | {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "group"}}}},
        "strategy is 'group'",
    ),
    (
        GROUP | {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "block"}}}},
        "block_structure is None",
    ),
    (
        GROUP | {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "symmetric": False}}}},
        "symmetric is False",
    ),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "already quantized (quant_method 'modelopt')"),
    ({"quant_method": "awq", "bits": 4}, "already quantized (quant_method 'awq')"),
    ({"quant_method": "gptq", "bits": 8}, "already quantized (quant_method 'gptq')"),
    (["fp8"], "already quantized (quant_method None)"),
]


@pytest.mark.parametrize(("section", "part"), CONFIGS, ids=lambda value: str(value)[:70])
def test_a_config_of_another_quantization(fp8_copy: Path, edit_json: Edit, section: Any, part: str) -> None:
    edit_json(fp8_copy / "config.json", quantization_config=section)
    refused(fp8_copy, part)
    with pytest.raises(CheckpointError) as caught:
        estimate(fp8_copy, small_recipe())
    assert part in caught.value.message


def test_blocks_of_another_size_than_the_config_says(fp8_copy: Path, edit_json: Edit) -> None:
    edit_json(fp8_copy / "config.json", quantization_config=FP8 | {"weight_block_size": [32, 32]})
    refused(fp8_copy, "blocks of 32 x 32 of")


def test_codes_without_scales_and_without_a_config(fp8_copy: Path, edit_json: Edit) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_scale" in name]:
            del tensors[name]

    edit_json(fp8_copy / "config.json", quantization_config=None)
    refused(edit_tensors(fp8_copy, strip), "dtype F8_E4M3, a weight must be one of")


def test_a_dense_checkpoint_that_says_fp8(moe_copy: Path, edit_json: Edit) -> None:
    edit_json(moe_copy / "config.json", quantization_config=KINDS["blocks"].section)
    refused(moe_copy, "config.json says FP8 (blocks of 32 x 32), but no tensor is F8_E4M3")


@pytest.mark.parametrize("dtype", ["float8", 3, ["bfloat16"]])
def test_a_dtype_that_is_no_weights(fp8_copy: Path, edit_json: Edit, dtype: Any) -> None:
    edit_json(fp8_copy / "config.json", dtype=dtype)
    refused(fp8_copy, "config.json", f"dtype {dtype!r} is none of bfloat16, float16, float32")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_weights_are_of_the_configs_dtype(fp8_copy: Path, edit_json: Edit, key: str | None) -> None:
    edit_json(fp8_copy / "config.json", dtype=None, torch_dtype=None)
    if key is not None:
        edit_json(fp8_copy / "config.json", **{key: "float32"})
    source = Source.open(fp8_copy)
    assert source.read(WEIGHT).dtype == source.dtype == (torch.bfloat16 if key is None else torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite(fp8_copy: Path, value: float) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[SCALE][1, 0] = value

    source = Source.open(edit_tensors(fp8_copy, damage))
    reads: list[Callable[[], object]] = [
        lambda: source.read(WEIGHT),
        lambda: list(source.blocks(WEIGHT)),
        lambda: source.checkpoint.gather(WEIGHT, torch.tensor([3])),
    ]
    for read in reads:
        with pytest.raises(CheckpointError) as caught:
            read()
        assert f"{SCALE!r} holds 1 values that are not finite, the first at [1, 0]" in caught.value.message


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code(fp8_copy: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHT].view(torch.uint8)[50, 17] = code

    source = Source.open(edit_tensors(fp8_copy, damage))
    message = f"{WEIGHT!r} holds 1 values that are not finite, the first at [50, 17]"
    with pytest.raises(CheckpointError) as caught:
        source.read(WEIGHT)
    assert message in caught.value.message
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * 32 * 2)
    blocks = source.blocks(WEIGHT)
    assert [len(next(blocks)) for _ in range(7)] == [7] * 7
    with pytest.raises(CheckpointError) as caught:
        next(blocks)
    assert message in caught.value.message
