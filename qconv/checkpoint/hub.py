"""From what the user typed, a folder: a local one, or a Hub id downloaded by huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from qconv.errors import CheckpointError, UsageError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "merges.txt", "LICENSE*"]


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The folder of ``model``: itself if it is one, else the Hub snapshot of ``owner/name[@revision]``.

    Args:
        model: A folder or a Hub id.
        weights: Whether the shards are needed too; without, only config, index and tokenizer are downloaded.

    Raises:
        UsageError: neither a folder nor a Hub id.
        CheckpointError: the download failed.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{model} is a file.", hint="Give the folder that holds config.json.")
    if not _HUB_ID.fullmatch(model):
        raise UsageError(f"{model}: no such folder.", hint="Give a folder or a Hub id such as Qwen/Qwen3-Coder-480B.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    patterns = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model}: no such folder here, and the download from the Hub failed: {error}.",
            hint="Check the spelling, the network and HF_TOKEN; a partial download is continued.",
        ) from error
