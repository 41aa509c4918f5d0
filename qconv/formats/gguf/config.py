"""A config.json from a GGUF file: the inverse of :mod:`qconv.formats.gguf.metadata`, for files that anyone wrote.

What the file's keys leave open (widths, biases, a tied head) its tensors tell. Counts that the keys state are compared
with the tensors before anything is built of them.
"""

from __future__ import annotations

import re
from typing import Any

from gguf import Keys

from qconv.errors import CheckpointError
from qconv.formats.gguf.keys import SCALE_LINEAR, ModelKeys
from qconv.formats.gguf.names import ARCHITECTURES, architecture_name
from qconv.formats.gguf.reader import GgufModel
from qconv.formats.gguf.special import end_ids, token_id

_RENORMALIZES = {"qwen3_moe": True, "qwen2_moe": False}
"""Whether llama.cpp makes the weights of the chosen experts sum to one; in Mixtral they do by construction."""
_ARCHITECTURE_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,8})\.")
_ATTENTION_BIAS = re.compile(r"blk\.\d+\.attn_(q|k|v|output)\.bias")
_MLP_BIAS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.bias")


def config_of(model: GgufModel) -> dict[str, Any]:
    """The config.json of the model that a file holds, without the frequencies of ``rope_freqs.weight``.

    Raises:
        CheckpointError: an architecture that qconv does not know, a key or a tensor that is missing, malformed or
            contradicts another, or a key with which qconv does not compute.
    """
    return _Reader(model).config()


class _Reader:
    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self.keys = ModelKeys.of(model.files[0], model.metadata)
        self.family = self._family()

    def config(self) -> dict[str, Any]:
        keys, entries = self.keys, self.model.entries
        vocabulary = self.model.entry("token_embd.weight").shape[0]
        heads = keys.integer(Keys.Attention.HEAD_COUNT)
        hidden = keys.integer(Keys.LLM.EMBEDDING_LENGTH)
        head_dim = keys.integer(Keys.Attention.KEY_LENGTH, max(1, hidden // heads))
        self._require(Keys.Attention.VALUE_LENGTH, keys.integer(Keys.Attention.VALUE_LENGTH, head_dim), head_dim)
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURE_CLASSES[self.family]],
            "model_type": self.family,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": keys.integer(Keys.LLM.FEED_FORWARD_LENGTH, 1),
            "num_hidden_layers": self._layers(),
            "num_attention_heads": heads,
            "num_key_value_heads": keys.integer(Keys.Attention.HEAD_COUNT_KV, heads),
            "head_dim": head_dim,
            "max_position_embeddings": keys.integer(Keys.LLM.CONTEXT_LENGTH),
            "rms_norm_eps": keys.number(Keys.Attention.LAYERNORM_RMS_EPS),
            "rope_parameters": self._rope(head_dim),
            "sliding_window": None,
            "tie_word_embeddings": "output.weight" not in entries,
            "attention_bias": any(map(_ATTENTION_BIAS.fullmatch, entries)),
        }
        config |= self._experts()
        if self.family == "llama":
            config["mlp_bias"] = any(map(_MLP_BIAS.fullmatch, entries))
        for kind, key in (("bos", Keys.Tokenizer.BOS_ID), ("pad", Keys.Tokenizer.PAD_ID)):
            config[f"{kind}_token_id"] = token_id(self.model, key, vocabulary)
        config["eos_token_id"] = end_ids(self.model, vocabulary) or None
        keys.require_rest_to_say_nothing()
        return config

    def _family(self) -> str:
        by_name = {architecture_name(family): family for family in ARCHITECTURES if family != "mixtral"}
        if self.keys.architecture not in by_name:
            raise CheckpointError(
                f"{self.model.files[0]}: architecture {self.keys.architecture[:80]!r} is not known.",
                hint=f"qconv runs {', '.join(sorted(by_name))}.",
            )
        family = by_name[self.keys.architecture]
        return "mixtral" if family == "llama" and self.keys.integer(Keys.LLM.EXPERT_COUNT, 0) else family

    def _layers(self) -> int:
        """The number of layers, of which there are no more than the tensors name."""
        count = self.keys.integer(Keys.LLM.BLOCK_COUNT)
        found = {match[1] for match in map(_LAYER.match, self.model.entries) if match}
        if count > len(found):
            name = Keys.LLM.BLOCK_COUNT.format(arch=self.keys.architecture)
            raise self.keys.error(f"{name} is {count}, and the file holds tensors of {len(found)} layers")
        return count

    def _experts(self) -> dict[str, Any]:
        count = self.keys.integer(Keys.LLM.EXPERT_COUNT, 0)
        if not count:
            self.keys.integer(Keys.LLM.EXPERT_USED_COUNT, 0)
            return {}
        shape = self.model.entry("blk.0.ffn_gate_exps.weight").shape
        self._require(Keys.LLM.EXPERT_COUNT, count, shape[0])
        config: dict[str, Any] = {
            "num_local_experts": count,
            "num_experts": count,
            "num_experts_per_tok": self.keys.integer(Keys.LLM.EXPERT_USED_COUNT),
        }
        normalizes = _RENORMALIZES.get(self.family, True)
        if self.keys.has(Keys.LLM.EXPERT_WEIGHTS_NORM):
            said = self.keys.flag(Keys.LLM.EXPERT_WEIGHTS_NORM)
            self._require(Keys.LLM.EXPERT_WEIGHTS_NORM, said, normalizes)
        if self.family == "mixtral":
            return config
        config |= {
            "moe_intermediate_size": self._width("blk.0.ffn_gate_exps.weight"),
            "norm_topk_prob": normalizes,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        if self.family == "qwen2_moe":
            config["shared_expert_intermediate_size"] = self._width("blk.0.ffn_gate_shexp.weight")
            config["qkv_bias"] = any(map(_ATTENTION_BIAS.fullmatch, self.model.entries))
        return config

    def _width(self, name: str) -> int:
        """Rows of a gate: of one expert's, where a tensor holds them all."""
        shape = self.model.entry(name).shape
        if len(shape) < 2:
            raise self.keys.error(f"tensor {name!r} is {list(shape)}, no matrix")
        return shape[-2]

    def _rope(self, head_dim: int) -> dict[str, Any]:
        """As llama.cpp reads it: a factor without a type is linear, the newer key's goes first, 0 is none."""
        keys = self.keys
        rotated = keys.integer(Keys.Rope.DIMENSION_COUNT, head_dim)
        self._require(Keys.Rope.DIMENSION_COUNT, rotated, head_dim)
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number(Keys.Rope.FREQ_BASE, 10000.0)}
        kind = keys.text(Keys.Rope.SCALING_TYPE, "linear")
        factors = [keys.amount(key) for key in (Keys.Rope.SCALING_FACTOR, SCALE_LINEAR) if keys.has(key)]
        factor = (factors or [1.0])[0] or 1.0
        if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
            return parameters
        if kind not in ("linear", "yarn") or (kind == "yarn" and factor < 1.0):
            raise keys.error(f"rope scaling {kind[:80]!r} by {factor} is none that qconv computes")
        parameters |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            trained = keys.integer(Keys.LLM.CONTEXT_LENGTH)
            parameters["original_max_position_embeddings"] = keys.integer(Keys.Rope.SCALING_ORIG_CTX_LEN, trained)
        return parameters

    def _require(self, key: str, said: float, is_so: float) -> None:
        if said != is_so:
            name = key.format(arch=self.keys.architecture)
            raise self.keys.error(f"{name} is {said}, the file's tensors and other keys say {is_so}")
