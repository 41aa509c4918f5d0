"""Load an AWQ build with AutoAWQ, whole model, and decode greedily. Arguments: BUILD REQUEST ANSWER."""

from __future__ import annotations

import json
import sys
import tempfile
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
    with tempfile.TemporaryDirectory() as scratch:
        with_old_config(Path(build), Path(scratch))
        model: Any = AutoAWQForCausalLM.from_quantized(
            scratch, fuse_layers=False, device_map={"": "cpu"}, max_seq_len=256, torch_dtype=torch.float16
        ).model
        problems = compare_with_files(model, Path(scratch))
    # AutoAWQ's linears take and give float16 and hold buffers alone; all around them then runs in float32, so that the
    # only rounding left is theirs.
    decoding.compute_in_float32(model)
    decoding.answer(Path(request), Path(answer), model, problems)


def with_old_config(build: Path, scratch: Path) -> None:
    """Fill ``scratch`` with links to the build's files and a config.json that transformers 4 understands too."""
    for path in build.iterdir():
        if path.name != "config.json":
            (scratch / path.name).symlink_to(path.resolve())
    config = json.loads((build / "config.json").read_text())
    config.setdefault("num_experts", config["num_local_experts"])
    config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])
    (scratch / "config.json").write_text(json.dumps(config))


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
