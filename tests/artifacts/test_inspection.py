"""What a checkpoint consists of, for checkpoints of other people's formats too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qconv.artifacts.inspection import OUTSIDE, inspect, logical_weights, name_class, split_name
from qconv.errors import CheckpointError
from qconv.folders.journal import JOURNAL_NAME, WORK_FOLDER

TINY = Path(__file__).parents[2] / "evals/models/tiny-coder-moe"


def checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def test_a_dense_checkpoint_adds_up_as_safetensors_reads_it() -> None:
    found = inspect(TINY)
    weights = nbytes = 0
    for file in TINY.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  # not a mapping
                tensor = shard.get_tensor(name)
                weights += tensor.numel()
                nbytes += tensor.nbytes
    assert (found.weights, found.nbytes) == (weights, nbytes)
    assert found.known
    assert found.quantization is None
    assert found.layer_count == 4
    assert sum(layer.weights for layer in found.layers) == weights
    assert found.layers[0].name == OUTSIDE
    experts = next(one for one in found.classes if one.name == "model.layers.*.mlp.experts.*.up_proj")
    assert experts.modules == 4 * 16
    assert experts.tensors == {("weight", "BF16", (256, 256)): 64}


def test_a_single_file_is_inspected_by_its_names() -> None:
    found = inspect(sorted(TINY.glob("*.safetensors"))[0])
    assert found.architecture is None
    assert not found.known
    assert found.shards == 1


IN, OUT, GROUPS = 256, 128, 2  # groups of 128
LAYOUTS: dict[str, tuple[dict[str, Tensor], dict[str, Any], float]] = {
    # Bits per weight: the codes, and for each group a 16-bit scale and what each format adds.
    "gptq, 4 bits along the input": (
        {
            "qweight": torch.zeros(IN // 8, OUT, dtype=torch.int32),
            "qzeros": torch.zeros(GROUPS, OUT // 8, dtype=torch.int32),
            "scales": torch.zeros(GROUPS, OUT, dtype=torch.float16),
            "g_idx": torch.zeros(IN, dtype=torch.int32),
        },
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:lm_head": {}}},
        4 + (16 + 4) / 128 + 32 / OUT,
    ),
    "gptq, 8 bits": (
        {
            "qweight": torch.zeros(IN // 4, OUT, dtype=torch.int32),
            "qzeros": torch.zeros(GROUPS, OUT // 4, dtype=torch.int32),
            "scales": torch.zeros(GROUPS, OUT, dtype=torch.float16),
        },
        {"quant_method": "gptq", "bits": 8, "group_size": 128},
        8 + (16 + 8) / 128,
    ),
    "fp8 in blocks of 128 x 128": (
        {
            "weight": torch.zeros(OUT, IN, dtype=torch.float8_e4m3fn),
            "weight_scale_inv": torch.zeros(1, 2, dtype=torch.float32),
        },
        {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["lm_head"]},
        8 + 32 / (128 * 128),
    ),
    "bitsandbytes nf4": (
        {
            "weight": torch.zeros(IN * OUT // 2, 1, dtype=torch.uint8),
            "weight.absmax": torch.zeros(IN * OUT // 64, dtype=torch.float32),
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(0, dtype=torch.uint8),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]},
        4 + 32 / 64,
    ),
    # kv_cache_scheme comes first and has bits of its own.
    "compressed-tensors nvfp4": (
        {
            "weight_packed": torch.zeros(OUT, IN // 2, dtype=torch.uint8),
            "weight_scale": torch.zeros(OUT, IN // 16, dtype=torch.float8_e4m3fn),
            "weight_global_scale": torch.zeros(1, dtype=torch.float32),
        },
        {
            "quant_method": "compressed-tensors",
            "kv_cache_scheme": {"num_bits": 8},
            "config_groups": {"group_0": {"input_activations": {"num_bits": 8}, "weights": {"num_bits": 4}}},
            "ignore": ["lm_head"],
        },
        4 + 8 / 16 + 32 / (IN * OUT),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_peoples_formats_and_architectures(layout: str, tmp_path: Path) -> None:
    tensors, section, expected = LAYOUTS[layout]
    named = {f"transformer.h.{layer}.fc.{leaf}": tensor for layer in range(11) for leaf, tensor in tensors.items()}
    config = {"architectures": ["OddLM"], "quantization_config": section}
    found = inspect(checkpoint(tmp_path, named, config))
    assert (found.architecture, found.known, found.layer_count) == ("OddLM", False, 11)
    # Layer 10 comes after layer 9.
    assert [layer.name for layer in found.layers] == [f"transformer.h.{layer}" for layer in range(11)]
    assert [one.name for one in found.classes] == ["transformer.h.*.fc"]
    assert found.weights == 11 * IN * OUT
    assert found.bits_per_weight == pytest.approx(expected)
    assert found.quantization is not None
    assert found.quantization["quant_method"] == section["quant_method"]
    listed = any(isinstance(value, list) and value == ["lm_head"] for value in section.values())
    assert found.skipped == (("lm_head",) if listed else ("-:lm_head",) if "dynamic" in section else ())


def test_modules_of_a_class_may_differ_in_shape(tmp_path: Path) -> None:
    tensors = {f"layers.{index}.up.weight": torch.zeros(8, 8 * (index + 1)) for index in range(3)}
    found = inspect(checkpoint(tmp_path, tensors, {}))
    (one,) = found.classes
    assert one.modules == 3
    assert sorted(dimensions for _, _, dimensions in one.tensors) == [(8, 8), (8, 16), (8, 24)]
    assert one.weights == 8 * 8 * (1 + 2 + 3)


def test_names() -> None:
    assert name_class("model.layers.3.mlp.experts.17.up_proj") == "model.layers.*.mlp.experts.*.up_proj"
    assert split_name("a.0.fc.weight") == ("a.0.fc", "weight")
    assert split_name("a.0.fc.weight.quant_state.bitsandbytes__nf4") == (
        "a.0.fc",
        "weight.quant_state.bitsandbytes__nf4",
    )
    # gpt-oss: bytes of two 4-bit values and their scales, named after one module's parameters.
    assert logical_weights("down_proj_blocks", torch.uint8, (4, 16), 4) == 128
    assert logical_weights("down_proj_scales", torch.uint8, (4, 1), 4) == 0


def test_an_unfinished_build_is_told_apart(tmp_path: Path) -> None:
    journal = tmp_path / WORK_FOLDER / JOURNAL_NAME
    journal.parent.mkdir()
    journal.write_text("{}\n")
    with pytest.raises(CheckpointError, match="unfinished"):
        inspect(tmp_path)


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "section"])
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    config = {"quantization_config": "awq"} if damage == "section" else {}
    checkpoint(tmp_path, {"a.weight": torch.zeros(8)}, config)
    if damage != "section":
        file = tmp_path / damage
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="quantization_config" if damage == "section" else damage):
        inspect(tmp_path)
