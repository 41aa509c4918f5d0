"""Families against transformers: what a tiny model saves is exactly what the family says a checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from qconv.core.architecture import Moe
from qconv.errors import CheckpointError
from qconv.models import architecture, families

# Four heads of 10 (or 16) in a hidden size of 32: a head size taken for hidden / heads shows.
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS | {"num_experts": 6, "head_dim": 10},
    "qwen2_moe": EXPERTS | {"num_experts": 6, "shared_expert_intermediate_size": 40},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 10},
    "llama": {},
}
VARIATIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    *((name, {"tie_word_embeddings": True}) for name in FAMILIES),
    *((name, {"num_key_value_heads": 4}) for name in FAMILIES),
    *((name, {"num_key_value_heads": 1}) for name in FAMILIES),
    *((name, {"head_dim": 16}) for name in FAMILIES),
    *((name, {"attention_bias": True}) for name in FAMILIES),  # Mixtral and Qwen2-MoE do not know it
    *((name, {"mlp_bias": True}) for name in FAMILIES),  # of these only Llama knows it
    ("qwen2_moe", {"qkv_bias": False}),
    *(
        (name, sparsity)
        for name in ("qwen3_moe", "qwen2_moe")
        for sparsity in (
            {"mlp_only_layers": [0, 2]},
            {"decoder_sparse_step": 2},
            {"decoder_sparse_step": 3, "mlp_only_layers": [2]},  # no sparse layer at all
        )
    ),
]


def save(folder: Path, model_type: str, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A random model of the family saved by transformers: its config.json and the shapes of its tensors."""
    config = AutoConfig.for_model(model_type, **BASE | FAMILIES[model_type] | changes)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    shapes = saved(model, folder)
    return json.loads((folder / "config.json").read_text()), shapes


def saved(model: Any, folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what transformers saves of a model."""
    model.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    return shapes


def with_older_keys(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The config as transformers 4 wrote it."""
    older = dict(config)
    older["rope_theta"] = older.pop("rope_parameters")["rope_theta"]
    if model_type != "mixtral" and "num_local_experts" in older:
        older["num_experts"] = older.pop("num_local_experts")
    return older


def test_every_family_is_tested() -> None:
    assert sorted(FAMILIES) == families()


@pytest.mark.parametrize(("model_type", "changes"), VARIATIONS, ids=lambda value: str(value))
def test_tensors_are_exactly_those_that_transformers_saves(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config, shapes = save(tmp_path, model_type, changes)
    for variant in (config, with_older_keys(config, model_type)):
        tensors = list(architecture(variant).tensors())
        assert dict(tensors) == shapes
        assert len(tensors) == len(shapes)  # each once


def test_qwen3_without_head_dim_has_heads_of_128(tmp_path: Path) -> None:
    config, shapes = save(tmp_path, "qwen3", {"head_dim": 128})
    del config["head_dim"]
    assert dict(architecture(config).tensors()) == shapes


def test_tied_head_may_lie_in_the_checkpoint_and_is_not_needed() -> None:
    tied = architecture(BASE | FAMILIES["llama"] | {"model_type": "llama", "tie_word_embeddings": True})
    assert tied.lm_head is None
    assert "lm_head.weight" in tied.ignorable()
    untied = architecture(BASE | FAMILIES["llama"] | {"model_type": "llama"})
    assert "lm_head.weight" not in untied.ignorable()


def test_routers_and_shared_expert_gates_are_no_candidates_for_quantization() -> None:
    layer = architecture(BASE | FAMILIES["qwen2_moe"] | {"model_type": "qwen2_moe"}).layers[1]
    assert [router.name for router in layer.routers()] == [
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.shared_expert_gate",
    ]
    names = [linear.name for linear in layer.linears()]
    assert len(names) == 4 + 3 * (6 + 1)  # q, k, v, o; gate, up, down of six experts and the shared one
    assert not [name for name in names if name.endswith("gate")]


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [True, True, True, True]),
        ({"mlp_only_layers": [0, 2]}, [False, True, False, True]),
        ({"decoder_sparse_step": 2}, [False, True, False, True]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [False, False, False, True]),
        ({"mlp_only_layers": None}, [True, True, True, True]),
    ],
)
def test_sparse_layers(changes: dict[str, Any], sparse: list[bool]) -> None:
    layers = architecture(BASE | FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe"} | changes).layers
    assert [isinstance(layer.mlp, Moe) for layer in layers] == sparse


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"unknown architecture: model_type 'gpt2'"),
        ({"model_type": "base"}, r"unknown architecture: model_type 'base'"),  # a module of ours, no family
        ({"model_type": "../llama"}, r"unknown architecture"),
        ({"model_type": None}, r"no model_type"),
        ({"model_type": 3}, r"no model_type"),
        ({"hidden_size": None}, r"lacks hidden_size"),
        ({"num_experts": None}, r"lacks num_local_experts or num_experts"),
        ({"num_experts": "six"}, r"num_experts is 'six', not a positive integer"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers is 2\.0"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0"),
        ({"vocab_size": True}, r"vocab_size is True"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings is 'yes', not true or false"),
        ({"mlp_only_layers": [0, "1"]}, r"mlp_only_layers is \[0, '1'\], not a list of integers"),
        ({"mlp_only_layers": 1}, r"mlp_only_layers is 1, not a list of integers"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers 1000000000 is not plausible"),
        ({"num_experts": 10**9}, r"num_experts 1000000000 is not plausible"),
        ({"num_hidden_layers": 9999, "num_experts": 9999}, r"9,999 experts in each of 9,999 layers"),
        ({"head_dim": 10**7}, r"head_dim 10000000 is not plausible"),
        ({"vocab_size": 10**400}, r"vocab_size a number of 1329 bits is not plausible"),
        ({"hidden_size": -(10**400)}, r"hidden_size is a number of 1329 bits"),
        ({"hidden_size": "x" * 10**6}, r"hidden_size is .{,90}, not a positive integer"),
        ({"mlp_only_layers": [0] * 10**6}, r"mlp_only_layers is .{,90}, not a list of integers"),
        ({"num_key_value_heads": 3}, r"num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 8}, r"num_attention_heads 4 is no multiple of num_key_value_heads 8"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-6}, r"rms_norm_eps is -1e-06"),
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps is '1e-6'"),
        ({"rope_theta": float("inf")}, r"rope_theta is inf"),
        ({"rope_theta": 10**400}, r"rope_theta is a number of 1329 bits"),
        ({"num_experts_per_tok": 7}, r"num_experts_per_tok 7 exceeds the 6 experts"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    config = BASE | FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe"} | changes
    with pytest.raises(CheckpointError, match=message) as caught:
        architecture({key: value for key, value in config.items() if value is not None})
    assert caught.value.hint


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers", "moe_intermediate_size"])
def test_a_missing_key_is_named(key: str) -> None:
    config = BASE | FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe"}
    del config[key]
    with pytest.raises(CheckpointError, match=rf"config\.json lacks {key}"):
        architecture(config)
