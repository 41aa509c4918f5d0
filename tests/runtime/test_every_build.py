"""The bundled model in every build type: packed against dequantized, in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qconv
from qconv.gguf.recipe import GgufRecipe
from qconv.gguf_pipeline import quantize_gguf
from qconv.recipe import load_recipe
from qconv.runtime.dense import write_dense
from tests.conftest import BUNDLED, build

IDS = torch.randint(3, 2048, (2, 48), generator=torch.Generator().manual_seed(0))
FEW: dict[str, Any] = {"calibration.tokens": 1024, "calibration.sequence_length": 128}
BUILDS: dict[str, dict[str, Any]] = {
    "awq": {"method": "rtn"},
    "gptq": {"method": "rtn"},
    "gptq desc_act": {**FEW, "gptq.ordering": "desc_act"},
    "w4a16": {"method": "rtn"},
    "fp8": {},
    "fp8-dynamic": {},
    "fp8-static": FEW,
    "gguf:Q4_K_M": {},
    "gguf:Q5_K_M": {},
    "gguf:Q8_0": {},
    "gguf:IQ4_XS": {},
}


def error(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """The median over tokens of the root mean square over the vocabulary."""
    return float((logits.float() - wanted).square().mean(-1).sqrt().median())


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDS)
def test_logits_and_tokens_are_the_dequantized_models(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    if kind.startswith("gguf:"):
        quiet: dict[str, Any] = {"threads": 1, "progress": lambda *_: None, "log": lambda _: None}
        out = quantize_gguf(BUNDLED, tmp_path / "build", GgufRecipe(type=kind.removeprefix("gguf:")), **quiet).out
    else:
        out = build(BUNDLED, tmp_path / "build", load_recipe(kind.partition(" ")[0], BUILDS[kind])).out
    write_dense(out, tmp_path / "dense", torch.float32)

    def dense(dtype: torch.dtype) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
        return model.eval()

    exact, packed = dense(torch.float32), qconv.load(out, dtype=torch.float32)
    with torch.no_grad():
        wanted = exact(IDS).logits
        assert float((packed(IDS).logits - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
        # In bf16 the packed model is as far from the exact one as transformers' own bf16 is. The typical token tells:
        # a single one may meet a near tie of its router and take another expert than in float32, in either model.
        ours = error(qconv.load(out, dtype=torch.bfloat16)(IDS).logits, wanted)
        theirs = error(dense(torch.bfloat16)(IDS).logits, wanted)
    assert ours < 1.1 * theirs
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    assert torch.equal(
        packed.generate(IDS, attention_mask=mask, **options), exact.generate(IDS, attention_mask=mask, **options)
    )
