"""A checkpoint or build opened, with the tensors that its model has: of each expert, and the head that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qconv.artifacts.mlx_view import is_mlx, mlx_names, mlx_view
from qconv.artifacts.separation import separated, separated_names
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import Checkpoint, in_config
from qconv.core.architecture import EMBEDDING, HEAD, TIED, Architecture


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint or build as one with tensors for each expert, with the head that its files hold.

    Raises:
        CheckpointError: as :meth:`Checkpoint.open` and :func:`separated`.
        UsageError: as :func:`separated`.
    """
    with in_config(path):
        return untied(viewed(Checkpoint.open(path)))


def viewed(stored: Checkpoint) -> Checkpoint:
    """A checkpoint with tensors for each expert.

    Raises:
        CheckpointError, UsageError: as :func:`separated` and :func:`mlx_view`.
    """
    return mlx_view(stored) if is_mlx(stored.config) else separated(stored)


def viewed_names(config: Mapping[str, Any], model: Architecture, listed: Iterable[str]) -> set[str]:
    """The tensors that :func:`viewed` makes of those that an index lists."""
    names = {*listed}
    return mlx_names(model, names) if is_mlx(config) else separated_names(model, names)


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose config.json calls the head tied though the files hold another matrix: with that head.

    transformers keeps such a head apart; vLLM and SGLang leave it out, as config.json says. So the config that comes
    with the result says that it is not tied. A copy of the embedding, which many checkpoints carry, changes nothing.

    Raises:
        CheckpointError: the two cannot be read.
    """
    config = checkpoint.config
    text = config.get("text_config")
    says = config.get(TIED, text.get(TIED) if isinstance(text, dict) else None)
    head, embedding = (_ending(checkpoint, f"{name}.weight") for name in (HEAD, EMBEDDING.removeprefix("model.")))
    if says is not True or head is None or embedding is None:
        return checkpoint
    if (head.shape, head.dtype) == (embedding.shape, embedding.dtype):
        pairs = zip(checkpoint.blocks(head.name), checkpoint.blocks(embedding.name), strict=True)
        if all(torch.equal(ours, theirs) for ours, theirs in pairs):
            return checkpoint
    nested = {"text_config": text | {TIED: False}} if isinstance(text, dict) and TIED in text else {}
    return replace(checkpoint, config=config | {TIED: False} | nested)


def _ending(checkpoint: Checkpoint, name: str) -> TensorEntry | None:
    """The tensor of that name in the language model, which may be a part of a larger one."""
    prefixes = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
    return next((checkpoint.entries[one + name] for one in prefixes if one + name in checkpoint.entries), None)
