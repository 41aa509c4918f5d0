"""Which engines read a format that qconv writes, as the table of docs/concepts/formats.md says, and how that is known.

Every entry says in which version, and how it is known: ``run`` on a build, or ``read`` in the code. What an engine
refuses of such a build or computes otherwise is a rule of its own module.
"""

from __future__ import annotations

from qconv.engines import mlx, sglang, transformers, vllm
from qconv.engines.rule import Known

VLLM, SGLANG, TRANSFORMERS, MLX = vllm.VERSION, sglang.VERSION, transformers.VERSION, mlx.VERSION
AUTOAWQ, AUTOGPTQ, GPTQMODEL = "AutoAWQ 0.2.9", "AutoGPTQ 0.7.1", "GPTQModel 7.7.0"

READERS: dict[str, dict[str, Known]] = {
    "awq": {VLLM: "run", AUTOAWQ: "run", SGLANG: "read"},
    "w4a16": {VLLM: "run", TRANSFORMERS: "run", SGLANG: "read"},
    "gptq": {VLLM: "run", GPTQMODEL: "run", AUTOGPTQ: "run", SGLANG: "read"},
    "fp8": {VLLM: "run", TRANSFORMERS: "run", SGLANG: "read"},
    "fp8_dynamic": {VLLM: "run", TRANSFORMERS: "run", SGLANG: "read"},
    "fp8_static": {VLLM: "read", SGLANG: "read"},
    "w8a8": {VLLM: "run", SGLANG: "read"},
    "w4a8": {TRANSFORMERS: "run", VLLM: "read", SGLANG: "read"},
    "w4afp8": {SGLANG: "read"},
    "nvfp4": {VLLM: "read", SGLANG: "read"},
    "nvfp4_w4a4": {VLLM: "read", SGLANG: "read"},
    "nvfp4_modelopt": {VLLM: "read", SGLANG: "read"},
    "mxfp4": {TRANSFORMERS: "run", VLLM: "read", SGLANG: "read"},
    "mxfp8": {VLLM: "read"},
    "mlx": {MLX: "run"},
    "gpt_oss": {TRANSFORMERS: "run", VLLM: "read", SGLANG: "read"},
}
"""Who loads a format, by its name."""
