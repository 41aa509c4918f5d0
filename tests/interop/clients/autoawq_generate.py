"""Load an AWQ build with AutoAWQ, whole model, and decode greedily. Arguments: BUILD REQUEST ANSWER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import awq.models.base
import awq.modules.linear.gemm
import torch
from awq import AutoAWQForCausalLM
from safetensors import safe_open

from tests.interop.clients import decoding

# AutoAWQ has no name for a plain CPU: "cpu" means Intel's extension to it, and Triton cannot run there. These two
# choose its PyTorch code, which is the definition of the format.
awq.models.base.get_best_device = lambda: "mps"
awq.modules.linear.gemm.TRITON_AVAILABLE = False


def main(build: str, request: str, answer: str) -> None:
    model: Any = AutoAWQForCausalLM.from_quantized(
        build, fuse_layers=False, device_map={"": "cpu"}, max_seq_len=256, torch_dtype=torch.float16
    ).model
    problems = compare_with_files(model, Path(build))
    # AutoAWQ's linears take and give float16 and hold buffers alone; all around them then runs in float32, so that the
    # only rounding left is theirs.
    decoding.compute_in_float32(model)
    decoding.answer(Path(request), Path(answer), model, problems)


def compare_with_files(model: torch.nn.Module, folder: Path) -> dict[str, list[str]]:
    """What AutoAWQ does not report: tensors of the model and of the files that the other lacks, or that differ."""
    loaded = model.state_dict()
    stored, differing = set(), []
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                stored.add(name)
                if name in loaded and not torch.equal(loaded[name], file.get_tensor(name).to(loaded[name].dtype)):
                    differing.append(name)
    return {
        "missing_keys": sorted(loaded.keys() - stored),
        "unexpected_keys": sorted(stored - loaded.keys()),
        "mismatched_keys": differing,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
