"""gpt-oss's own MXFP4 blocks in a file of MXFP4_MOE: other bytes, the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qconv.artifacts.source import Source
from qconv.planning.gguf_plan import plan_gguf, write_file
from qconv.verification.gguf import verify_gguf
from tests.conftest import save_model
from tests.gguf_families import model_of

SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
EXPERTS, HIDDEN, WIDTH = 6, 64, 96


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """gpt-oss as it is published, with random codes, and what its experts' blocks stand for, by transformers."""
    folder = save_model(model_of("gpt_oss"), tmp_path / "model", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    generator, dense = torch.Generator().manual_seed(0), {}
    for layer in range(3):
        for leaf, rows, columns in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
            name = f"model.layers.{layer}.mlp.experts.{leaf}"
            shape = EXPERTS, rows, columns // 32
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            # Blocks whose largest number is 0, 0.5, 1 ... 6 times the scale: encoders choose another scale for most.
            for largest in range(8):
                blocks[0, largest, 0] = (blocks[0, largest, 0] & 0x88) | largest
            scales = 118 + torch.randint(0, 8, shape, generator=generator, dtype=torch.uint8)
            del tensors[name]
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            dense[name] = convert_moe_packed_tensors(blocks, scales).transpose(1, 2).float()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SECTION}))
    return folder, dense


def test_no_expert_is_rounded(published: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, dense = published
    source = Source.open(folder)
    plan = plan_gguf(source, "MXFP4_MOE", "model")
    write_file(tmp_path, plan, plan.files[0], source)
    file = tmp_path / plan.files[0].name
    read = {one.name: one for one in gguf.GGUFReader(str(file)).tensors}
    for layer in range(3):
        joined = dense[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = dense[f"model.layers.{layer}.mlp.experts.down_proj"]
        for role, expected in (("gate", joined[:, ::2]), ("up", joined[:, 1::2]), ("down", down)):
            found = read[f"blk.{layer}.ffn_{role}_exps.weight"]
            assert found.tensor_type is GGMLQuantizationType.MXFP4
            # Equal numbers; of zeros the sign goes.
            assert torch.equal(torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type)), expected)
    assert not verify_gguf(file, folder).problems
