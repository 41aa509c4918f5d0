"""Real loaders load our builds whole, leave no tensor out, and decode what the dequantized model decodes.

The reference is the build's dequantized weights as an ordinary checkpoint in transformers. It is written in the dtype
in which the loader dequantizes (float16 in AutoAWQ, the scale's bfloat16 in compressed-tensors), so both sides hold the
same weights, and both compute in float32 as far as the loader lets them. Loading alone proves nothing, since loaders
fill absent tensors with noise without an error; so log-probabilities of every position are compared too, along the
reference's tokens.
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
from tokenizers import Tokenizer
from torch import Tensor

import qconv
from qconv.runtime.dense import write_dense
from qconv.runtime.engine_rounding import cache_rounding
from qconv.runtime.files import open_files
from tests.interop.conftest import MODEL, Client

pytestmark = pytest.mark.interop

NEW_TOKENS = 32
PROMPT_TOKENS = 12
"""Every prompt is cut to this length: equal ones decode as one batch without padding."""
PROMPTS = (
    "def __init__(self, name, value=None, parent=None):\n        self.",
    "import os\nimport sys\nimport re\nfrom collections import namedtuple\n\n",
    "class Parser:\n    def parse(self, text):\n        result = []\n",
    "    for key, value in sorted(self.items(), key=lambda item: item[0]):",
    "    try:\n        return int(value)\n    except ValueError:\n",
    '    raise ValueError("expected a positive integer, got %r" % value)',
    'def fibonacci(n: int) -> int:\n    """Return the n-th number."""',
    "    with open(path, encoding='utf-8') as f:\n        lines = f.read",
    "if __name__ == '__main__':\n    import argparse\n    parser =",
    "    assert isinstance(node, ast.FunctionDef), type(node)\n",
)

AUTOAWQ_BOUND = 0.03
"""Largest difference of a log-probability between AutoAWQ and float32.

AutoAWQ rounds each linear's input and output to float16, a relative 2**-12 on average. Four linears follow one another
in a layer (q/k/v, o, gate/up, down), so the last hidden state is off by some sqrt(4 layers * 4 * 2) * 2**-12 = 1.4e-3,
and a logit of magnitude 15 by 0.02. A position whose router is at a tie can be off by more: rounding picks another
expert.
"""
AUTOAWQ_MEAN_BOUND = 0.005
"""Mean difference, router ties included: measured 0.0015; a layout error costs over 0.1."""

FLOAT32_BOUND = 1e-3
"""Same transformers code, same weights, float32 on both sides; four layers amplify 2**-23 to less than this."""


@dataclass(frozen=True)
class Decoded:
    """A client's answer: ``tokens`` [prompts, new], ``log_probs`` [prompts, new, vocabulary], loading problems."""

    tokens: Tensor
    log_probs: Tensor
    loading: dict[str, list[str]]


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_autoawq_decodes_as_the_dequantized_model(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, method: str
) -> None:
    made = build("awq", method)
    reference = _reference(made, torch.float16, client, tmp_path)
    request = _request(tmp_path / "request.json", reference.tokens.tolist())
    client("autoawq", "autoawq_generate", made, request, tmp_path / "autoawq.safetensors")
    loaded = _read(tmp_path / "autoawq.safetensors")

    assert not any(loaded.loading.values()), loaded.loading
    errors = (loaded.log_probs - reference.log_probs).abs()
    assert errors.mean() < AUTOAWQ_MEAN_BOUND
    # One position in twenty may lie at a router's tie.
    assert (errors.amax(dim=-1) < AUTOAWQ_BOUND).float().mean() >= 0.95
    _assert_same_greedy_tokens(reference, loaded, AUTOAWQ_BOUND)


# Of NVFP4's experts transformers 5.23.0 leaves out the global scale, and those of MXFP8 it cannot load.
@pytest.mark.parametrize(
    ("fmt", "method"), [("w4a16", "rtn"), ("w4a16", "awq"), ("w4a16", "gptq"), ("mxfp4", "rtn"), ("mxfp4", "gptq")]
)
def test_transformers_decodes_compressed_tensors_as_the_dequantized_model(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, fmt: str, method: str
) -> None:
    made = build(fmt, method)
    reference = _reference(made, torch.bfloat16, client, tmp_path)
    request = _request(tmp_path / "request.json", reference.tokens.tolist())
    client("compressed-tensors", "transformers_generate", made, "bfloat16", request, tmp_path / "loaded.safetensors")
    loaded = _read(tmp_path / "loaded.safetensors")

    assert not any(loaded.loading.values()), loaded.loading
    assert (loaded.log_probs - reference.log_probs).abs().max() < FLOAT32_BOUND
    _assert_same_greedy_tokens(reference, loaded, FLOAT32_BOUND)


@pytest.mark.parametrize("grid", ["int8-channel", "fp8-channel"])
def test_transformers_decodes_mixtures_as_the_dequantized_model(
    build_recipe: Callable[[dict[str, Any]], Path], client: Client, tmp_path: Path, grid: str
) -> None:
    made = build_recipe({"format": "w4a16", "method": "rtn", "rules": [{"match": "self_attn.*", "grid": grid}]})
    reference = _reference(made, torch.bfloat16, client, tmp_path)
    request = _request(tmp_path / "request.json", reference.tokens.tolist())
    client("compressed-tensors", "transformers_generate", made, "bfloat16", request, tmp_path / "mixed.safetensors")
    loaded = _read(tmp_path / "mixed.safetensors")

    assert not any(loaded.loading.values()), loaded.loading
    assert (loaded.log_probs - reference.log_probs).abs().max() < FLOAT32_BOUND
    _assert_same_greedy_tokens(reference, loaded, FLOAT32_BOUND)


def test_transformers_decodes_chosen_grids_as_the_dequantized_model(
    build_to_bits: Callable[..., Path], client: Client, tmp_path: Path
) -> None:
    """It has one config group for all experts of a model; attention's linears differ by layer."""
    made = build_to_bits(4.4, {"match": "mlp.experts.*", "grid": "int4-g128"})
    groups = json.loads((made / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}
    assert any("layers" in target for group in groups for target in group["targets"])
    reference = _reference(made, torch.bfloat16, client, tmp_path)
    request = _request(tmp_path / "request.json", reference.tokens.tolist())
    client("compressed-tensors", "transformers_generate", made, "bfloat16", request, tmp_path / "sized.safetensors")
    loaded = _read(tmp_path / "sized.safetensors")

    assert not any(loaded.loading.values()), loaded.loading
    assert (loaded.log_probs - reference.log_probs).abs().max() < FLOAT32_BOUND
    _assert_same_greedy_tokens(reference, loaded, FLOAT32_BOUND)


@pytest.mark.parametrize("changes", [{}, {"grid": {"symmetric": False}, "gptq": {"ordering": "desc_act"}}])
def test_gptqmodel_decodes_as_the_dequantized_model(
    build_recipe: Callable[[dict[str, Any]], Path], client: Client, tmp_path: Path, changes: dict[str, Any]
) -> None:
    made = build_recipe({"format": "gptq", "method": "gptq", **changes})
    reference = _reference(made, torch.float16, client, tmp_path)
    request = _request(tmp_path / "request.json", reference.tokens.tolist())
    client("gptqmodel", "gptqmodel_generate", made, request, tmp_path / "gptqmodel.safetensors")
    loaded = _read(tmp_path / "gptqmodel.safetensors")

    assert not any(loaded.loading.values()), loaded.loading
    assert (loaded.log_probs - reference.log_probs).abs().max() < FLOAT32_BOUND
    _assert_same_greedy_tokens(reference, loaded, FLOAT32_BOUND)


@pytest.mark.parametrize(
    ("fmt", "environment"),
    [
        ("fp8", None),
        ("fp8-dynamic", "compressed-tensors"),
        ("w4a8", "compressed-tensors"),
    ],
)
def test_transformers_decodes_what_rounds_inputs_as_the_dequantized_model(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, fmt: str, environment: str | None
) -> None:
    made = build(fmt, "rtn")
    reference = _reference(made, torch.bfloat16, client, tmp_path)
    request = _request(tmp_path / "request.json", reference.tokens.tolist())
    client(environment, "transformers_generate", made, "bfloat16", request, tmp_path / "fp8.safetensors")
    loaded = _read(tmp_path / "fp8.safetensors")

    assert not any(loaded.loading.values()), loaded.loading
    assert (loaded.log_probs - reference.log_probs).abs().max() < FLOAT32_BOUND
    _assert_same_greedy_tokens(reference, loaded, FLOAT32_BOUND)


def test_compressed_tensors_keeps_keys_and_values_as_eval_rounds_them(
    build_recipe: Callable[[dict[str, Any]], Path], client: Client, tmp_path: Path
) -> None:
    """Its cache in FP8, by the scales that it finds in the build: no tensor is left over."""
    made = build_recipe({"format": "w4a16", "method": "rtn", "kv_cache": "fp8"})
    reference = _reference(made, torch.bfloat16, client, tmp_path)
    request = _request(tmp_path / "request.json", reference.tokens.tolist())
    answer = tmp_path / "cached.safetensors"
    client("compressed-tensors", "transformers_generate", made, "bfloat16", request, answer, "rounded")
    loaded = _read(answer)

    assert not any(loaded.loading.values()), loaded.loading
    assert (loaded.log_probs - reference.log_probs).abs().max() > 10 * FLOAT32_BOUND, "nothing was rounded"
    files, model = open_files(made), qconv.load(tmp_path / "dense", dtype=torch.float32, backend="reference")
    for layer in files.architecture.layers:
        rounding = cache_rounding(files, layer)
        assert rounding is not None
        rounding.install(model.get_submodule(layer.attention.name))
    ids = torch.cat([torch.tensor(json.loads(request.read_text())["prompts"]), reference.tokens], 1)
    with torch.inference_mode():
        ours = model(ids, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1].log_softmax(-1)
    # A value that lies on a tie may be rounded the other way, which costs its position more than float32 does.
    distances = (loaded.log_probs - ours).abs().amax(-1)
    assert float(distances.median()) < FLOAT32_BOUND
    assert float(distances.max()) < 0.1


def _reference(made: Path, dtype: torch.dtype, client: Client, scratch: Path) -> Decoded:
    write_dense(made, scratch / "dense", dtype)
    request = _request(scratch / "reference.json", None)
    name = str(dtype).removeprefix("torch.")
    client(None, "transformers_generate", scratch / "dense", name, request, scratch / "reference.safetensors")
    reference = _read(scratch / "reference.safetensors")
    assert not any(reference.loading.values()), reference.loading
    return reference


def _request(path: Path, continuations: list[list[int]] | None) -> Path:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids[:PROMPT_TOKENS] for prompt in PROMPTS]
    assert all(len(prompt) == PROMPT_TOKENS for prompt in prompts)
    path.write_text(json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS, "continuations": continuations}))
    return path


def _read(path: Path) -> Decoded:
    with safe_open(path, "pt") as file:
        loading = json.loads(file.metadata()["loading"])
        return Decoded(file.get_tensor("tokens"), file.get_tensor("log_probs"), loading)


def _assert_same_greedy_tokens(reference: Decoded, loaded: Decoded, bound: float) -> None:
    """Equal tokens, except from a near tie on: two candidates closer than twice the ``bound`` on their errors."""
    assert reference.tokens.shape == (len(PROMPTS), NEW_TOKENS)
    for prompt, (ours, theirs) in enumerate(zip(reference.tokens, loaded.tokens, strict=True)):
        differing = (ours != theirs).nonzero()
        if len(differing) == 0:
            continue
        first = int(differing[0])
        best, second = reference.log_probs[prompt, first].topk(2).values.tolist()
        assert best - second < 2 * bound, f"prompt {prompt} diverges at token {first}, and not at a near tie"
