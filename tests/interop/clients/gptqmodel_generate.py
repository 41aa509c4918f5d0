"""Load a GPTQ build with GPTQModel, whole model, and decode greedily. Arguments: BUILD REQUEST ANSWER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors import safe_open

from tests.interop.clients import decoding


def main(build: str, request: str, answer: str) -> None:
    model: Any = GPTQModel.load(build, device="cpu", backend=BACKEND("torch"), dtype=torch.float16).model
    problems = compare_with_files(model, Path(build))
    # Its linears take and give float16; all around them runs in float32, so that the only rounding left is theirs.
    decoding.compute_in_float32(model)
    decoding.answer(Path(request), Path(answer), model, problems)


def compare_with_files(model: torch.nn.Module, folder: Path) -> dict[str, list[str]]:
    """What GPTQModel does not report: tensors of the model and of the files that the other lacks, or that differ.

    Zero points are left out: it stores them its own way in memory.
    """
    loaded = model.state_dict()
    stored, differing = set(), []
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                stored.add(name)
                if name not in loaded or name.endswith(".qzeros"):
                    continue
                if not torch.equal(loaded[name], file.get_tensor(name).to(loaded[name].dtype)):
                    differing.append(name)
    return {
        "missing_keys": sorted(loaded.keys() - stored),
        "unexpected_keys": sorted(stored - loaded.keys()),
        "mismatched_keys": differing,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
