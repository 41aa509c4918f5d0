"""Types without a family file through the whole of qconv: quantized, verified, loaded, streamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import qconv
from qconv.artifacts.folded import FoldedSource
from qconv.artifacts.source import Source
from qconv.building.gguf_pipeline import gguf_target
from qconv.errors import UsageError
from qconv.models.folding import output_channels
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.runtime.dense import write_dense
from qconv.runtime.stream import stream_logits
from qconv.verification.build import verify
from tests.conftest import BUNDLED, VOCABULARY, build, small_recipe
from tests.models.discovery.test_fitting import FITTING
from tests.models.discovery.test_structure import config_of, model_of

WIDTHS = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "v_head_dim": 16,
}
"""What groups of 32 divide."""
METHODS = {"rtn": "w4a16", "gptq": "w4a16", "awq": "awq"}
IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
BOUND = 1e-4
"""Of the largest logit: a few sums in float32, in another order."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random checkpoint of a type, as transformers saves it; made once for each dtype."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(model_type: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        if (model_type, dtype) not in made:
            config = config_of(model_type)
            values = {name: value for name, value in WIDTHS.items() if hasattr(config, name)}
            folder = tmp_path_factory.mktemp(model_type) / "model"
            model = model_of(type(config)(**config.to_dict() | values))
            model.to(dtype).save_pretrained(folder, max_shard_size="300KB")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(BUNDLED / name, folder / name)
            made[model_type, dtype] = folder
        return made[model_type, dtype]

    return make


def logits_of(folder: Path) -> Tensor:
    """transformers' own, float32 [sequences, tokens, vocabulary]."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= BOUND * float(expected.abs().max())
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", FITTING)
def test_a_build_computes_what_its_dequantized_weights_do(
    source: Callable[..., Path], tmp_path: Path, model_type: str, method: str
) -> None:
    model = source(model_type)
    made = build(model, tmp_path / "build", small_recipe(method, METHODS[method])).out
    found = verify(made, against=model)
    assert not found.problems
    assert not found.not_checked
    write_dense(made, tmp_path / "dense", torch.float32)
    expected = logits_of(tmp_path / "dense")
    with torch.no_grad():
        assert_near(qconv.load(made, dtype="float32")(IDS).logits, expected)
    streamed = stream_logits(made, list(IDS), dtype="float32")
    assert_near(torch.stack(list(streamed)), expected)


@pytest.mark.parametrize("model_type", FITTING)
def test_folding_alone_moves_no_logit(source: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    # In bf16 a norm that adds one to its weight would round: (1 + w) / s - 1 is no number of its own.
    model = Source.open(source(model_type, torch.float32))
    generator = torch.Generator().manual_seed(0)
    scales = {
        name: torch.exp2(torch.randint(-2, 3, (channels,), generator=generator).float())
        for layer in model.architecture.layers
        for name, channels in output_channels(layer).items()
    }
    folded = FoldedSource.of(model, scales)
    expected = logits_of(model.checkpoint.path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model.checkpoint.path / name, tmp_path / name)
    tensors = {name: folded.read(name).float().contiguous() for name in model.checkpoint.entries}
    assert sum(bool((tensors[name] != model.read(name).float()).any()) for name in tensors) > 10
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_near(logits_of(tmp_path), expected)


@pytest.mark.parametrize("model_type", ["granite"])
def test_a_gguf_is_refused_for_what_it_is_and_not_for_a_detail(
    source: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    with pytest.raises(UsageError, match=f"family {model_type} has no GGUF form"):
        gguf_target(Source.open(source(model_type)), parse_gguf_recipe({"type": "Q8_0"}), tmp_path, "", lambda _: None)
    assert not [*tmp_path.iterdir()]
