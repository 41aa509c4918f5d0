"""The dtypes that weights may have, and the one that a config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qconv.errors import CheckpointError

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weight_dtype(path: Path, config: dict[str, Any]) -> torch.dtype:
    """The dtype of a model's weights by config.json; bf16 where it names none.

    Raises:
        CheckpointError: it names one that is no weight's.
    """
    names = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}
    text = config.get("text_config")
    said = {**(text if isinstance(text, dict) else {}), **config}
    name = said.get("dtype", said.get("torch_dtype", "bfloat16"))
    if not isinstance(name, str) or name not in names:
        raise CheckpointError(
            f"{path / 'config.json'}: dtype {name!r} is none of {', '.join(names)}.",
            hint="Give the original, unquantized checkpoint.",
        )
    return names[name]
