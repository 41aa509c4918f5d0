"""Published models of which random slices can be made: their config.json, and how they store their weights.

Numbers are those of the models' own config.json files. A slice has fewer layers, all of them sparse where the model has
sparse ones, or fewer experts; everything else is as published, the storage too: bf16, FP8 in blocks with a scale each
(DeepSeek-V3, Kimi-K2), or MXFP4 with all experts of a layer in one tensor (gpt-oss).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qconv.artifacts.separation import joined_tensors
from qconv.checkpoint import mxfp4
from qconv.checkpoint.header import TensorSpec
from qconv.core.architecture import Architecture, Norm, Parameter
from qconv.errors import UsageError
from qconv.models import architecture

FP8, MXFP4 = "fp8", "mxfp4"
_BLOCK = 128
_FP8_SECTION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [_BLOCK, _BLOCK],
}
_MXFP4_SECTION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model.

    Attributes:
        values: Its config.json but for layers and experts.
        layers: How many it has.
        experts: How many a layer has.
        experts_key: The key of config.json that says so.
        storage: :data:`FP8`, :data:`MXFP4`, or empty for bf16.
        parameters: The dtype of parameters that are kept in another than bf16, by their last name.
    """

    values: Mapping[str, Any]
    layers: int
    experts: int
    experts_key: str
    storage: str = ""
    parameters: Mapping[str, torch.dtype] = field(default_factory=dict)

    def config(self, layers: int, experts: int) -> dict[str, Any]:
        """config.json of a slice.

        Raises:
            UsageError: the model has fewer layers or experts, or a token goes to more than so many experts.
        """
        top_k = self.values["num_experts_per_tok"]
        for what, count, least, most in (("layers", layers, 1, self.layers), ("experts", experts, top_k, self.experts)):
            if not least <= count <= most:
                raise UsageError(f"a slice of {count:,} {what} cannot be made: {least} to {most} are possible.")
        groups = self.values.get("n_group", 1)
        if experts % groups or experts // groups < 2 or top_k > experts // groups * self.values.get("topk_group", 1):
            raise UsageError(
                f"a slice of {experts:,} experts cannot be made: they stand in {groups} groups, of which a token sees "
                f"{self.values.get('topk_group', 1)}.",
                hint=f"Ask for a multiple of {groups} that is larger.",
            )
        config = {**self.values, "num_hidden_layers": layers, self.experts_key: experts}
        sections: dict[str, dict[str, Any]] = {FP8: _FP8_SECTION, MXFP4: _MXFP4_SECTION}
        return config | ({"quantization_config": sections[self.storage]} if self.storage else {})

    def tensors(self, config: Mapping[str, Any]) -> Iterator[TensorSpec]:
        """What the files of a slice hold."""
        model = architecture(dict(config))
        joined = self._joined(model)
        taken = {name for _, names in joined.values() for name in names}
        quantized = self._in_blocks(model) if self.storage == FP8 else set()
        for name, shape in model.tensors():
            if name in taken:
                continue
            if name not in quantized:
                yield TensorSpec(name, self.parameters.get(name.rpartition(".")[2], torch.bfloat16), shape)
                continue
            yield TensorSpec(name, torch.float8_e4m3fn, shape)
            yield TensorSpec(f"{name}_scale_inv", torch.float32, tuple(-(-size // _BLOCK) for size in shape))
        for spec, _ in joined.values():
            yield spec

    def _joined(self, model: Architecture) -> dict[str, tuple[TensorSpec, list[str]]]:
        """Tensors of all experts of a layer, with those that they stand for."""
        leaves = {mxfp4.BLOCKS: torch.uint8, mxfp4.SCALES: torch.uint8} if self.storage == MXFP4 else {}
        leaves |= {"bias": torch.bfloat16} | ({} if self.storage == MXFP4 else {"weight": torch.bfloat16})
        found = {}
        for name, one in joined_tensors(model).items() if model.joined.always else ():
            if one.leaf in leaves:
                stand_for = [f"{linear.name}.weight" for mlp in one.moe.experts for linear in one.linears(mlp)]
                names = [*one.names()] if one.leaf in ("weight", "bias") else stand_for
                found[name] = TensorSpec(name, leaves[one.leaf], one.shape), names
        return found

    def _in_blocks(self, model: Architecture) -> set[str]:
        """Weights in FP8: every linear of a layer but routers."""
        kept = {module.name for layer in model.layers for module in layer.routing()}
        modules = (module for layer in model.layers for module in layer.modules())
        linears = (module for module in modules if not isinstance(module, Norm | Parameter))
        return {linear.weight for linear in linears if linear.name not in kept}


def _deepseek(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 0,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 129280,
        **changes,
    }


_CORRECTED = {"e_score_correction_bias": torch.float32}

PUBLISHED: dict[str, PublishedModel] = {
    "deepseek-v3": PublishedModel(_deepseek(), 61, 256, "n_routed_experts", FP8, _CORRECTED),
    "kimi-k2": PublishedModel(
        _deepseek(
            num_attention_heads=64,
            num_key_value_heads=64,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.827,
            rope_theta=50000.0,
            vocab_size=163840,
            model_type="kimi_k2",
        ),
        61,
        384,
        "n_routed_experts",
        FP8,
        _CORRECTED,
    ),
    "qwen3-next-80b": PublishedModel(
        {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts_per_tok": 10,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 151936,
        },
        48,
        512,
        "num_experts",
    ),
    "glm-4.6": PublishedModel(
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": True,
            "attention_bias": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000,
            "max_position_embeddings": 202752,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 151552,
        },
        92,
        160,
        "n_routed_experts",
        "",
        _CORRECTED,
    ),
    "gpt-oss-120b": PublishedModel(
        {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_experts_per_tok": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
            "max_position_embeddings": 131072,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 201088,
        },
        36,
        128,
        "num_local_experts",
        MXFP4,
    ),
}
"""By the name that ``bench slice --like`` knows them by."""
