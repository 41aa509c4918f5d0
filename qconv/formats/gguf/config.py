"""A config.json from a GGUF file: the inverse of :mod:`qconv.formats.gguf.metadata`, for files that anyone wrote.

What the file's keys leave open (widths, biases, a tied head) its tensors tell. Counts that the keys state are compared
with the tensors before anything is built of them.
"""

from __future__ import annotations

import math
import re
from typing import Any

from gguf import ExpertGatingFuncType, Keys

from qconv.errors import CheckpointError
from qconv.formats.gguf.forms import Form, families, form
from qconv.formats.gguf.forms.base import Experts, Stated, Windows, by_period
from qconv.formats.gguf.keys import SCALE_LINEAR, ModelKeys
from qconv.formats.gguf.reader import GgufModel
from qconv.formats.gguf.special import end_ids, token_id

_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,8})\.")
_SPARSE = "ffn_gate_exps.weight"


def config_of(model: GgufModel) -> dict[str, Any]:
    """The config.json of the model that a file holds, without the frequencies of ``rope_freqs.weight``.

    Raises:
        CheckpointError: an architecture that qconv does not know, a key or a tensor that is missing, malformed or
            contradicts another, or a key with which qconv does not compute.
    """
    return _Reader(model).config()


def predicting_layers(keys: ModelKeys, of: Form) -> int:
    """How many layers behind the last predict further tokens; llama.cpp leaves them out of its graph, too.

    Raises:
        CheckpointError: the key is malformed.
    """
    return keys.integer(Keys.LLM.NEXTN_PREDICT_LAYERS, 0) if of.predicts else 0


class _Reader:
    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self.keys = ModelKeys.of(model.files[0], model.metadata)
        self.family, self.form = self._family()

    def config(self) -> dict[str, Any]:
        keys, entries = self.keys, self.model.entries
        vocabulary = self.model.entry("token_embd.weight").shape[0]
        layers, heads = self._layers(), keys.integer(Keys.Attention.HEAD_COUNT)
        hidden = keys.integer(Keys.LLM.EMBEDDING_LENGTH)
        if self.form.mixing.latent:
            head_dim = keys.integer(Keys.Rope.DIMENSION_COUNT)
        else:
            head_dim = keys.integer(Keys.Attention.KEY_LENGTH, max(1, hidden // heads))
            self._require(Keys.Attention.VALUE_LENGTH, keys.integer(Keys.Attention.VALUE_LENGTH, head_dim), head_dim)
        config: dict[str, Any] = {
            "architectures": [self.form.model_class],
            "model_type": self.family,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": keys.integer(Keys.LLM.FEED_FORWARD_LENGTH, 1),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys.integer(Keys.Attention.HEAD_COUNT_KV, heads),
            "head_dim": head_dim,
            "max_position_embeddings": keys.integer(Keys.LLM.CONTEXT_LENGTH),
            "rms_norm_eps": keys.number(Keys.Attention.LAYERNORM_RMS_EPS),
            "rope_parameters": self._rope(head_dim),
            "sliding_window": None,
            "tie_word_embeddings": "output.weight" not in entries,
        }
        config |= {key: self._is_present(names) for key, names in self.form.present.items()}
        config |= {one.config: one.value for one in self.form.fixed if one.config is not None}
        config |= {one.config: self._stated(one) for one in self.form.stated}
        if self.form.windows is not None:
            config |= self._windows(self.form.windows, layers)
        if self.form.experts is not None:
            config |= self._experts(self.form.experts, layers)
        config |= self.form.mixing.restores(keys)
        self._check_fixed()
        for kind, key in (("bos", Keys.Tokenizer.BOS_ID), ("pad", Keys.Tokenizer.PAD_ID)):
            config[f"{kind}_token_id"] = token_id(self.model, key, vocabulary)
        config["eos_token_id"] = end_ids(self.model, vocabulary) or None
        keys.require_rest_to_say_nothing()
        return config

    def _family(self) -> tuple[str, Form]:
        read = {family: form(family) for family in families() if form(family).read}
        sparse = bool(self.keys.integer(Keys.LLM.EXPERT_COUNT, 0))
        for family, one in read.items():
            if one.architecture == self.keys.architecture and (one.experts is not None) == sparse:
                return family, one
        known = ", ".join(sorted({one.architecture for one in read.values()}))
        raise CheckpointError(
            f"{self.model.files[0]}: architecture {self.keys.architecture[:80]!r} is not known"
            f"{' with experts' if sparse else ''}.",
            hint=f"qconv runs {known}.",
        )

    def _layers(self) -> int:
        """The number of layers, of which there are no more than the tensors name, without those that only predict."""
        count = self.keys.integer(Keys.LLM.BLOCK_COUNT)
        found = {match[1] for match in map(_LAYER.match, self.model.entries) if match}
        if count > len(found):
            name = Keys.LLM.BLOCK_COUNT.format(arch=self.keys.architecture)
            raise self.keys.error(f"{name} is {count}, and the file holds tensors of {len(found)} layers")
        layers = count - predicting_layers(self.keys, self.form)
        if layers < 1:
            raise self.keys.error(f"all {count} layers only predict further tokens")
        return layers

    def _windows(self, windows: Windows, layers: int) -> dict[str, Any]:
        """Which layers attend to a window, and how large it is."""
        keys, key, period = self.keys, Keys.Attention.SLIDING_WINDOW_PATTERN, windows.period
        if period is None:
            which = keys.flags(key, layers)
        else:
            self._require(key, keys.integer(key, period), period)
            which = by_period(layers, period)
        size = keys.integer(Keys.Attention.SLIDING_WINDOW, windows.only)
        self._require(Keys.Attention.SLIDING_WINDOW, size, windows.only or size)
        return {"layer_types": [windows.kind if one else "full_attention" for one in which], windows.size: size}

    def _is_present(self, names: str) -> bool:
        """Whether a tensor of a layer has such a name."""
        pattern = re.compile(rf"blk\.\d+\.{names}")
        return any(map(pattern.fullmatch, self.model.entries))

    def _stated(self, one: Stated) -> bool | int | float:
        if isinstance(one.default, bool):
            return self.keys.flag(one.key) if self.keys.has(one.key) else one.absent
        if isinstance(one.default, int):
            return self.keys.integer(one.key, int(one.absent))
        return self.keys.number(one.key, float(one.absent))

    def _check_fixed(self) -> None:
        for one in self.form.fixed:
            if one.key is not None and (one.stated or self.keys.has(one.key)):
                self._require(one.key, self.keys.flag(one.key), one.value)

    def _experts(self, experts: Experts, layers: int) -> dict[str, Any]:
        keys, count = self.keys, self.keys.integer(Keys.LLM.EXPERT_COUNT)
        dense = 0 if experts.dense_first is None else self._dense(layers)
        if experts.every is not None:
            dense = keys.integer(Keys.LLM.INTERLEAVE_MOE_LAYER_STEP, 1) - 1
        first = f"blk.{dense}.{_SPARSE}"
        self._require(Keys.LLM.EXPERT_COUNT, count, self.model.entry(first).shape[0])
        config: dict[str, Any] = dict.fromkeys(experts.count, count)
        config[experts.used] = keys.integer(Keys.LLM.EXPERT_USED_COUNT)
        if experts.gating is not ExpertGatingFuncType.SOFTMAX:
            said = keys.integer(Keys.LLM.EXPERT_GATING_FUNC, 0)
            self._require(Keys.LLM.EXPERT_GATING_FUNC, said or experts.gating, experts.gating)
        if experts.dense_first is not None:
            said = keys.integer(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, 0)
            self._require(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, said, dense)
            config |= experts.dense_first(dense, layers)
        if experts.width is not None:
            config[experts.width] = self._width(first)
        if experts.shared_width is not None:
            config[experts.shared_width] = self._width(f"blk.{dense}.ffn_gate_shexp.weight")
        return config

    def _dense(self, layers: int) -> int:
        """How many layers have no experts before the first that has."""
        return next((layer for layer in range(layers) if f"blk.{layer}.{_SPARSE}" in self.model.entries), 0)

    def _width(self, name: str) -> int:
        """Rows of a gate: of one expert's, where a tensor holds them all."""
        shape = self.model.entry(name).shape
        if len(shape) < 2:
            raise self.keys.error(f"tensor {name!r} is {list(shape)}, no matrix")
        return shape[-2]

    def _rope(self, head_dim: int) -> dict[str, Any]:
        """As llama.cpp reads it: a factor without a type is linear, the newer key's goes first, 0 is none."""
        keys = self.keys
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number(Keys.Rope.FREQ_BASE, 10000.0)}
        rotated = keys.integer(Keys.Rope.DIMENSION_COUNT, head_dim)
        if self.form.rotated is not None and rotated <= head_dim:
            share = rotated / head_dim
            # transformers cuts the product off, which may lie a little below the whole number.
            whole = int(head_dim * share) == rotated
            parameters["partial_rotary_factor"] = share if whole else math.nextafter(share, math.inf)
        else:
            self._require(Keys.Rope.DIMENSION_COUNT, rotated, head_dim)
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
            if self.form.mixing.mscale:
                mscale = 10.0 * keys.number(Keys.Rope.SCALING_YARN_LOG_MUL)
                parameters |= {"mscale": mscale, "mscale_all_dim": mscale}
        return parameters

    def _require(self, key: str, said: float, is_so: float) -> None:
        if said != is_so:
            name = key.format(arch=self.keys.architecture)
            raise self.keys.error(f"{name} is {said}, the file's tensors and other keys say {is_so}")
