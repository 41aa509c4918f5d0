"""MLX's own numbers of a build, and mlx-lm's logits; or a build of mlx-lm's own.

Arguments: BUILD REQUEST ANSWER, or make MODEL OUT MODE BITS GROUP. REQUEST holds token ids, int64 [tokens]; ANSWER gets
every module's weight in float32, experts stacked, and ``logits``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import convert
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file


def main(build: str, request: str, answer: str) -> None:
    model, _ = load_model(Path(build))  # strict: every tensor has a place, and every place its tensor
    model.set_dtype(mx.float32)
    section = json.loads((Path(build) / "config.json").read_text())["quantization"]
    stored: dict[str, Any] = {}
    for shard in sorted(Path(build).glob("model*.safetensors")):
        stored |= mx.load(str(shard))
    found = {}
    for name in [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]:
        mode = {"mode": "affine"} | section.get(name, {key: section[key] for key in ("group_size", "bits", "mode")})
        parts = [stored[f"{name}.weight"], stored[f"{name}.scales"]]
        if mode["mode"] == "affine":
            parts = [parts[0], *(stored[f"{name}.{leaf}"].astype(mx.float32) for leaf in ("scales", "biases"))]
        found[name] = np.array(mx.dequantize(*parts, **mode, dtype=mx.float32))
    ids = mx.array(load_file(request)["ids"])[None]
    found["logits"] = np.array(model(ids).astype(mx.float32))[0]
    save_file(found, answer)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        model_path, out, mode, bits, group = sys.argv[2:]
        convert(model_path, out, quantize=True, q_mode=mode, q_bits=int(bits), q_group_size=int(group))
    else:
        main(*sys.argv[1:])
