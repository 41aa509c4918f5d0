"""A client of vLLM on CPU: the log-probability of every token of some documents, after those before it.

Runs in the environment of vLLM: ``python -m evals.peers.clients.vllm_scores MODEL DOCUMENTS.json OUT.json``. DOCUMENTS
is a list of lists of token ids; OUT gets a list of lists of log-probabilities, one shorter each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_CONTEXT = 1024
_CACHE_BYTES = 2**30


def main() -> None:
    """Score, and write."""
    model, documents, out = map(Path, sys.argv[1:4])
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    engine = LLM(
        str(model),
        dtype="bfloat16",
        max_model_len=_CONTEXT,
        max_num_seqs=8,
        max_num_batched_tokens=2 * _CONTEXT,
        enforce_eager=True,
        kv_cache_memory_bytes=_CACHE_BYTES,
        seed=0,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(documents.read_text())]
    answers = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    scores = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = prompt["prompt_token_ids"]
        scores.append([float(answer.prompt_logprobs[place][ids[place]].logprob) for place in range(1, len(ids))])
    out.write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
