"""Minimal builds as engines see them, sound ones, and ways to break one thing of each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qconv.engines.subject import Stored, Subject

Change = Callable[["Draft"], None]
HIDDEN, WIDTH, HEADS, HEAD_DIM, LAYERS, EXPERTS = 512, 256, 8, 64, 2, 4
SIZES = {
    "self_attn.q_proj": (512, 512),
    "self_attn.k_proj": (256, 512),
    "self_attn.v_proj": (256, 512),
    "self_attn.o_proj": (512, 512),
    **{
        f"mlp.experts.{expert}.{leaf}": shape
        for expert in range(EXPERTS)
        for leaf, shape in (("gate_proj", (256, 512)), ("up_proj", (256, 512)), ("down_proj", (512, 256)))
    },
}
ROUTER = "model.layers.0.mlp.gate"
Q, K, GATE, UP, DOWN = (
    *(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qk"),
    *(f"model.layers.0.mlp.experts.0.{leaf}_proj" for leaf in ("gate", "up", "down")),
)


class Draft:
    """A build that may be changed before it is looked at."""

    def __init__(self, section: dict[str, Any] | None, leaves: Callable[[int, int], dict[str, Stored]]) -> None:
        self.config: dict[str, Any] = {
            "model_type": "qwen3_moe",
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 4,
            "head_dim": HEAD_DIM,
            "num_hidden_layers": LAYERS,
            "num_experts": EXPERTS,
            "rope_theta": 10000.0,
        }
        self.section = copy.deepcopy(section)
        self.tensors = {"model.embed_tokens.weight": dense(1000, HIDDEN), "lm_head.weight": dense(1000, HIDDEN)}
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}."
            self.tensors[f"{prefix}input_layernorm.weight"] = Stored("BF16", (HIDDEN,))
            self.tensors[f"{prefix}mlp.gate.weight"] = dense(EXPERTS, HIDDEN)
            for name, shape in SIZES.items():
                self.tensors |= {f"{prefix}{name}.{leaf}": one for leaf, one in leaves(*shape).items()}
        self.values: dict[str, Tensor] = {}
        self.files = {"model-00001-of-00001.safetensors", "config.json", "generation_config.json"}
        self.generation: dict[str, Any] | None = {"eos_token_id": 1}
        self.quantization_file: dict[str, Any] | None = None
        self.template: str | None = "{{ messages }}"

    def subject(self) -> Subject:
        """As rules look at it; numbers that no change gave are 1."""
        return Subject(
            config={**self.config, "quantization_config": self.section} if self.section else self.config,
            section=self.section,
            tensors=self.tensors,
            files=frozenset(self.files),
            generation=self.generation,
            quantization_file=self.quantization_file,
            template=self.template,
            read=lambda name: self.values.get(name, torch.ones(1)),
        )

    def drop(self, *names: str) -> None:
        """Without some tensors."""
        for name in names:
            del self.tensors[name]

    def reshape(self, name: str, *shape: int) -> None:
        """With another shape of one."""
        self.tensors[name] = replace(self.tensors[name], shape=shape)

    def plain(self, *modules: str) -> None:
        """With modules that are not quantized."""
        for module in modules:
            shape = next(shape for name, shape in SIZES.items() if module.endswith(name))
            for name in [name for name in self.tensors if name.startswith(f"{module}.")]:
                del self.tensors[name]
            self.tensors[f"{module}.weight"] = dense(*shape)


def dense(rows: int, columns: int) -> Stored:
    """A plain weight."""
    return Stored("BF16", (rows, columns))


def routers() -> list[str]:
    """What every list of exceptions must name."""
    return ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS))]


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """compressed-tensors' words, with one group."""
    group = {"targets": ["Linear"], "format": form, "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": routers(),
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def int4(group: int = 128, **changes: Any) -> dict[str, Any]:
    """What is said of int4 weights."""
    said = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False}
    return said | changes


def w4a16(group: int = 128, **changes: Any) -> Draft:
    """pack-quantized."""

    def leaves(rows: int, columns: int) -> dict[str, Stored]:
        return {
            "weight_packed": Stored("I32", (rows, columns // 8)),
            "weight_scale": Stored("BF16", (rows, columns // group)),
            "weight_shape": Stored("I64", (2,)),
        }

    return Draft(compressed("pack-quantized", int4(group, **changes), None), leaves)


def gpt_oss() -> Draft:
    """gpt-oss's own: experts in one tensor a layer, the rest plain."""
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    draft = Draft(
        {"quant_method": "mxfp4", "modules_to_not_convert": skipped}, lambda *shape: {"weight": dense(*shape)}
    )
    draft.config["model_type"] = "gpt_oss"
    draft.tensors = {name: one for name, one in draft.tensors.items() if ".experts." not in name}
    for layer in range(LAYERS):
        for leaf, rows, columns in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
            name = f"model.layers.{layer}.mlp.experts.{leaf}"
            draft.tensors[f"{name}_blocks"] = Stored("U8", (EXPERTS, rows, columns // 32, 16))
            draft.tensors[f"{name}_scales"] = Stored("U8", (EXPERTS, rows, columns // 32))
            draft.tensors[f"{name}_bias"] = Stored("BF16", (EXPERTS, rows))
    return draft


def awq() -> Draft:
    """AutoAWQ's."""

    def leaves(rows: int, columns: int) -> dict[str, Stored]:
        return {
            "qweight": Stored("I32", (columns, rows // 8)),
            "qzeros": Stored("I32", (columns // 128, rows // 8)),
            "scales": Stored("F16", (columns // 128, rows)),
        }

    section = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return Draft(section | {"modules_to_not_convert": routers()}, leaves)


def gptq() -> Draft:
    """AutoGPTQ's."""

    def leaves(rows: int, columns: int) -> dict[str, Stored]:
        return {
            "qweight": Stored("I32", (columns // 8, rows)),
            "qzeros": Stored("I32", (columns // 128, rows // 8)),
            "scales": Stored("F16", (columns // 128, rows)),
            "g_idx": Stored("I32", (columns,)),
        }

    section = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    draft = Draft(section | {"checkpoint_format": "gptq"}, leaves)
    draft.values = {f"{Q}.qzeros": torch.tensor([0x77777777], dtype=torch.int32)}
    return draft


def fp8() -> Draft:
    """Qwen's blocks."""

    def leaves(rows: int, columns: int) -> dict[str, Stored]:
        scales = Stored("F32", (-(-rows // 128), -(-columns // 128)))
        return {"weight": Stored("F8_E4M3", (rows, columns)), "weight_scale_inv": scales}

    section = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return Draft(section | {"modules_to_not_convert": routers()}, leaves)


def float8(weights: str, inputs: str, **changes: Any) -> Draft:
    """compressed-tensors' FP8."""
    said: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": weights, "dynamic": False}
    heard: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": inputs, "dynamic": inputs != "tensor"}
    if weights == "block":
        said["block_structure"], heard["group_size"] = [128, 128], 128

    def leaves(rows: int, columns: int) -> dict[str, Stored]:
        shape = {"channel": (rows, 1), "tensor": (1,), "block": (-(-rows // 128), -(-columns // 128))}[weights]
        held = {"weight": Stored("F8_E4M3", (rows, columns)), "weight_scale": Stored("BF16", shape)}
        return held | ({"input_scale": Stored("F32", (1,))} if inputs == "tensor" else {})

    return Draft(compressed("float-quantized", said, heard | changes), leaves)


def w8a8() -> Draft:
    """compressed-tensors' int8."""

    def leaves(rows: int, columns: int) -> dict[str, Stored]:
        return {"weight": Stored("I8", (rows, columns)), "weight_scale": Stored("BF16", (rows, 1))}

    said = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return Draft(compressed("int-quantized", said, said | {"strategy": "token", "dynamic": True}), leaves)


def nvfp4(inputs: bool = True, group: int = 16) -> Draft:
    """compressed-tensors' NVFP4."""

    def leaves(rows: int, columns: int) -> dict[str, Stored]:
        held = {
            "weight_packed": Stored("U8", (rows, columns // 2)),
            "weight_scale": Stored("F8_E4M3", (rows, columns // group)),
            "weight_global_scale": Stored("F32", (1,)),
        }
        return held | ({"input_global_scale": Stored("F32", (1,))} if inputs else {})

    said = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": group}
    return Draft(compressed("nvfp4-pack-quantized", said, said | {"dynamic": "local"} if inputs else None), leaves)


def modelopt() -> Draft:
    """ModelOpt's NVFP4."""

    def leaves(rows: int, columns: int) -> dict[str, Stored]:
        return {
            "weight": Stored("U8", (rows, columns // 2)),
            "weight_scale": Stored("F8_E4M3", (rows, columns // 16)),
            "weight_scale_2": Stored("F32", ()),
            "input_scale": Stored("F32", ()),
        }

    draft = Draft({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": routers()}, leaves)
    draft.quantization_file = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}}
    return draft


def w4afp8() -> Draft:
    """SGLang's int4 experts beside blocks of FP8."""

    def leaves(rows: int, columns: int) -> dict[str, Stored]:
        return {
            "weight": Stored("I8", (rows, columns // 2)),
            "weight_scale_inv": Stored("BF16", (rows, columns // 128)),
        }

    return Draft({"quant_method": "w4afp8", "group_size": 128, "modules_to_not_convert": routers()}, leaves)


def mlx() -> Draft:
    """MLX's affine words."""

    def leaves(rows: int, columns: int) -> dict[str, Stored]:
        held = {name: Stored("BF16", (rows, columns // 64)) for name in ("scales", "biases")}
        return {"weight": Stored("U32", (rows, columns // 8)), **held}

    return Draft({"quant_method": "mlx", "bits": 4, "group_size": 64, Q: {"bits": 4, "group_size": 64}}, leaves)


def mixture() -> Draft:
    """compressed-tensors with int4 experts and FP8 attention."""
    draft = w4a16()
    assert draft.section is not None
    fp8_words = float8("channel", "token").section
    assert fp8_words is not None
    attention = fp8_words["config_groups"]["group_0"] | {"targets": ["re:.*self_attn.*_proj$"]}
    experts = draft.section["config_groups"]["group_0"] | {"targets": [r"re:.*experts\.\d+\..*_proj$"]}
    draft.section |= {"format": "mixed-precision", "config_groups": {"group_0": experts, "group_1": attention}}
    packed = [name for name in draft.tensors if "self_attn" in name and name.endswith(".weight_packed")]
    for module in [name.rpartition(".")[0] for name in packed]:
        draft.drop(*(f"{module}.{leaf}" for leaf in ("weight_packed", "weight_scale", "weight_shape")))
        rows, columns = next(shape for key, shape in SIZES.items() if module.endswith(key))
        draft.tensors[f"{module}.weight"] = Stored("F8_E4M3", (rows, columns))
        draft.tensors[f"{module}.weight_scale"] = Stored("BF16", (rows, 1))
    return draft


def gguf(**changes: Any) -> Subject:
    """A file for llama.cpp; a key given as None is left out."""
    arch = "qwen3moe"
    keys: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.key_length": HEAD_DIM,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.freq_base": 1e6,
        f"{arch}.expert_count": EXPERTS,
        f"{arch}.expert_used_count": 2,
        f"{arch}.expert_feed_forward_length": WIDTH,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<end>"],
        "tokenizer.chat_template": "{{ messages }}",
    }
    for key, value in changes.items():
        name = {"arch": "general.architecture"}.get(key, key.replace("__", "."))
        name = f"{arch}.{name.removeprefix('own.')}" if name.startswith("own.") else name
        keys[name] = value
    keys = {key: value for key, value in keys.items() if value is not None}
    tensors = {
        "token_embd.weight": Stored("Q4_K", (4, HIDDEN)),
        "blk.0.attn_norm.weight": Stored("F32", (HIDDEN,)),
        "blk.0.attn_q.weight": Stored("Q4_K", (640 if "own__attention__key_length" in changes else 512, HIDDEN)),
        "blk.0.ffn_gate_exps.weight": Stored("Q4_K", (EXPERTS, WIDTH, HIDDEN)),
    }
    return Subject({}, None, tensors, frozenset({"model.gguf"}), keys, template=keys.get("tokenizer.chat_template"))
