"""A config.json from a GGUF file: the inverse of :mod:`qconv.gguf.metadata`, for files that anyone wrote.

What the file's keys leave open (widths, biases, a tied head) its tensors tell.
"""

from __future__ import annotations

import math
from typing import Any

from gguf import Keys
from numpy import ndarray

from qconv.errors import CheckpointError
from qconv.gguf.names import ARCHITECTURES, architecture_name
from qconv.gguf.reader import GgufModel

_RENORMALIZES = {"qwen3_moe": True, "qwen2_moe": False}
"""Whether llama.cpp makes the weights of the chosen experts sum to one; in Mixtral they do by construction."""
_ARCHITECTURE_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def config_of(model: GgufModel) -> dict[str, Any]:
    """The config.json of the model that a file holds, without the frequencies of ``rope_freqs.weight``.

    Raises:
        CheckpointError: an architecture that qconv does not know, a key or a tensor that is missing or malformed, or
            a rope scaling that transformers has no name for.
    """
    return _Reader(model).config()


class _Reader:
    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self.name = model.metadata.get(Keys.General.ARCHITECTURE)
        self.family = self._family()

    def config(self) -> dict[str, Any]:
        entries = self.model.entries
        embedding = self.model.entry("token_embd.weight")
        heads = self._integer(Keys.Attention.HEAD_COUNT)
        hidden = self._integer(Keys.LLM.EMBEDDING_LENGTH)
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURE_CLASSES[self.family]],
            "model_type": self.family,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._integer(Keys.LLM.FEED_FORWARD_LENGTH, 1),
            "num_hidden_layers": self._integer(Keys.LLM.BLOCK_COUNT),
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer(Keys.Attention.HEAD_COUNT_KV, heads),
            "head_dim": self._integer(Keys.Attention.KEY_LENGTH, hidden // heads),
            "max_position_embeddings": self._integer(Keys.LLM.CONTEXT_LENGTH),
            "rms_norm_eps": self._number(Keys.Attention.LAYERNORM_RMS_EPS),
            "rope_parameters": self._rope(),
            "sliding_window": None,
            "tie_word_embeddings": "output.weight" not in entries,
            "attention_bias": "blk.0.attn_q.bias" in entries,
        }
        config |= self._experts()
        if self.family == "llama":
            config["mlp_bias"] = "blk.0.ffn_gate.bias" in entries
        for kind, key in (
            ("bos", Keys.Tokenizer.BOS_ID),
            ("eos", Keys.Tokenizer.EOS_ID),
            ("pad", Keys.Tokenizer.PAD_ID),
        ):
            config[f"{kind}_token_id"] = self.model.metadata.get(key)
        return config

    def _family(self) -> str:
        by_name = {architecture_name(family): family for family in ARCHITECTURES if family != "mixtral"}
        if self.name not in by_name:
            raise CheckpointError(
                f"{self.model.files[0]}: architecture {self.name!r} is not known.",
                hint=f"qconv runs {', '.join(sorted(by_name))}.",
            )
        family = by_name[str(self.name)]
        return "mixtral" if family == "llama" and self._integer(Keys.LLM.EXPERT_COUNT, 0) else family

    def _experts(self) -> dict[str, Any]:
        count = self._integer(Keys.LLM.EXPERT_COUNT, 0)
        if not count:
            return {}
        config: dict[str, Any] = {
            "num_local_experts": count,
            "num_experts": count,
            "num_experts_per_tok": self._integer(Keys.LLM.EXPERT_USED_COUNT),
        }
        if self.family == "mixtral":
            return config
        config |= {
            "moe_intermediate_size": self._width("blk.0.ffn_gate_exps.weight"),
            "norm_topk_prob": _RENORMALIZES[self.family],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        if self.family == "qwen2_moe":
            config["shared_expert_intermediate_size"] = self._width("blk.0.ffn_gate_shexp.weight")
            config["qkv_bias"] = config.pop("attention_bias", "blk.0.attn_q.bias" in self.model.entries)
        return config

    def _width(self, name: str) -> int:
        """Rows of a gate: of one expert's, where a tensor holds them all."""
        return self.model.entry(name).shape[-2]

    def _rope(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": self._number(Keys.Rope.FREQ_BASE, 10000.0)}
        kind = self.model.metadata.get(self._key(Keys.Rope.SCALING_TYPE), "none")
        if kind == "none":
            return parameters
        if kind not in ("linear", "yarn"):
            raise self._error(f"rope scaling {kind!r} is not known")
        parameters |= {"rope_type": kind, "factor": self._number(Keys.Rope.SCALING_FACTOR)}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = self._integer(Keys.Rope.SCALING_ORIG_CTX_LEN)
        return parameters

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self.model.metadata.get(self._key(key), default)
        if isinstance(value, ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # one number a layer, all the same
        if isinstance(value, bool) or not isinstance(value, int) or value < (0 if default == 0 else 1):
            raise self._error(f"{self._key(key)} is {value!r}, not a positive whole number")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self.model.metadata.get(self._key(key), default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
            raise self._error(f"{self._key(key)} is {value!r}, not a positive number")
        return float(value)

    def _key(self, key: str) -> str:
        return key.format(arch=self.name)

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.model.files[0]}: {what}.", hint="The file is damaged, or of another kind.")
