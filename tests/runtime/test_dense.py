"""The dense model that a build stands for, through transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.errors import CheckpointError, OutputError
from qconv.runtime.dense import write_dense
from tests.conftest import build, random_model, save_model, small_recipe

IDS = torch.arange(40).view(2, 20)


def logits(folder: Path) -> Tensor:
    """transformers' own output in float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        output: Tensor = model.eval()(IDS).logits
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_builds_dequantized_one(awq_build: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    write_dense(awq_build, tmp_path / "dense", dtype)
    source = Source.open(tmp_path / "dense")  # complete, of the right shapes, with a tokenizer, unquantized
    opened = Build.open(awq_build)
    for layer in opened.architecture.layers:
        for linear in layer.linears():
            assert torch.equal(source.read(linear.weight), opened.qtensor(linear).dequantize(dtype))
        for name in [module.weight for module in layer.norms()] + [router.weight for router in layer.routers()]:
            assert torch.equal(source.read(name), opened.checkpoint.read(name).to(dtype))
    config = source.checkpoint.config
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert {entry.dtype for entry in source.checkpoint.entries.values()} == {dtype}


@pytest.mark.parametrize(("method", "output_format"), [("rtn", "w4a16"), ("awq", "awq"), ("awq", "w4a16")])
def test_eight_bits_or_four_the_model_still_computes_nearly_the_same(
    moe: Path, tmp_path: Path, method: str, output_format: str
) -> None:
    bits = 4 if output_format == "awq" else 8
    recipe = small_recipe(method, output_format, grid={"bits": bits})
    write_dense(build(moe, tmp_path / "out", recipe).out, tmp_path / "dense", torch.float32)
    before, after = logits(moe), logits(tmp_path / "dense")
    error = torch.linalg.vector_norm(after - before, dim=-1) / torch.linalg.vector_norm(before, dim=-1)
    # Random weights in groups of 32 lose about 10 % a layer at 4 bits and a sixteenth of that at 8; an uncompensated
    # router or a misplaced scale loses everything. The median leaves out tokens that change their experts.
    assert float(error.median()) < (0.4 if bits == 4 else 0.04)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = save_model(random_model("qwen3", tie_word_embeddings=True), tmp_path / "model")
    recipe = small_recipe("rtn", grid={"bits": 8})
    write_dense(build(model, tmp_path / "out", recipe).out, tmp_path / "dense", torch.float32)
    assert "lm_head.weight" not in Source.open(tmp_path / "dense").checkpoint.entries
    error = torch.linalg.vector_norm(logits(tmp_path / "dense") - logits(model)) / torch.linalg.vector_norm(
        logits(model)
    )
    assert float(error) < 0.1


def test_a_folder_that_holds_something_is_refused(rtn_build: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        write_dense(rtn_build, tmp_path, torch.float32)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_build_leaves_no_torn_shard(rtn_build: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(rtn_build, tmp_path / "build"))
    name = "model.layers.1.self_attn.o_proj.weight_shape"
    shard = json.loads((damaged / "model.safetensors.index.json").read_text())["weight_map"][name]
    content = bytearray((damaged / shard).read_bytes())
    entry = Build.open(damaged).checkpoint.entry(name)
    content[entry.offset] ^= 1
    (damaged / shard).write_bytes(content)
    with pytest.raises(CheckpointError, match="weight_shape"):
        write_dense(damaged, tmp_path / "dense", torch.float32)
    for file in (tmp_path / "dense").iterdir():
        assert load_file(file)  # the shards before it are whole
    assert not list((tmp_path / "dense").glob("*.partial"))
