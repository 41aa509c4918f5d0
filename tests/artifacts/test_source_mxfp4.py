"""gpt-oss's MXFP4 as a source: every code and scale, transformers' own reading, builds, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qconv.artifacts.source import Source
from qconv.checkpoint import reader
from qconv.checkpoint.mxfp4 import Mxfp4Checkpoint
from qconv.checkpoint.reader import INDEX_NAME, SINGLE_NAME, Checkpoint
from qconv.core.architecture import Joined
from qconv.models import qwen3_moe
from qconv.planning.estimate import estimate
from qconv.verification.build import verify
from tests.artifacts.test_joined_layouts import EXPERTS, HIDDEN, WIDTH, joined, with_biases
from tests.artifacts.test_source import edit_tensors, refused
from tests.artifacts.test_source_packed import assert_same_tensors
from tests.conftest import build, folder_bytes, small_recipe
from tests.fp8 import same_bits

Edit = Callable[..., None]
GPT_OSS = Joined(transposed=True, interleaved=True)
"""How transformers writes gpt-oss in bf16; blocks are never transposed."""
NAME = "model.layers.0.mlp.experts"
SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def write_mxfp4(model: Path, folder: Path) -> tuple[Path, Path]:
    """A model as gpt-oss's are published, with random codes, and its dense twin by transformers' own conversion."""
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    paths = [Path(shutil.copytree(model, folder / name)) for name in ("mxfp4", "dense")]
    tensors = joined(load_file(with_biases(paths[0]) / SINGLE_NAME), GPT_OSS)
    with_biases(paths[1])
    dense, packed = dict(tensors), dict(tensors)
    for layer in (0, 1):
        for leaf, rows, columns in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
            name = f"model.layers.{layer}.mlp.experts.{leaf}"
            blocks = codes(EXPERTS, rows, columns // 32, 16)
            scales = 118 + codes(EXPERTS, rows, columns // 32) % 8
            del packed[name]
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
            dense[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    for path, content, changes in zip(paths, (packed, dense), ({"quantization_config": SECTION}, {}), strict=True):
        save_file(content, path / SINGLE_NAME)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
    return paths[0], paths[1]


@pytest.fixture(autouse=True, scope="module")
def gpt_oss() -> Iterator[None]:
    """qwen3_moe with gpt-oss's layout and biases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen3_moe, "FAMILY", replace(qwen3_moe.FAMILY, joined=GPT_OSS, expert_bias=True))
        yield


@pytest.fixture(scope="module")
def twins(gpt_oss: None, moe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The MXFP4 checkpoint and that, dequantized; do not write to them."""
    return write_mxfp4(moe, tmp_path_factory.mktemp("twins"))


@pytest.fixture
def copy(twins: tuple[Path, Path], tmp_path: Path) -> Path:
    """The MXFP4 one, to be damaged."""
    return Path(shutil.copytree(twins[0], tmp_path / "model"))


def test_every_code_and_scale(tmp_path: Path) -> None:
    """All bytes with all scales, as the numbers that OCP's specification gives; 255 is no number."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 16)
    save_file({"w.weight_blocks": blocks, "w.weight_scales": scales}, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text("{}")
    found = Mxfp4Checkpoint.of(Checkpoint.open(tmp_path), torch.float32).read("w.weight").view(256, 256, 2)
    for byte in range(256):
        for place, code in enumerate((byte & 15, byte >> 4)):
            for exponent in (0, 1, 60, 126, 127, 128, 200, 252):
                exact = torch.tensor(values[code], dtype=torch.float64) * 2.0 ** (exponent - 127)
                assert same_bits(found[exponent, byte, place], exact.float()), (byte, exponent)
    assert bool(found[255].isnan().all())


def test_it_reads_as_transformers_reads_it(twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * 64 * 2)
    ours, theirs = map(Source.open, twins)
    assert_same_tensors(ours, theirs)
    assert ours.read(f"{NAME}.2.gate_proj.bias").shape == (WIDTH,)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_build_is_the_dense_twins_to_the_byte(twins: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    recipe = small_recipe(method, "awq" if method == "awq" else "w4a16")
    logged: list[str] = []
    ours = build(twins[0], tmp_path / "ours", recipe, log=logged.append).out
    theirs = build(twins[1], tmp_path / "theirs", recipe).out
    assert any("36 weights are MXFP4, read as BF16" in line for line in logged)
    left, right = folder_bytes(ours), folder_bytes(theirs)
    assert left.keys() == right.keys()
    assert {path for path in left if left[path] != right[path]} == {"README.md", "SHA256SUMS", "qconv-report.json"}
    assert not verify(ours, against=twins[0]).problems


def test_plan_counts_the_stored_bytes(twins: tuple[Path, Path], copy: Path) -> None:
    stored = Checkpoint.open(copy).entries
    index = {"metadata": {}, "weight_map": dict.fromkeys(stored, SINGLE_NAME)}
    (copy / INDEX_NAME).write_text(json.dumps(index))
    planned, dense = estimate(copy, small_recipe()), estimate(twins[1], small_recipe())
    assert planned.notices == ()
    assert planned.dtype == "MXFP4 and BF16"
    assert planned.source_bytes == sum(entry.nbytes for entry in stored.values())
    assert (planned.weights, planned.output_bytes) == (dense.weights, dense.output_bytes)


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "no scales": (
        lambda tensors: tensors.pop(f"{NAME}.down_proj_scales"),
        (f"'{NAME}.down_proj_blocks' has no '{NAME}.down_proj_scales' beside it",),
    ),
    "no blocks": (
        lambda tensors: tensors.pop(f"{NAME}.down_proj_blocks"),
        (f"'{NAME}.down_proj_scales' has no '{NAME}.down_proj_blocks' beside it",),
    ),
    "transposed": (
        lambda tensors: tensors.update(
            {f"{NAME}.down_proj_blocks": tensors[f"{NAME}.down_proj_blocks"].transpose(1, 2).contiguous()}
        ),
        (f"'{NAME}.down_proj_blocks' is [6, 1, 64, 16], config.json implies [6, 64, 1, 16]",),
    ),
    "scales of another dtype": (
        lambda tensors: tensors.update({f"{NAME}.down_proj_scales": tensors[f"{NAME}.down_proj_scales"].float()}),
        ("weight_scales' is F32 [64, 1]",),
    ),
    "an expert less": (
        lambda tensors: tensors.update({f"{NAME}.down_proj_scales": tensors[f"{NAME}.down_proj_scales"][1:].clone()}),
        (f"'{NAME}.down_proj_scales' is [5, 64, 1], config.json implies [6, 64, 1]",),
    ),
    "blocks that nobody expects": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj_blocks": torch.zeros(4, dtype=torch.uint8)}),
        ("the first 'model.layers.0.self_attn.q_proj_blocks'",),
    ),
    "scales of no blocks": (
        lambda tensors: tensors.update({"model.norm.weight_scales": torch.zeros(4, dtype=torch.uint8)}),
        ("'model.norm.weight_scales' are the scales of no blocks",),
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_parts_that_do_not_belong_together(copy: Path, case: str) -> None:
    change, said = CHANGES[case]
    refused(edit_tensors(copy, change), SINGLE_NAME, *said)


def test_a_dense_checkpoint_that_says_mxfp4(twins: tuple[Path, Path], copy: Path) -> None:
    shutil.copyfile(twins[1] / SINGLE_NAME, copy / SINGLE_NAME)
    refused(copy, "config.json says mxfp4, but no tensor holds blocks of it")


def test_a_scale_that_is_no_number(copy: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.down_proj_scales"][4, 7, 0] = 255

    edit_tensors(copy, damage)
    with pytest.raises(
        Exception, match=r"experts\.4\.down_proj\.weight' holds 32 values that are not finite"
    ) as caught:
        build(copy, tmp_path / "out", small_recipe())
    assert "[7, 0]" in str(caught.value)
