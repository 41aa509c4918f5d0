"""Every build type: packed against dequantized, in transformers. The bundled model (slow), and random small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qconv
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.chat.templates import ChatTemplates
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.planning.recipe import Recipe, load_recipe
from qconv.runtime.dense import write_dense
from qconv.runtime.generation import complete
from qconv.runtime.tokenizer import load_tokenizer
from tests.conftest import BUNDLED, build, random_model, save_model
from tests.runtime.rounding import assert_within_bf16_rounding

IDS = torch.randint(3, 2048, (8, 48), generator=torch.Generator().manual_seed(0))
MESSAGES = ["hi", "Write a function that adds two numbers, and say how it is called.", "why?"]
"""Of different lengths, so that a batch of them is padded."""
ANSWER = 10
FLOAT32_BOUND = 1e-5
"""Of the largest logit: the order of sums in float32, 2**-24 each, through all layers. Measured: up to 9e-7."""
FEW: dict[str, Any] = {"calibration.tokens": 1024, "calibration.sequence_length": 128}
BUILDS: dict[str, dict[str, Any]] = {
    "awq": {"method": "rtn"},
    "gptq": {"method": "rtn"},
    "gptq asymmetric": {"method": "rtn", "grid.symmetric": False},
    "gptq 8": {"method": "rtn", "grid.bits": 8},
    "gptq 3": {"method": "rtn", "grid.bits": 3},
    "gptq 2": {"method": "rtn", "grid.bits": 2},
    "gptq desc_act": {**FEW, "gptq.ordering": "desc_act"},
    "w4a16": {"method": "rtn"},
    "w4a16 asymmetric": {"method": "rtn", "grid.symmetric": False},
    "w4a16 8": {"method": "rtn", "grid.bits": 8},
    "w8a8": {"method": "rtn"},
    "w4a8": {"method": "rtn"},
    "nvfp4": {"method": "rtn"},
    "nvfp4-modelopt": {"method": "rtn", **FEW},
    "mxfp4": {"method": "rtn"},
    "mxfp8": {"method": "rtn"},
    "fp8": {},
    "fp8-dynamic": {},
    "fp8-static": FEW,
    "gguf:Q4_K_M": {},
    "gguf:Q5_K_M": {},
    "gguf:Q6_K": {},
    "gguf:Q8_0": {},
    "gguf:IQ4_XS": {},
    "gguf:Q4_0": {},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sparse model whose rows hold whole blocks of every format, K-quants' 256 too."""
    sizes = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 4}
    model = random_model("qwen3_moe", **sizes, norm_topk_prob=True)
    return save_model(model, tmp_path_factory.mktemp("small") / "model", "4MB")


def made(kind: str, source: Path, out: Path) -> Path:
    """The build of that kind."""
    if kind.startswith("gguf:"):
        quiet: dict[str, Any] = {"threads": 1, "progress": lambda *_: None, "log": lambda _: None}
        return Path(quantize_gguf(source, out, GgufRecipe(type=kind.removeprefix("gguf:")), **quiet).out)
    return build(source, out, recipe(kind)).out


def recipe(kind: str) -> Recipe:
    """The packaged recipe with the kind's changes."""
    return load_recipe(kind.partition(" ")[0], BUILDS[kind])


def dense(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own model."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def alone(model: Any, tokenizer: Any, prompt: str) -> str:
    """A greedy answer one prompt at a time, without padding and without a cache."""
    ids: Tensor = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=ANSWER, do_sample=False, use_cache=False, pad_token_id=0)
    answer: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


def assert_is_the_dequantized_model(out: Path, scratch: Path, ids: Tensor) -> None:
    """Logits in float32 and in bf16, and greedy answers to a padded batch of chat prompts with a cache."""
    write_dense(out, scratch, torch.float32)
    exact, packed = dense(scratch, torch.float32), qconv.load(out, dtype=torch.float32)
    with torch.no_grad():
        wanted = exact(ids).logits
        assert float((packed(ids).logits - wanted).abs().max()) < FLOAT32_BOUND * float(wanted.abs().max())
    tokenizer = load_tokenizer(out)
    with ChatTemplates(tokenizer, out) as chats:
        prompts = [chats.render([{"role": "user", "content": message}], answer=True) for message in MESSAGES]
    answers = complete(packed, tokenizer, prompts, max_tokens=ANSWER, special_tokens=False)
    assert [answer.text for answer in answers] == [alone(exact, tokenizer, prompt) for prompt in prompts]
    assert_within_bf16_rounding(qconv.load(out, dtype=torch.bfloat16), dense(scratch, torch.bfloat16), exact, ids)


@pytest.mark.parametrize("kind", BUILDS)
def test_a_small_model(kind: str, small: Path, tmp_path: Path) -> None:
    assert_is_the_dequantized_model(made(kind, small, tmp_path / "build"), tmp_path / "dense", IDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDS)
def test_the_bundled_model(kind: str, tmp_path: Path) -> None:
    assert_is_the_dequantized_model(made(kind, BUNDLED, tmp_path / "build"), tmp_path / "dense", IDS)
