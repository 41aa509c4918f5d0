"""Builds of models in SmolLM2's shape, hidden size 576 and a tied head, in the loaders that define their formats.

576 is four and a half blocks of 128: no group of 128 divides it, and no FP8 block fits. A tied head has no tensor, and
loaders that take it for a quantized linear fill it with noise. So every format that holds the shape is loaded by its
own loader, and its log-probabilities are compared with those of qconv's runtime, which dequantizes the same files to
the dtype that the loader has.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import qconv
from qconv.planning.recipe import Recipe
from qconv.runtime.dense import write_dense
from tests.conftest import build, random_model, save_model, small_recipe
from tests.interop.conftest import Client

pytestmark = pytest.mark.interop

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 1536},
    "qwen3": {"intermediate_size": 1536},
    "qwen3_moe": {"moe_intermediate_size": 192, "num_experts": 4, "num_experts_per_tok": 4},
}
"""Every token goes to all experts: where a router's second and third nearly tie, float16 chooses another of them."""
SHAPE = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}

FLOAT32_BOUND = 1e-3
"""Both sides hold the same weights and compute in float32; two layers amplify 2**-23 to less than this."""
FLOAT16_BOUND = 0.05
"""AutoAWQ rounds inputs and outputs of linears to float16: tests/interop/test_loaders.py has 0.03 for logits of 15."""


@dataclass(frozen=True)
class Loaded:
    """How a build is loaded.

    Attributes:
        recipe: The build's.
        environment: Whose code loads it.
        client: The script that does.
        dtype: In which dtype the loader dequantizes.
        bound: The largest difference of a log-probability.
    """

    recipe: Recipe
    environment: str
    client: str
    dtype: torch.dtype
    bound: float = FLOAT32_BOUND


def compressed(output_format: str, method: str = "rtn", **grid: Any) -> Loaded:
    """In transformers with compressed-tensors, which dequantizes to the scales' bfloat16."""
    recipe = small_recipe(method, output_format, grid=grid)
    return Loaded(recipe, "compressed-tensors", "transformers_generate", torch.bfloat16)


def gptqmodel(method: str = "rtn", ordering: str = "static", **grid: Any) -> Loaded:
    """In GPTQModel, which computes with float16 weights."""
    recipe = small_recipe(method, "gptq", grid=grid, gptq={"ordering": ordering})
    return Loaded(recipe, "gptqmodel", "gptqmodel_generate", torch.float16)


def autoawq(method: str, **grid: Any) -> Loaded:
    """In AutoAWQ, which computes with float16 weights and rounds what it gives to float16."""
    recipe = small_recipe(method, "awq", grid=grid)
    return Loaded(recipe, "autoawq", "autoawq_generate", torch.float16, FLOAT16_BOUND)


BUILDS = {
    "awq 64": autoawq("rtn", group_size=64),
    "awq 32": autoawq("awq", group_size=32),
    "w4a16 64": compressed("w4a16", "gptq", group_size=64),
    "w4a16 row": compressed("w4a16", group_size=-1),
    "w4a16 32 of 8 bits": compressed("w4a16", group_size=32, bits=8),
    "fp8_dynamic": compressed("fp8_dynamic", bits=8, group_size=-1),
    "fp8_static": compressed("fp8_static", bits=8, group_size=-1),
    "gptq 64": gptqmodel("gptq", group_size=64),
    "gptq row": gptqmodel(group_size=-1),
    "gptq 32 of 8 bits": gptqmodel(group_size=32, bits=8),
    "gptq asymmetric": gptqmodel(group_size=64, symmetric=False),
    "gptq desc_act": gptqmodel("gptq", "desc_act", group_size=64),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            model = random_model(family, tie_word_embeddings=True, **SHAPE, **FAMILIES[family])
            made[family] = save_model(model, tmp_path_factory.mktemp(family) / "model", "5GB")
        return made[family]

    return make


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_its_own_loader_computes_what_qconv_computes(
    source: Callable[[str], Path], client: Client, tmp_path: Path, family: str, name: str
) -> None:
    case = BUILDS[name]
    made = build(source(family), tmp_path / "build", case.recipe).out
    # Log-probabilities of 8 tokens that follow 12, in two sequences.
    ids = torch.randint(0, 2048, (2, 20), generator=torch.Generator().manual_seed(0))
    request = tmp_path / "request.json"
    prompts, following = ids[:, :12].tolist(), ids[:, 12:].tolist()
    request.write_text(json.dumps({"prompts": prompts, "new_tokens": 1, "continuations": following}))
    asked = ["bfloat16"] if case.client == "transformers_generate" else []
    client(case.environment, case.client, made, *asked, request, tmp_path / "answer.safetensors")

    theirs, problems = _read(tmp_path / "answer.safetensors")
    assert not {kind: names for kind, names in problems.items() if any(map(_counts, names))}, problems
    write_dense(made, tmp_path / "dense", case.dtype)
    errors = (theirs - _ours(tmp_path / "dense", ids)).abs()
    assert theirs.std() > 0.5, "neither NaN nor a uniform distribution"
    assert float(errors.max()) < case.bound


def _counts(name: str) -> bool:
    """Whether a tensor that a loader lacks matters: a tied head has none, and transformers' experts round no input."""
    return name != "lm_head.weight" and not (".experts." in name and name.endswith(".input_scale"))


def _ours(dense: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = qconv.load(dense, dtype="float32")(ids).logits
    return logits[:, 11:-1].log_softmax(dim=-1)


def _read(path: Path) -> tuple[Tensor, dict[str, list[str]]]:
    with safe_open(path, "pt") as file:
        return file.get_tensor("log_probs"), json.loads(file.metadata()["loading"])
