"""Greedy decoding and scoring, the same few lines for every loader: one batch, no padding, no sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def answer(request_file: Path, answer_file: Path, model: Any, loading: dict[str, list[str]]) -> None:
    """Decode and score what ``request_file`` asks for with a causal language model of any transformers version.

    The request is JSON: ``prompts`` (lists of token ids, all of one length), ``new_tokens``, and ``continuations``, the
    sequences to score (null: the ones decoded here). The answer is a safetensors file: ``tokens`` int64 [prompts,
    new_tokens], ``log_probs`` float32 [prompts, new_tokens, vocabulary] of the scored sequences, ``loading`` as JSON
    in its metadata.
    """
    request: dict[str, Any] = json.loads(request_file.read_text())
    prompts = torch.tensor(request["prompts"])
    with torch.inference_mode():
        tokens = _decode(model, prompts, request["new_tokens"])
        scored = tokens if request["continuations"] is None else torch.tensor(request["continuations"])
        log_probs = _score(model, prompts, scored)
    save_file({"tokens": tokens, "log_probs": log_probs}, answer_file, metadata={"loading": json.dumps(loading)})


def compute_in_float32(model: torch.nn.Module) -> None:
    """Make every parameter float32, values unchanged. (transformers forbids ``float()`` on a quantized model.)"""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def _decode(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    tokens, cache, step = [], None, prompts
    for _ in range(new_tokens):
        output = model(step, past_key_values=cache, use_cache=True)
        cache, step = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
        tokens.append(step)
    return torch.cat(tokens, dim=1)


def _score(model: Any, prompts: Tensor, continuations: Tensor) -> Tensor:
    logits: Tensor = model(torch.cat([prompts, continuations], dim=1), use_cache=False).logits
    return logits[:, prompts.shape[1] - 1 : -1].float().log_softmax(dim=-1).contiguous()
