"""Forms of families: names, keys and refusals of each, and that what they take for granted is transformers' own."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_TENSORS, GGUFValueType, LlamaFileType
from transformers import AutoConfig

import qconv
from qconv.artifacts.source import Source
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.forms import families, form
from qconv.formats.gguf.metadata import model_metadata
from qconv.formats.gguf.names import gguf_tensors
from qconv.formats.gguf.rope import rope_of
from qconv.models import architecture
from qconv.planning.gguf_plan import plan_gguf, write_file
from qconv.runtime.gguf_files import GgufFiles
from qconv.verification.gguf import verify_gguf
from tests.conftest import SIZES
from tests.gguf_copies import copied
from tests.gguf_families import MODELS, MSCALE, YARN, saved, with_joined_split

CHUNKS = ["chunked_attention"] * 3 + ["full_attention", "chunked_attention"]
IDS = torch.arange(40).view(1, 40)


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    family, own = MODELS[name]
    values: dict[str, Any] = AutoConfig.for_model(family, **SIZES | own | changes).to_dict()
    return values


def keys_of(config: dict[str, Any]) -> dict[str, Any]:
    metadata = model_metadata(config, architecture(config), "model", LlamaFileType.ALL_F32)
    prefix = f"{form(config['model_type']).architecture}."
    return {key.removeprefix(prefix): one.value for key, one in metadata.items() if key.startswith(prefix)}


@pytest.mark.parametrize("family", families())
def test_a_form_is_short(family: str) -> None:
    module = importlib.import_module(f"qconv.formats.gguf.forms.{family}")
    assert len(inspect.getsource(module).splitlines()) < 30


def test_a_model_with_towers_is_described_by_its_text_part() -> None:
    config = config_of("deepseek_v3") | {"model_type": "kimi_k2"}
    nested = {"model_type": "kimi_k25", "text_config": config, "vision_config": {}}
    plain = model_metadata(config, architecture(config), "model", LlamaFileType.ALL_F32)
    assert model_metadata(nested, architecture(nested), "model", LlamaFileType.ALL_F32) == plain
    assert plain["general.architecture"].value == "deepseek2"


@pytest.mark.parametrize("family", [family for family in families() if family != "kimi_k2"])
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    config = AutoConfig.for_model(family)
    assert type(config).__name__.removesuffix("Config").removesuffix("Text") == form(family).model_class.removesuffix(
        "ForCausalLM"
    )
    for stated in form(family).stated:
        assert getattr(config, stated.config) in (stated.default, None), stated.config
    for fixed in form(family).fixed:
        if fixed.config is not None:
            assert getattr(config, fixed.config) == fixed.default, fixed.config
    share = form(family).rotated
    if share is not None:
        assert config.rope_parameters.get("partial_rotary_factor", 1.0) == share({})


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_goes_to_one_place_that_the_architecture_has(name: str) -> None:
    model = architecture(config_of(name))
    tensors = gguf_tensors(model)
    assert {tensor.kind for tensor in tensors} <= set(MODEL_TENSORS[form(model.family).table])
    sizes = {name: torch.Size(shape).numel() for name, shape in model.tensors()}
    made = dict.fromkeys(sizes, 0)
    for tensor in tensors:
        for source in tensor.sources:
            made[source] += tensor.numel // len(tensor.sources)
    assert made == sizes
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    permuted = {tensor.name.split(".")[2] for tensor in tensors if tensor.heads}
    assert permuted == ({"attn_q", "attn_k"} if model.family in ("mistral", "smollm3") else set())


@pytest.mark.parametrize(
    ("name", "bias", "source"),
    [
        ("glm4_moe", "blk.1.exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
        ("minimax_m2", "blk.1.exp_probs_b.bias", "block_sparse_moe.e_score_correction_bias"),
        ("ernie4_5_moe", "blk.1.exp_probs_b.bias", "mlp.moe_statics.e_score_correction_bias"),
        ("exaone_moe", "blk.1.exp_probs_b.bias", "mlp.e_score_correction_bias"),
        ("hy_v3", "blk.1.exp_probs_b", "mlp.expert_bias"),
    ],
)
def test_correction_biases_are_vectors_that_no_file_type_touches(name: str, bias: str, source: str) -> None:
    (found,) = [one for one in gguf_tensors(architecture(config_of(name))) if one.name == bias]
    assert found.sources == (f"model.layers.1.{source}",)
    assert found.shape == (6,)  # Ernie's is [1, 6]
    assert not found.quantizable


def test_biases_of_experts_are_matrices_that_no_file_type_touches() -> None:
    found = {one.name: one for one in gguf_tensors(architecture(config_of("gpt_oss")))}
    for role, width in (("gate", 96), ("up", 96), ("down", 64)):
        bias = found[f"blk.1.ffn_{role}_exps.bias"]
        assert bias.shape == (6, width)
        assert not bias.quantizable
        assert found[f"blk.1.ffn_{role}_exps.weight"].quantizable


EXPERTS = {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 32}
UNGROUPED = {"expert_group_count": 1, "expert_group_used_count": 1}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "glm4_moe",
            EXPERTS
            | {"expert_shared_feed_forward_length": 32, "leading_dense_block_count": 1, "expert_gating_func": 2}
            | {"expert_shared_count": 1, "expert_weights_scale": 1.7, "expert_weights_norm": True}
            | UNGROUPED
            | {"rope.dimension_count": 12},
        ),
        (
            "glm4_moe-all-else",
            EXPERTS
            | {"expert_shared_feed_forward_length": 64, "leading_dense_block_count": 2, "expert_gating_func": 2}
            | {"expert_shared_count": 2, "expert_weights_scale": 1.0, "expert_weights_norm": False}
            | {"rope.dimension_count": 6, "expert_group_count": 3, "expert_group_used_count": 2},
        ),
        (
            "minimax_m2",
            EXPERTS | {"expert_feed_forward_length": 96, "expert_gating_func": 2, "rope.dimension_count": 12},
        ),
        (
            "ernie4_5_moe",
            EXPERTS
            | {"expert_shared_feed_forward_length": 64, "leading_dense_block_count": 1, "expert_shared_count": 2}
            | {"interleave_moe_layer_step": 1, "rope.dimension_count": 24},
        ),
        (
            "hy_v3",
            EXPERTS
            | {"expert_shared_feed_forward_length": 32, "leading_dense_block_count": 1, "expert_gating_func": 2}
            | {"expert_shared_count": 1, "expert_weights_scale": 2.826, "expert_weights_norm": True}
            | {"rope.dimension_count": 24},
        ),
        (
            "exaone_moe",
            EXPERTS
            | {"expert_shared_feed_forward_length": 32, "leading_dense_block_count": 1, "expert_gating_func": 2}
            | {"expert_shared_count": 1, "expert_weights_scale": 2.5, "expert_weights_norm": True}
            | UNGROUPED
            | {"attention.sliding_window": 16, "attention.sliding_window_pattern": [True, True, True, False, True]}
            | {"rope.dimension_count": 24},
        ),
        (
            "gpt_oss",
            EXPERTS
            | {"expert_feed_forward_length": 96, "attention.sliding_window": 16, "rope.dimension_count": 24}
            | {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
        ),
        (
            "llama4_text-interleaved",
            EXPERTS
            | {"expert_shared_feed_forward_length": 32, "expert_gating_func": 2, "interleave_moe_layer_step": 2}
            | {"feed_forward_length": 96, "attention.sliding_window": 8192, "rope.dimension_count": 24},
        ),
        (
            "deepseek_v3",
            EXPERTS
            | {"expert_count": 12, "expert_shared_feed_forward_length": 32, "leading_dense_block_count": 1}
            | {"expert_gating_func": 2, "expert_shared_count": 1, "expert_weights_scale": 2.5}
            | {"expert_weights_norm": True, "expert_group_count": 4, "expert_group_used_count": 2}
            | {"attention.head_count_kv": 1, "attention.key_length": 40, "attention.value_length": 32}
            | {"attention.key_length_mla": 40, "attention.value_length_mla": 24, "attention.kv_lora_rank": 32}
            | {"attention.q_lora_rank": 64, "rope.dimension_count": 8, "rope.scaling.type": "yarn"}
            | {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
            | {"rope.scaling.yarn_log_multiplier": 0.1},
        ),
        (
            "qwen3_next",
            EXPERTS
            | {"expert_shared_feed_forward_length": 64, "rope.dimension_count": 8, "full_attention_interval": 4}
            | {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.time_step_rank": 4}
            | {"ssm.inner_size": 64},
        ),
        (
            "qwen3_5_moe_text",
            EXPERTS
            | {"expert_shared_feed_forward_length": 64, "rope.dimension_count": 8, "full_attention_interval": 4}
            | {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.time_step_rank": 4}
            | {"ssm.inner_size": 64, "rope.dimension_sections": [11, 11, 10, 0]},
        ),
        ("olmoe", EXPERTS | {"expert_feed_forward_length": 96, "rope.dimension_count": 16}),
        ("smollm3", {"rope.dimension_count": 24}),
        # 10,000 stretched by 50 ^ (24 / 22), as a base.
        ("hunyuan_v1_dense", {"rope.dimension_count": 24, "rope.freq_base": pytest.approx(1e4 * 50 ** (24 / 22))}),
    ],
)
def test_keys_beside_those_that_all_have(name: str, keys: dict[str, Any]) -> None:
    common = {
        "block_count",
        "context_length",
        "embedding_length",
        "vocab_size",
        "feed_forward_length",
        "attention.layer_norm_rms_epsilon",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.freq_base",
    }
    found = keys_of(config_of(name))
    assert {key: value for key, value in found.items() if key not in common - keys.keys()} == keys


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("qwen3_next", {"linear_value_head_dim": 32}, "heads of 16 and 32: keys are as wide as values"),
        (
            "qwen3_next",
            {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
            "full attention comes at equal distances",
        ),
        ("qwen3_next", {"norm_topk_prob": False}, "always sum to one"),
        ("deepseek_v3", {"q_lora_rank": None}, "no q_lora_rank"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False: neighbours are rotated"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias True: no linear has a bias"),
        ("deepseek_v3", {"rope_parameters": YARN}, "YaRN without mscale"),
        ("deepseek_v3", {"rope_parameters": MSCALE | {"mscale": 0.7}}, "with another mscale_all_dim"),
        ("minimax_m2", {"tie_word_embeddings": True}, "the head is a tensor of its own"),
        ("minimax_m2", {"rotary_dim": 9}, "9 of 24 channels"),
        ("olmoe", {"norm_topk_prob": True}, "never sum to one"),
        ("olmoe", {"clip_qkv": 4.0}, "clip_qkv 4.0: q, k and v are not clipped"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads 2: every query head has a key head of its own"),
        ("dots1", {"num_key_value_heads": 2}, "num_key_value_heads 2: every query head has a key head of its own"),
        ("dots1", {"max_window_layers": 1}, "sliding-window"),
        ("olmoe", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_start_index": 0, "num_hidden_layers": 4}, "layer 2 is"),
        ("ernie4_5_moe", {"moe_layer_end_index": 1}, "layer 2 is dense behind one that has experts"),
        ("ernie4_5", {"use_bias": True}, "the output projection has no bias"),
        ("hy_v3", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "layer 1 is dense behind one that has experts"),
        ("mistral", {"sliding_window": 128}, "sliding-window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding-window"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "every fourth layer"),
        ("smollm3", {"no_rope_layer_interval": 3}, "every fourth layer"),
        ("seed_oss", {"attention_out_bias": True}, "the output projection has no bias"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "all layers but each 2. attend to a window"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias False: q, k, v and o have biases"),
        ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit 6.0: gate and up are limited by 7"),
        ("gpt_oss", {"swiglu_alpha": 1.7}, "swiglu_alpha 1.7: the gate's slope is 1.702"),
        ("gpt_oss", {"tie_word_embeddings": True}, "the head is a tensor of its own"),
        ("gpt_oss", {"rope_parameters": YARN | {"truncate": False}}, "YaRN without truncation"),
        ("llama4_text", {"attention_chunk_size": 4096}, "attention_chunk_size 4096: it is 8192"),
        ("llama4_text", {"no_rope_layers": [1, 1, 1, 1, 1], "layer_types": None}, "but each 4. attend to a window"),
        ("llama4_text", {"no_rope_layers": [1, 0, 1, 0, 1], "layer_types": CHUNKS}, "every fourth layer, and no other"),
        ("llama4_text", {"use_qk_norm": False}, "use_qk_norm False: q and k are normed unless there are 128 experts"),
        ("llama4_text", {"num_local_experts": 128}, "use_qk_norm True"),
        ("llama4_text", {"attn_temperature_tuning": False}, "attn_temperature_tuning False"),
        ("llama4_text", {"floor_scale": 4096}, "floor_scale 4096: the scale rises each 8192 tokens"),
        ("llama4_text", {"attn_scale": 0.2}, "attn_scale 0.2"),
        ("llama4_text", {"attention_bias": True}, "attention_bias True: no linear has a bias"),
        ("llama4_text", {"moe_layers": [1, 3]}, "each 1. layer has experts, and no other"),
        ("solar_open", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "llama3"),
    ],
)
def test_what_llama_cpp_hard_codes_otherwise_is_refused(name: str, changes: dict[str, Any], what: str) -> None:
    family, own = MODELS[name]
    kept = SIZES | own | changes
    if what == "llama3":
        llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        kept["rope_parameters"] = changes["rope_parameters"] | llama3
    config = AutoConfig.for_model(family, **kept).to_dict()
    with pytest.raises(UsageError) as caught:
        keys_of(config)
    assert what in caught.value.message
    assert (caught.value.hint != "This model cannot be written as GGUF.") == ("truncation" in what)


def test_a_dynamic_scaling_with_alpha_is_transformers_frequencies() -> None:
    from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense as modeling

    config: Any = AutoConfig.for_model("hunyuan_v1_dense", **SIZES | MODELS["hunyuan_v1_dense"][1])
    rope = rope_of(config.to_dict())
    expected = modeling.HunYuanDenseV1RotaryEmbedding(config).inv_freq
    ours = rope.theta ** (-torch.arange(0, 24, 2, dtype=torch.float64) / 24)
    torch.testing.assert_close(ours, expected.double(), rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model and its file in BF16, by name; made once."""
    made: dict[str, tuple[Any, Source, Path]] = {}

    def of(name: str) -> tuple[Any, Source, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("forms")
            model, checkpoint = saved(name, folder / "model")
            source = Source.open(checkpoint)
            plan = plan_gguf(source, "BF16", "model")
            write_file(folder, plan, plan.files[0], source)
            made[name] = model, source, folder / plan.files[0].name
        return made[name]

    return of


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_that_it_was_made_of(name: str, files: Any) -> None:
    model, source, file = files(name)
    found = GgufFiles.open(file)
    if form(source.architecture.family).read:
        assert found.architecture == source.architecture
    assert [layer.mlp for layer in found.architecture.layers] == [layer.mlp for layer in source.architecture.layers]
    with torch.no_grad():
        expected, ours = model(IDS).logits, qconv.load(file, dtype="float32")(IDS).logits
    # The backend multiplies bf16 with float32 in another order.
    assert float((ours - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("glm4_moe", "expert_gating_func", (1, GGUFValueType.UINT32)),
        ("glm4_moe", "leading_dense_block_count", (2, GGUFValueType.UINT32)),
        ("minimax_m2", "expert_group_count", (2, GGUFValueType.UINT32)),
        ("qwen3_next", "ssm.inner_size", (65, GGUFValueType.UINT32)),
        ("deepseek_v3", "attention.key_length", (41, GGUFValueType.UINT32)),
        ("deepseek_v3", "attention.head_count_kv", (4, GGUFValueType.UINT32)),
        ("deepseek_v3", "attention.kv_lora_rank", (33, GGUFValueType.UINT32)),
        ("glm4_moe", "rope.dimension_count", (26, GGUFValueType.UINT32)),
        ("hy_v3", "expert_weights_norm", (False, GGUFValueType.BOOL)),
        ("qwen2", "nextn_predict_layers", (1, GGUFValueType.UINT32)),
        ("exaone_moe", "attention.sliding_window_pattern", (4, GGUFValueType.UINT32)),
        ("gpt_oss", "attention.sliding_window_pattern", (4, GGUFValueType.UINT32)),
        ("llama4_text", "attention.sliding_window", (4096, GGUFValueType.UINT32)),
        ("llama4_text", "attention.sliding_window_pattern", (2, GGUFValueType.UINT32)),
        ("glm4_moe", "nextn_predict_layers", (3, GGUFValueType.UINT32)),
    ],
)
def test_keys_that_contradict_are_refused_by_name(name: str, key: str, value: Any, files: Any, tmp_path: Path) -> None:
    _, source, file = files(name)
    full = f"{form(source.architecture.family).architecture}.{key}"
    copy = copied(file, tmp_path / "copy.gguf", {full: value}, drop=[full])
    latent = "those of one latent key head" if name == "deepseek_v3" else key
    with pytest.raises(CheckpointError, match="only predict" if value[0] == 3 else latent):
        GgufFiles.open(copy)


def test_what_a_file_must_say_is_missed(files: Any, tmp_path: Path) -> None:
    """Without it llama.cpp's hy_v3 leaves the chosen experts' weights as they are."""
    copy = copied(files("hy_v3")[2], tmp_path / "copy.gguf", drop=["hy_v3.expert_weights_norm"])
    with pytest.raises(CheckpointError, match="expert_weights_norm"):
        GgufFiles.open(copy)


def test_layers_that_only_predict_are_left_out_as_llama_cpp_leaves_them_out(files: Any, tmp_path: Path) -> None:
    model, _, file = files("glm4_moe")
    keys = {
        "glm4moe.block_count": (4, GGUFValueType.UINT32),
        "glm4moe.nextn_predict_layers": (1, GGUFValueType.UINT32),
    }
    added = {"blk.3.nextn.enorm.weight": [1.0] * 64, "blk.3.attn_norm.weight": [1.0] * 64}
    copy = copied(file, tmp_path / "copy.gguf", keys, tensors=added)
    with torch.no_grad():
        expected, ours = model(IDS).logits, qconv.load(copy, dtype="float32")(IDS).logits
    assert float((ours - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    beyond = copied(file, tmp_path / "beyond.gguf", keys, tensors=added | {"blk.4.attn_norm.weight": [1.0] * 64})
    with pytest.raises(CheckpointError, match=r"blk\.4\.attn_norm"):
        GgufFiles.open(beyond)


def test_a_file_of_llama_cpps_own_converter_has_some_tensors_otherwise(tmp_path: Path) -> None:
    model, checkpoint = saved("qwen3_next", tmp_path / "model")
    source = Source.open(checkpoint)
    plan = plan_gguf(source, "F32", "model")
    write_file(tmp_path, plan, plan.files[0], source)
    split = with_joined_split(tmp_path / plan.files[0].name, tmp_path / "split.gguf")
    assert "blk.0.ssm_in.weight" not in GgufFiles.open(split).model.entries
    with torch.no_grad():
        expected, ours = model(IDS).logits, qconv.load(split, dtype="float32")(IDS).logits
    assert float((ours - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    assert not verify_gguf(split, checkpoint).problems
