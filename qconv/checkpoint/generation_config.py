"""generation_config.json: which tokens end a text, and how its authors recommend to sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qconv.boundary.reading import read_json
from qconv.errors import CheckpointError

GENERATION_CONFIG = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_HINT = "Take the original model's file, or leave it away."


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The file's values, known to be an object whose tokens are tokens; empty where there is no such file.

    Raises:
        CheckpointError: unreadable, no JSON object, or a special token that is neither an id nor a list of ids.
    """
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return {}
    values = read_json(path, CheckpointError, hint=_HINT)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object.", hint=_HINT)
    for key in _TOKENS:
        value = values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) or abs(one) >= 2**31 for one in ids):
            raise CheckpointError(f"{path}: {key} {value!r} is neither a token's id nor a list of ids.", hint=_HINT)
    return values
