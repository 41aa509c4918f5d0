"""The streamed forward pass against transformers' own hidden states, layer by layer, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qconv.calibration import experts, layer
from qconv.calibration.activations import ActivationFile
from qconv.calibration.corpus import build_tokens
from qconv.errors import CheckpointError
from qconv.planning.recipe import Recipe
from qconv.runtime.dense import write_dense
from tests.conftest import build, random_model, save_model, small_recipe

LENGTH = 32  # of a sequence
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {}),
    ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": True}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "tie_word_embeddings": True}),
    ("qwen3_moe", {"rope_theta": 100.0, "hidden_act": "gelu"}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 9}),  # shorter than a sequence
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),  # one layer full, two not
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4, "rope_theta": 50.0}),
]


class Float32File(ActivationFile):
    """Activations without rounding, so that what is compared is the arithmetic alone."""

    def __init__(self, path: Path, tokens: int, width: int, dtype: torch.dtype) -> None:
        super().__init__(path, tokens, width, torch.float32)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations between layers in float32."""
    monkeypatch.setattr(layer, "ActivationFile", Float32File)


def layer_inputs(model: Path, out: Path, recipe: Recipe, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What each layer sees during a build, float32 [tokens, hidden]."""
    seen: dict[str, Tensor] = {}

    def look(key: str, done: int, total: int) -> None:
        if key.startswith("layer-") and key not in seen:  # the layer begins: its inputs are on disk
            raw = bytearray((out / ".qconv" / f"inputs-{key.removeprefix('layer-')}.bin").read_bytes())
            tokens = recipe.calibration.tokens
            seen[key] = torch.frombuffer(raw, dtype=dtype).view(tokens, -1).float()

    build(model, out, recipe, progress=look)
    return list(seen.values())


def hidden_states(model: Path, recipe: Recipe, tokenizer: Path | None = None) -> list[Tensor]:
    """The same from transformers, in float32; the last is the normalized output of the last layer."""
    from transformers import AutoModelForCausalLM

    ids = build_tokens(recipe.calibration, tokenizer or model).ids.long()
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        states = loaded.eval()(ids, output_hidden_states=True).hidden_states
    return [state.flatten(0, 1) for state in states]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Equal up to ``tolerance`` of the largest value."""
    assert len(found) == len(expected) - 1 == 3
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance, f"inputs of layer {number}"


def three_layers(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> Path:
    """A random checkpoint of three layers, so that two layers' outputs are seen."""
    return save_model(random_model(model_type, num_hidden_layers=3, **changes), tmp_path / "model")


def recipe(propagate: bool) -> Recipe:
    """AWQ, the method that runs the forward pass; clipped weights matter only where they are passed on."""
    calibration = {"tokens": 2 * LENGTH, "sequence_length": LENGTH, "propagate": propagate}
    return small_recipe("awq", "w4a16", calibration=calibration, clip={"enabled": propagate})


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=lambda value: str(value))
def test_the_unquantized_pass_is_transformers_own(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    model = three_layers(tmp_path, model_type, changes)
    settings = recipe(propagate=False)
    # float32 sums in another order.
    assert_same(layer_inputs(model, tmp_path / "out", settings), hidden_states(model, settings), 2e-5)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("model_type", "changes"), [CASES[0], CASES[2], CASES[7], CASES[9]], ids=lambda value: str(value)
)
def test_the_propagated_pass_is_the_builds_own(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    model, out, dense = three_layers(tmp_path, model_type, changes), tmp_path / "out", tmp_path / "dense"
    settings = recipe(propagate=True)
    found = layer_inputs(model, out, settings)
    write_dense(out, dense, torch.float32)
    expected = hidden_states(dense, settings, model)
    assert_same(found, expected, 1e-4)
    # And it is not the source's: quantization is felt.
    source = hidden_states(model, settings)
    assert float((found[2] - source[2]).abs().max() / source[2].abs().max()) > 1e-2


def test_between_layers_activations_are_rounded_to_bf16_once(tmp_path: Path) -> None:
    model = three_layers(tmp_path, "qwen3_moe", {})
    settings = recipe(propagate=False)
    found = layer_inputs(model, tmp_path / "out", settings, torch.bfloat16)
    # bf16 keeps 8 bits: an error of 2^-9 in each value, layer upon layer; a token's routing may tip over.
    expected = hidden_states(model, settings)
    for ours, theirs in zip(found, expected, strict=False):
        error = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)
        assert float(error) < 2e-2


@pytest.mark.usefixtures("exact")
def test_windows_of_any_size_give_the_same_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = three_layers(tmp_path, "qwen2_moe", {})
    settings = recipe(propagate=False)
    monkeypatch.setattr(experts, "WINDOW_TOKENS", 7)
    assert_same(layer_inputs(model, tmp_path / "out", settings), hidden_states(model, settings), 2e-5)


def test_a_config_that_transformers_refuses_is_a_checkpoint_error(
    moe_copy: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    edit_json(moe_copy / "config.json", hidden_act="no such activation")
    with pytest.raises(CheckpointError, match=r"config\.json: transformers does not accept it"):
        build(moe_copy, tmp_path / "out", recipe(propagate=False))
