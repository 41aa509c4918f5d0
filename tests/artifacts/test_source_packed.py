"""Packed integers as sources: what they read as, what a build of one is, and what is refused with which words."""

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

from qconv.artifacts.source import Source
from qconv.checkpoint import reader
from qconv.checkpoint.reader import INDEX_NAME, SINGLE_NAME, Checkpoint
from qconv.planning.estimate import estimate
from qconv.runtime.dense import write_dense
from qconv.verification.build import verify
from tests.artifacts.test_source import edit_tensors, refused
from tests.conftest import build, folder_bytes, small_recipe
from tests.fp8 import same_bits

Edit = Callable[..., None]
MODULE = "model.layers.1.mlp.experts.3.down_proj"
GROUP = 32


def pack(numbers: Tensor, bits: int = 4) -> Tensor:
    """Words of whole numbers from -2^(bits-1) on, int32 [rows, columns * bits / 32], one after the other by hand."""
    each = 32 // bits
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // each, dtype=torch.int64)
    for place in range(each):
        words |= (numbers[:, place::each].long() + (1 << (bits - 1))) << (bits * place)
    return (words - (words >> 31 << 32)).to(torch.int32)


def write_packed(model: Path, folder: Path, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """A model as Kimi's are published, experts in 4 bits by groups of 32 and the rest ignored, and its dense twin."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: one for file in sorted(model.glob("*.safetensors")) for name, one in load_file(file).items()}
    packed, dense, ignored = {}, dict(tensors), []
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if ".experts." not in name:
            packed[name] = tensor
            ignored += [module] if tensor.dim() == 2 else []
            continue
        rows, columns = tensor.shape
        numbers = torch.randint(-8, 8, (rows, columns), generator=generator)
        scale = (torch.rand(rows, columns // GROUP, generator=generator) * 0.05 + 0.001).to(scale_dtype)
        packed[f"{module}.weight_packed"] = pack(numbers)
        packed[f"{module}.weight_scale"] = scale
        packed[f"{module}.weight_shape"] = torch.tensor([rows, columns])
        for group in range(columns // GROUP):
            part = slice(group * GROUP, (group + 1) * GROUP)
            dense[name][:, part] = (numbers[:, part].float() * scale[:, group, None].float()).bfloat16()
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ignored,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    config = json.loads((model / "config.json").read_text())
    for name, content, changes in (("packed", packed, {"quantization_config": section}), ("dense", dense, {})):
        shutil.copytree(model, folder / name, ignore=shutil.ignore_patterns("*.safetensors", INDEX_NAME))
        save_file(content, folder / name / SINGLE_NAME)
        (folder / name / "config.json").write_text(json.dumps(config | changes))
    return folder / "packed", folder / "dense"


@pytest.fixture(scope="module")
def twins(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """``moe`` with packed experts and that, dequantized; do not write to them."""
    return write_packed(moe, tmp_path_factory.mktemp("twins"))


@pytest.fixture
def packed_copy(twins: tuple[Path, Path], tmp_path: Path) -> Path:
    """The packed one, to be damaged."""
    return Path(shutil.copytree(twins[0], tmp_path / "model"))


def assert_same_tensors(ours: Source, theirs: Source) -> None:
    """Both have the same tensors, whole and in blocks."""
    assert ours.checkpoint.entries.keys() == theirs.checkpoint.entries.keys()
    for name, entry in ours.checkpoint.entries.items():
        twin = theirs.checkpoint.entry(name)
        assert (entry.dtype, entry.shape, entry.nbytes) == (twin.dtype, twin.shape, twin.nbytes)
        assert same_bits(ours.read(name), theirs.read(name)), name
        for one, other in zip(ours.blocks(name), theirs.blocks(name), strict=True):
            assert same_bits(one, other), name


def assert_twins(packed: Path, dense: Path) -> None:
    """Both read as the same tensors, whole, in blocks and by rows."""
    ours, theirs = Source.open(packed), Source.open(dense)
    assert_same_tensors(ours, theirs)
    assert "quantization_config" not in ours.checkpoint.config
    rows = torch.tensor([31, 0, 7, 31, 13])
    weight = f"{MODULE}.weight"
    assert same_bits(ours.checkpoint.gather(weight, rows), theirs.checkpoint.gather(weight, rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_reads_as_its_dense_twin(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    packed, dense = write_packed(moe, tmp_path, dtype)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * 64 * 2)
    assert_twins(packed, dense)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grid": {"group_size": 32, "symmetric": False}},
        {"grid": {"group_size": -1, "bits": 8}},
        {"skip": ["*.o_proj"]},
    ],
    ids=["symmetric", "asymmetric", "8 bits by row", "o_proj left dense"],
)
def test_what_qconv_wrote_is_a_source(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    made = build(moe, tmp_path / "made", small_recipe("rtn", "w4a16", **changes)).out
    write_dense(made, tmp_path / "dense", torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(moe / name, tmp_path / "dense" / name)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * 64 * 2)
    assert_twins(made, tmp_path / "dense")


BUILDS = {"rtn": small_recipe(), "gptq": small_recipe("gptq", "gptq"), "awq": small_recipe("awq", "awq")}


@pytest.mark.parametrize("method", BUILDS)
def test_a_build_is_the_dense_twins_to_the_byte(twins: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    packed, dense = twins
    logged: list[str] = []
    ours = build(packed, tmp_path / "ours", BUILDS[method], log=logged.append).out
    theirs = build(dense, tmp_path / "theirs", BUILDS[method]).out
    assert any("36 weights are packed integers of 4 bits, read as BF16" in line for line in logged)
    left, right = folder_bytes(ours), folder_bytes(theirs)
    assert left.keys() == right.keys()
    # What is left names the source or its fingerprint.
    differing = {path for path in left if left[path] != right[path]}
    assert differing == {"README.md", "SHA256SUMS", "qconv-report.json"}
    assert not verify(ours, against=packed).problems
    assert not verify(ours, against=dense).problems


def test_plan_counts_the_stored_bytes(twins: tuple[Path, Path], tmp_path: Path) -> None:
    packed, _ = twins
    stored = Checkpoint.open(packed).entries
    ours, theirs = (estimate(path, small_recipe()) for path in twins)
    assert ours.source_bytes == sum(entry.nbytes for entry in stored.values())
    assert ours.dtype == "INT4 and BF16"
    assert (ours.weights, ours.output_bytes) == (theirs.weights, theirs.output_bytes)
    folder = Path(shutil.copytree(packed, tmp_path / "index"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(stored, SINGLE_NAME)}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    planned = estimate(folder, small_recipe())
    assert planned.notices == ()
    assert planned.source_bytes == ours.source_bytes


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "no scale": (
        lambda tensors: tensors.pop(f"{MODULE}.weight_scale"),
        (f"'{MODULE}.weight_packed' has no '{MODULE}.weight_scale' beside it",),
    ),
    "no shape": (
        lambda tensors: tensors.pop(f"{MODULE}.weight_shape"),
        (f"'{MODULE}.weight_packed' has no '{MODULE}.weight_shape' beside it",),
    ),
    "a scale without codes": (
        lambda tensors: tensors.pop(f"{MODULE}.weight_packed"),
        (f"'{MODULE}.weight_s", "belongs to no packed weight"),
    ),
    "groups of another size": (
        lambda tensors: tensors.update({f"{MODULE}.weight_scale": torch.ones(64, 2)}),
        (f"'{MODULE}.weight_scale' is F32 [64, 2]", "needs [64, 1]"),
    ),
    "a scale of integers": (
        lambda tensors: tensors.update({f"{MODULE}.weight_scale": torch.ones(64, 1, dtype=torch.int32)}),
        (f"'{MODULE}.weight_scale' is I32 [64, 1]", "BF16, F16, F32"),
    ),
    "half of the codes": (
        lambda tensors: tensors.update({f"{MODULE}.weight_packed": torch.zeros(32, 4, dtype=torch.int32)}),
        (f"'{MODULE}.weight_scale' is BF16 [64, 1]", "needs [32, 1]"),
    ),
    "codes that are no words": (
        lambda tensors: tensors.update({f"{MODULE}.weight_packed": torch.zeros(64, 16, dtype=torch.uint8)}),
        (f"'{MODULE}.weight_packed' is U8 [64, 16]",),
    ),
    "a dense weight besides": (
        lambda tensors: tensors.update({f"{MODULE}.weight": torch.zeros(64, 32, dtype=torch.bfloat16)}),
        (f"'{MODULE}.weight' is there densely and packed",),
    ),
    "a router's scale": (
        lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight_scale": torch.ones(6, 1)}),
        ("'model.layers.0.mlp.gate.weight_scale' belongs to no packed weight",),
    ),
    "a weight of another shape": (
        lambda tensors: tensors.update(
            {
                f"{MODULE}.weight_packed": torch.zeros(64, 8, dtype=torch.int32),
                f"{MODULE}.weight_scale": torch.ones(64, 2, dtype=torch.bfloat16),
            }
        ),
        (f"'{MODULE}.weight' is [64, 64], config.json implies [64, 32]",),
    ),
    "an unknown tensor": (
        lambda tensors: tensors.update({f"{MODULE}.weight_other": torch.ones(2)}),
        (f"the first '{MODULE}.weight_other'",),
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_parts_that_do_not_belong_together(packed_copy: Path, case: str) -> None:
    change, said = CHANGES[case]
    refused(edit_tensors(packed_copy, change), SINGLE_NAME, *said)


KIMI = ["lm_head", r"re:.*self_attn.*", r"re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
"""What Kimi-K2-Thinking's config.json ignores."""


@pytest.mark.parametrize("place", ["text_config", "top"])
def test_as_kimi_says_it(
    twins: tuple[Path, Path], packed_copy: Path, tmp_path: Path, edit_json: Edit, place: str
) -> None:
    config = json.loads((packed_copy / "config.json").read_text())
    section = config["quantization_config"] | {"ignore": KIMI, "kv_cache_scheme": None}
    if place == "top":
        edit_json(packed_copy / "config.json", quantization_config=section)
    else:
        text = {"model_type": "qwen3_moe", "quantization_config": section}
        edit_json(packed_copy / "config.json", quantization_config=None, text_config=config | text)

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in [one for one in tensors if one.endswith("weight_shape")]:
            tensors[name] = tensors[name].int()

    edit_tensors(packed_copy, narrow)
    ours, theirs = Source.open(packed_copy), Source.open(twins[1])
    for name in theirs.checkpoint.entries:
        assert same_bits(ours.read(name), theirs.read(name)), name
    assert "quantization_config" not in json.dumps(ours.checkpoint.config)
    planned = estimate(packed_copy, small_recipe())
    assert planned.source_bytes == estimate(twins[0], small_recipe()).source_bytes
    made = build(packed_copy, tmp_path / "out", small_recipe()).out
    assert json.loads((made / "config.json").read_text())["quantization_config"]["ignore"] != KIMI
    assert (made / "config.json").read_text().count("quantization_config") == 1
    assert not verify(made, against=packed_copy).problems


def test_a_config_of_other_bits(packed_copy: Path, edit_json: Edit) -> None:
    section = json.loads((packed_copy / "config.json").read_text())["quantization_config"]
    weights = section["config_groups"]["group_0"]["weights"]
    weights["num_bits"] = 3
    edit_json(packed_copy / "config.json", quantization_config=section)
    refused(packed_copy, "config.json: quantization_config.weights is 3-bit int")
    weights["num_bits"] = 8
    edit_json(packed_copy / "config.json", quantization_config=section)
    refused(packed_copy, "is not what config.json says: group size 32 does not divide its 16 input features")
    section["config_groups"]["group_0"]["targets"] = ["re:.*gate_proj$"]
    edit_json(packed_copy / "config.json", quantization_config=section)
    refused(packed_copy, "is packed, but no config group of config.json targets it")


def test_a_shape_that_contradicts_its_codes(packed_copy: Path, tmp_path: Path) -> None:
    edit_tensors(packed_copy, lambda tensors: tensors.update({f"{MODULE}.weight_shape": torch.tensor([32, 64])}))
    with pytest.raises(Exception, match=r"weight_shape is \[32, 64\], its weight_packed holds \[64, 32\]") as caught:
        build(packed_copy, tmp_path / "out", small_recipe())
    assert MODULE in str(caught.value)


def test_a_scale_that_is_not_finite(packed_copy: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{MODULE}.weight_scale"][5, 0] = float("inf")

    edit_tensors(packed_copy, damage)
    with pytest.raises(Exception, match=r"weight_scale' holds 1 values that are not finite, the first at \[5, 0\]"):
        build(packed_copy, tmp_path / "out", small_recipe())


def test_a_dense_checkpoint_that_says_packed(twins: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(twins[1], tmp_path / "model"))
    shutil.copyfile(twins[0] / "config.json", folder / "config.json")
    refused(folder, "config.json says pack-quantized, but no tensor is a weight_packed")
