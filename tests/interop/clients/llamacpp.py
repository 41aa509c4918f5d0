"""Run a GGUF file in llama.cpp by its C functions. Arguments: MODEL REQUEST ANSWER.

The request is JSON: ``sequences`` of token ids, ``texts`` to tokenize, and how many tokens to ``generate`` greedily
after the first sequence. The answer is an .npz: float32 ``logits/I`` [tokens, vocabulary] of each sequence, int32
``tokens/I`` of each text, ``generated``, and ``special`` (bos, eos, pad, whether bos and eos are added). Loading fails
with what llama.cpp logged last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from qconv.evaluation.engines.llamacpp_worker import LlamaCpp


def main(model: str, request: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text())
    sequences = asked["sequences"]
    generated = asked.get("generate", 0)
    llama = LlamaCpp(model, max(64, *(len(sequence) + generated for sequence in sequences)))
    found = {"special": llama.special()}
    for index, sequence in enumerate(sequences):
        llama.forget()
        found[f"logits/{index}"] = llama.logits(sequence)
    for index, text in enumerate(asked.get("texts", [])):
        found[f"tokens/{index}"] = llama.tokenize(text)
    if generated:
        found["generated"] = llama.generate(sequences[0], generated)
    np.savez(answer, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
