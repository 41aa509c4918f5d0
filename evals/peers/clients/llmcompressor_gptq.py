"""Quantize a model with llm-compressor's GPTQ. Arguments: MODEL TOKENS OUT OPTIONS.

TOKENS is a safetensors file with ``ids`` [sequences, length], OPTIONS a JSON object: ``moe_calibrate_all_experts``, the
``observer`` that chooses scales; all else are arguments of llm-compressor's ``GPTQModifier``. Attention and every
expert are quantized to 4 bits by groups of 128, symmetric; routers and the head are not.
"""

from __future__ import annotations

import json
import sys

from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source: str, tokens: str, out: str, options: str) -> None:
    settings = json.loads(options)
    all_experts = settings.pop("moe_calibrate_all_experts", True)
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.observer = settings.pop("observer", scheme.weights.observer)
    ids = load_file(tokens)["ids"].long()
    rows = {"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)}
    # Transformers fuses a layer's experts into one tensor; this makes one Linear of each expert's projection.
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True))
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head", r"re:.*mlp\.gate$"], **settings)
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(source, local_files_only=True),
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        moe_calibrate_all_experts=all_experts,
        pipeline="sequential",
    )
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
