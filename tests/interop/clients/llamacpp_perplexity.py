"""Perplexity of a GGUF file by llama-perplexity's rule, from llama.cpp's own tokens and logits. MODEL TEXT ANSWER.

The text is tokenized as a whole and cut into chunks of 512 tokens; the first half of each is context, the logits of its
positions 256 to 510 predict 255 tokens; their mean negative log-likelihood, in float64, is exponentiated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from qconv.evaluation.engines.llamacpp_worker import LlamaCpp

CONTEXT = 512


def main(model: str, text: str, answer: str) -> None:
    llama = LlamaCpp(model, CONTEXT)
    tokens = llama.tokenize(Path(text).read_text(), parse_special=False)
    total, count = 0.0, 0
    for chunk in range(len(tokens) // CONTEXT):
        ids = tokens[CONTEXT * chunk : CONTEXT * (chunk + 1)]
        llama.forget()
        logits = llama.logits(ids.tolist()).astype(np.float64)
        for position in range(CONTEXT // 2, CONTEXT - 1):
            row = logits[position]
            largest = row.max()
            total += largest + np.log(np.exp(row - largest).sum()) - row[ids[position + 1]]
            count += 1
    Path(answer).write_text(json.dumps({"ppl": float(np.exp(total / count)), "count": count}))


if __name__ == "__main__":
    main(*sys.argv[1:])
