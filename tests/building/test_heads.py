"""Output heads: tied ones are on every skip list, and one that only config.json calls tied is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qconv
from evals.recipes import general_formats
from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.checkpoint.reader import INDEX_NAME
from qconv.errors import CheckpointError
from qconv.folders.state import CHECKSUMS_NAME
from qconv.planning.estimate import estimate
from qconv.planning.recipe import Recipe
from qconv.runtime.dense import write_dense
from qconv.verification.build import verify
from tests.conftest import GRIDS, build, random_model, save_model, small_recipe

# Whole blocks of 128 everywhere, so that every format holds it.
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
LISTS = {**dict.fromkeys(("awq", "fp8", "w4afp8"), "modules_to_not_convert"), "gptq": "dynamic"}
"""Where a format lists what is left alone; compressed-tensors' under ``ignore``."""


def recipe(output_format: str) -> Recipe:
    """Plain rounding; static FP8 looks at a few tokens all the same."""
    return small_recipe("rtn", output_format, grid=GRIDS.get(output_format, {}))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose head is its embedding; do not write to it."""
    model = random_model("llama", tie_word_embeddings=True, head_dim=32, **SIZES)
    return save_model(model, tmp_path_factory.mktemp("tied") / "model")


def give_head(folder: Path, make: Callable[[Tensor], Tensor]) -> Path:
    """Add an lm_head made from the embedding, and leave config.json as it is; the checkpoint becomes one file."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX_NAME).unlink(missing_ok=True)
    tensors["lm_head.weight"] = make(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def own_head(tmp_path: Path) -> Path:
    """A llama whose config.json says tied, and whose head differs from the embedding in one row."""
    folder = save_model(random_model("llama", tie_word_embeddings=True, head_dim=32, **SIZES), tmp_path / "model")

    def changed(embedding: Tensor) -> Tensor:
        head = embedding.clone()
        head[-1] *= 2.0
        return head

    return give_head(folder, changed)


@pytest.mark.parametrize("output_format", [one for one in general_formats() if one != "mlx"])  # which has no such list
def test_a_tied_head_is_on_the_skip_list(tied: Path, tmp_path: Path, output_format: str) -> None:
    made = build(tied, tmp_path / "build", recipe(output_format)).out
    section = json.loads((made / "config.json").read_text())["quantization_config"]
    listed = section[LISTS.get(output_format, "ignore")]
    assert ("-:^lm_head$" if output_format == "gptq" else "lm_head") in listed
    assert "lm_head.weight" not in Build.open(made).checkpoint.entries
    assert verify(made, tied).problems == []


@pytest.mark.parametrize("output_format", ["w4a16", "fp8_dynamic", "fp8_static", "fp8"])
def test_a_tied_head_that_readers_would_take_as_quantized_is_a_problem(
    tied: Path, tmp_path: Path, output_format: str
) -> None:
    made = build(tied, tmp_path / "build", recipe(output_format)).out
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"][LISTS.get(output_format, "ignore")].remove("lm_head")
    (made / "config.json").write_text(json.dumps(config))
    (made / CHECKSUMS_NAME).unlink()  # others' builds have none
    assert verify(made).problems == ["lm_head is not quantized but is not on the skip list"]


@pytest.mark.parametrize("output_format", ["awq", "fp8"])
def test_no_list_at_all_leaves_the_head_alone(
    tied: Path, tmp_path: Path, output_format: str, edit_json: Callable[..., None]
) -> None:
    # AutoAWQ quantizes layers and nothing else; transformers skips heads by itself where FP8 comes without a list.
    made = build(tied, tmp_path / "build", recipe(output_format)).out
    section = json.loads((made / "config.json").read_text())["quantization_config"]
    del section["modules_to_not_convert"]
    edit_json(made / "config.json", quantization_config=section)
    (made / CHECKSUMS_NAME).unlink()
    assert verify(made).problems == []


def test_a_head_that_only_config_json_ties_is_used(own_head: Path) -> None:
    from transformers import AutoModelForCausalLM

    untyped: Any = AutoModelForCausalLM
    ids = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        theirs = untyped.from_pretrained(own_head, dtype=torch.float32)(ids).logits
        ours = qconv.load(own_head, dtype="float32", backend="reference")(ids).logits
    # The same operations on the same weights: float32's rounding alone. The embedding would halve the last logit.
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert theirs[..., -1].abs().max() > 0.1


@pytest.mark.parametrize("output_format", general_formats())
def test_a_build_keeps_a_head_that_only_config_json_ties(own_head: Path, tmp_path: Path, output_format: str) -> None:
    words: list[str] = []
    made = build(own_head, tmp_path / "build", recipe(output_format), log=words.append).out
    assert any("lm_head.weight is another matrix" in line for line in words)
    config = json.loads((made / "config.json").read_text())
    assert config["tie_word_embeddings"] is False, "vLLM leaves out a head that is called tied"
    source = Source.open(own_head)
    assert torch.equal(Build.open(made).checkpoint.read("lm_head.weight"), source.read("lm_head.weight"))
    assert verify(made, own_head).problems == []


def test_a_copy_of_the_embedding_stays_a_tied_head(tmp_path: Path) -> None:
    folder = save_model(random_model("llama", tie_word_embeddings=True, head_dim=32, **SIZES), tmp_path / "model")
    source = Source.open(give_head(folder, torch.clone))
    assert source.architecture.lm_head is None
    assert source.checkpoint.config["tie_word_embeddings"] is True
    assert source.notices() == []


def test_a_head_in_another_dtype_is_no_copy(tmp_path: Path) -> None:
    folder = save_model(random_model("llama", tie_word_embeddings=True, head_dim=32, **SIZES), tmp_path / "model")
    assert Source.open(give_head(folder, Tensor.float)).architecture.lm_head is not None


def test_a_head_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_model(random_model("llama", tie_word_embeddings=True, head_dim=32, **SIZES), tmp_path / "model")
    give_head(folder, lambda embedding: embedding[:1024].clone())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*\[1024, 128\]"):
        Source.open(folder)


def test_plan_speaks_of_a_head_that_config_json_ties(own_head: Path) -> None:
    tensors = load_file(own_head / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (own_head / INDEX_NAME).write_text(json.dumps(index))
    notices = estimate(own_head, recipe("w4a16")).notices
    assert [notice for notice in notices if "lm_head.weight" in notice]


def test_transformers_reads_blocks_beside_a_tied_head(tied: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    untyped: Any = AutoModelForCausalLM
    made = build(tied, tmp_path / "build", recipe("fp8")).out
    write_dense(made, tmp_path / "dense", torch.bfloat16)  # to what transformers dequantizes where there is no GPU
    ids = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        theirs = untyped.from_pretrained(made, dtype=torch.bfloat16).float()(ids).logits
        ours = qconv.load(tmp_path / "dense", dtype="float32")(ids).logits
    # The same weights and operations in float32.
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert theirs.std() > 0.1
