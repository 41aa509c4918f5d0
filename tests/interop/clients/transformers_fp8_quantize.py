"""Round a model to block FP8 with transformers' own quantizer. Arguments: MODEL OUT BLOCK.

OUT becomes the build, OUT.dense a safetensors file of every weight as transformers dequantizes the build, float32.
The quantizer asks for a GPU, which its arithmetic does not need: that one check is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer


def main(source: str, out: str, block: str) -> None:
    replaced: Any = FineGrainedFP8HfQuantizer
    checked, replaced.validate_environment = replaced.validate_environment, lambda *_, **__: None
    config = FineGrainedFP8Config(weight_block_size=(int(block), int(block)))
    loaded: Any = AutoModelForCausalLM
    loaded.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config).save_pretrained(out)
    replaced.validate_environment = checked
    config = FineGrainedFP8Config(dequantize=True)
    again = loaded.from_pretrained(out, dtype=torch.float32, quantization_config=config)
    weights = {name: tensor.clone() for name, tensor in again.state_dict().items() if name.endswith("_proj.weight")}
    save_file(weights, Path(f"{out}.dense"))


if __name__ == "__main__":
    main(*sys.argv[1:])
