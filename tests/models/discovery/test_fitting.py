"""Architectures of types without a family file: equal to the declared ones where both exist, refused where unlike."""

from __future__ import annotations

import importlib
import resource
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from evals.model_types import config_of
from qconv.core.architecture import Joined, Linear, Moe, Norm, Parameter
from qconv.errors import CheckpointError
from qconv.models import architecture, is_known
from qconv.models.discovery.fitting import fitted
from tests.models.test_families import BASE, FAMILIES, VARIATIONS


@pytest.mark.parametrize(("model_type", "changes"), VARIATIONS)
def test_declared_families_fit_as_they_are_declared(model_type: str, changes: dict[str, Any]) -> None:
    values = AutoConfig.for_model(model_type, **BASE | FAMILIES[model_type] | changes).to_dict()
    declared, found = architecture(values), fitted(values)
    for one, other in zip(declared.layers, found.layers, strict=True):
        assert one.input_norm == other.input_norm
        assert one.post_attention_norm == other.post_attention_norm
        assert one.attention.linears() == other.attention.linears()
        assert {*one.heads.head_norms} == {*other.heads.head_norms}
        assert one.mlp == other.mlp
    kept = ("family", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "embedding", "lm_head")
    for name in (*kept, "final_norm", "held"):
        assert getattr(declared, name) == getattr(found, name), name


FITTING = [
    "mistral",
    "qwen2",
    "smollm3",
    "olmoe",
    "glm4_moe",
    "minimax_m2",
    "solar_open",
    "ernie4_5_moe",
    "exaone_moe",
    "hy_v3",
    "qwen3_next",
    "qwen3_5_moe_text",
    "deepseek_v3",
    "dots1",
    "deepseek_v2",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "internlm3",
    "iquestcoder",
    "ministral3",
    "cwm",
    "hunyuan_v1_moe",
    "gpt_oss",
    "laguna",
    "llama4_text",
    "mellum",
    "ernie4_5",
    "seed_oss",
    "helium",
    "hunyuan_v1_dense",
    "qwen3_5_text",
    "bamba",
    "jamba",
]


@pytest.mark.parametrize("model_type", FITTING)
def test_types_without_a_file(model_type: str) -> None:
    config = config_of(model_type).to_dict()
    found = architecture(config)
    assert found.family == model_type
    assert is_known(config)
    assert len(found.layers) == config["num_hidden_layers"]


def test_what_is_kept_beside_linears() -> None:
    found = architecture(config_of("minimax_m2").to_dict())
    layer = found.layers[1]
    assert isinstance(layer.mlp, Moe)
    assert layer.mlp.parameters == (Parameter("model.layers.1.block_sparse_moe.e_score_correction_bias", (4,)),)
    assert {*layer.heads.head_norms} == {
        Norm("model.layers.1.self_attn.q_norm", 64),  # over all heads, not over one
        Norm("model.layers.1.self_attn.k_norm", 32),
    }
    glm = architecture(config_of("glm4_moe").to_dict())
    first, second = glm.layers[0].mlp, glm.layers[1].mlp
    assert not isinstance(first, Moe)
    assert isinstance(second, Moe)
    assert second.shared_expert is not None
    assert second.shared_expert_gate is None
    assert second.top_k == 2


def test_a_shared_expert_as_wide_as_there_are_experts_is_not_taken_for_the_router() -> None:
    values = config_of("qwen3_next").to_dict() | {"num_experts": 40, "shared_expert_intermediate_size": 40}
    moe = architecture(values).layers[0].mlp
    assert isinstance(moe, Moe)
    assert moe.router.name == "model.layers.0.mlp.gate"
    assert moe.shared_expert is not None
    assert moe.shared_expert.gate.out_features == len(moe.experts) == 40


def test_a_layer_that_takes_the_choice_of_the_one_before_it_is_refused() -> None:
    values = config_of("glm_moe_dsa").to_dict()
    assert len(fitted(values | {"indexer_types": ["full"] * 3}).layers) == 3
    with pytest.raises(CheckpointError, match=r"self_attn does not run by itself"):
        fitted(values | {"indexer_types": ["full", "shared", "full"]})


@pytest.mark.parametrize("limit", [0.8, 8.0])
def test_scales_do_not_fold_into_values_that_are_limited(limit: float) -> None:
    values = config_of("olmoe").to_dict()
    assert all(isinstance(layer.groups()[-1].producer, Linear) for layer in fitted(values).layers)
    limited = fitted(values | {"clip_qkv": limit})
    assert [layer.groups()[-1].producer for layer in limited.layers] == [None] * len(limited.layers)


def test_an_mlp_with_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mistral.modeling_mistral import MistralMLP

    def forward(self: Any, x: Tensor) -> Tensor:
        up = self.up_proj(x).clamp(min=-7.0, max=7.0)
        limited: Tensor = self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7.0)) * up)
        return limited

    monkeypatch.setattr(MistralMLP, "forward", forward)
    with pytest.raises(CheckpointError, match=r"mlp is not gated as its config says"):
        fitted(config_of("mistral").to_dict() | {"rms_norm_eps": 1.5e-6})


def test_how_experts_are_joined() -> None:
    joined = {name: architecture(config_of(name).to_dict()).joined for name in ("gpt_oss", "llama4_text", "olmoe")}
    assert joined["gpt_oss"] == Joined(transposed=True, interleaved=True, always=True)
    assert joined["llama4_text"] == Joined(transposed=True, interleaved=False, always=True)
    assert joined["olmoe"] == Joined()
    moes = {name: architecture(config_of(name).to_dict()).layers[-1].mlp for name in joined}
    assert [moe.scales_inputs for moe in moes.values() if isinstance(moe, Moe)] == [False, True, False]
    assert [moe.experts[0].folds for moe in moes.values() if isinstance(moe, Moe)] == [False, True, True]
    assert [moe.experts[0].down.bias for moe in moes.values() if isinstance(moe, Moe)] == [True, False, False]


def test_a_model_of_linear_attention_alone() -> None:
    values = config_of("qwen3_next").to_dict() | {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}
    (layer,) = architecture(values).layers
    assert layer.attention.name == "model.layers.0.linear_attn"


UNLIKE: dict[str, tuple[str, dict[str, Any], str]] = {
    "logits that are scaled": ("cohere2", {}, "logits are scaled"),
    "norms after": ("olmo2", {}, "no norm makes what"),
    "joined gate and up": ("phi3", {}, "gate_proj is no linear"),
    "a multiplier on what is added": ("granite", {"residual_multiplier": 0.5}, "is not simply added"),
    "an embedding that multiplies": ("gemma", {}, "the embedding is scaled"),
    "experts under another name": ("granitemoe", {}, "input_linear are experts under a name of their own"),
    "an embedding of another name": ("nemotron_h", {}, "its embedding is not called embed_tokens"),
    "a multiplier on the embedding": ("granite", {"embedding_multiplier": 2.0}, "the embedding is scaled"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_another_kind_is_refused_with_what_is_unlike(name: str) -> None:
    model_type, changes, said = UNLIKE[name]
    config = config_of(model_type).to_dict() | changes
    with pytest.raises(CheckpointError) as caught:
        architecture(config)
    assert "unknown architecture" in caught.value.message
    assert said in caught.value.message
    assert f"qconv/models/{model_type}.py" in str(caught.value.hint)
    assert not is_known(config)


_ROUTE: Any = OlmoeTopKRouter.forward


def _swapped_mlp(self: Any, x: Tensor) -> Any:
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def _swapped_experts(self: Any, hidden: Tensor, indices: Tensor, factors: Tensor) -> Tensor:
    found = torch.zeros_like(hidden)
    for expert in range(len(self.down_proj)):
        up, gate = (hidden @ self.gate_up_proj[expert].t()).chunk(2, dim=-1)
        share = (factors * (indices == expert)).sum(-1, keepdim=True)
        found += share * ((self.act_fn(gate) * up) @ self.down_proj[expert].t())
    return found


def _exponential(self: Any, hidden: Tensor) -> Any:
    return self.weight.exp() * hidden


def _normalized(self: Any, hidden: Tensor) -> Any:
    return _ROUTE(self, torch.nn.functional.normalize(hidden, dim=-1))


def _later_layers(self: Any, x: Tensor) -> Any:
    gate = self.act_fn(self.gate_proj(x))
    return self.down_proj((gate * gate if self.later else gate) * self.up_proj(x))


PLANTED = {
    "a router": ("olmoe", "olmoe", "OlmoeTopKRouter", _normalized, "router looks at more than products"),
    "gate and up of an MLP": ("mistral", "mistral", "MistralMLP", _swapped_mlp, "is not gated as its config says"),
    "gate and up of experts": (
        "olmoe",
        "olmoe",
        "OlmoeExperts",
        _swapped_experts,
        "are not gated as their config says",
    ),
    "a norm": ("qwen2", "qwen2", "Qwen2RMSNorm", _exponential, "does not scale what it gives"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_module_that_computes_otherwise_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, module, kind, forward, said = PLANTED[name]
    values = config_of(model_type).to_dict()
    planted = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), kind)
    monkeypatch.setattr(planted, "forward", forward)
    with pytest.raises(CheckpointError) as caught:
        fitted(values | {"architectures": [name]})  # another text, so that no earlier answer is given
    assert said in caught.value.message


def test_a_layer_that_computes_otherwise_than_those_before_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    real: Any = MistralMLP.__init__

    def init(self: Any, config: Any) -> None:
        nonlocal made
        real(self, config)
        self.later, made = made > 0, made + 1

    monkeypatch.setattr(MistralMLP, "__init__", init)
    monkeypatch.setattr(MistralMLP, "forward", _later_layers)
    with pytest.raises(CheckpointError, match="is not gated as its config says"):
        fitted(config_of("mistral").to_dict() | {"architectures": ["later layers"]})


IMPLAUSIBLE = {
    "an empty expert": ("olmoe", {"intermediate_size": 0}, "would be [0, 64]"),
    "an empty MLP": ("mistral", {"intermediate_size": 0}, "config.json: "),
    "a wide expert": ("glm4_moe", {"moe_intermediate_size": 10**9}, "would be [1000000000, 64]"),
    "a wide MLP": ("mistral", {"intermediate_size": 10**9}, "would be [1000000000, 64]"),
    "many shared experts": ("ernie4_5_moe", {"moe_num_shared_experts": 10**9}, "sizes of 1 to"),
    "wide heads": ("glm4_moe", {"head_dim": 10**9}, "sizes of 1 to"),
    "many heads": ("glm4_moe", {"num_attention_heads": 10**9}, "config.json: "),
    "no heads": ("mistral", {"num_attention_heads": 0}, "config.json: "),
    "negative heads": ("mistral", {"num_attention_heads": -4}, "config.json: "),
    "no expert a token": ("ernie4_5_moe", {"moe_k": 0}, "sends a token to no expert"),
}


@pytest.mark.parametrize("name", IMPLAUSIBLE)
def test_implausible_sizes_are_refused_before_they_take_memory(name: str) -> None:
    model_type, changes, said = IMPLAUSIBLE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        architecture(config_of(model_type).to_dict() | changes)
    assert said in caught.value.message
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500 * 1024  # kibibytes; one number a row has 4 GB
