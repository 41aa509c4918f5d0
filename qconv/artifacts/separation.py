"""A checkpoint whose experts lie in one tensor a layer, as transformers 5 holds them, read as one with a tensor each.

``save_pretrained(save_original_format=False)`` writes tensors under the names that transformers has for them,
``gate_up_proj`` as [experts, 2 width, hidden] with gate above up, ``down_proj`` as [experts, hidden, width]. The rows
of one expert lie together there, so that each weight is a view of the file: nothing is copied or read for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import Checkpoint
from qconv.core.architecture import Architecture, Linear, Moe
from qconv.errors import CheckpointError, UsageError
from qconv.models import architecture

_JOINED = re.compile(r"\.experts\.(?!\d)")


def separated(stored: Checkpoint) -> Checkpoint:
    """The checkpoint with tensors for each expert, under the names that the family's checkpoints have.

    Raises:
        CheckpointError: of an unknown architecture, or a tensor of all experts has another shape.
        UsageError: experts are joined in a way that is not read.
    """
    if not any(map(_JOINED.search, stored.entries)):
        return stored
    require_readable_experts(
        stored.path, {name: entry.file.name for name, entry in stored.entries.items()}, stored.config
    )
    model = architecture(stored.config)
    entries = _renamed(stored.entries, model)
    for layer in model.layers:
        if isinstance(layer.mlp, Moe):
            _separate(entries, layer.mlp, model)
    return replace(stored, entries=entries)


def require_readable_experts(path: Path, listed: Mapping[str, str], config: Mapping[str, object]) -> None:
    """Check that experts that are joined in one tensor are not quantized besides.

    Args:
        path: The checkpoint's folder.
        listed: The file of each tensor, by the tensor's name.
        config: config.json.

    Raises:
        UsageError: they are.
    """
    joined = sorted(name for name in listed if _JOINED.search(name))
    if joined and "quantization_config" in config:
        raise UsageError(
            f"{path / listed[joined[0]]}: tensor {joined[0]!r} holds all experts of a layer, and so do "
            f"{len(joined) - 1} others, and they are quantized: fused experts, which qconv reads unquantized alone.",
            hint="Give the unquantized checkpoint, or one with tensors for each expert.",
        )


def _renamed(entries: Mapping[str, TensorEntry], model: Architecture) -> dict[str, TensorEntry]:
    """With the family's names for what lies under transformers' own."""
    found = dict(entries)
    for stored, held in _names(model):
        if held in found and stored not in found:
            found[stored] = replace(found.pop(held), name=stored)
    return found


def _names(model: Architecture) -> Iterator[tuple[str, str]]:
    """Tensors that the checkpoint and transformers call differently."""
    for layer in model.layers:
        for module in layer.modules():
            for name, _ in module.tensors():
                held = model.held_tensor(name)
                if held != name:
                    yield name, held


def _separate(entries: dict[str, TensorEntry], moe: Moe, model: Architecture) -> None:
    name = model.held_name(moe.experts_name)
    gate, down = moe.experts[0].gate, moe.experts[0].down
    count = len(moe.experts)
    joined = _taken(entries, f"{name}.gate_up_proj", (count, 2 * gate.out_features, gate.in_features))
    downs = _taken(entries, f"{name}.down_proj", (count, down.out_features, down.in_features))
    for index, mlp in enumerate(moe.experts):
        if joined is not None:
            entries[mlp.gate.weight] = _rows(joined, mlp.gate, 2 * index)
            entries[mlp.up.weight] = _rows(joined, mlp.up, 2 * index + 1)
        if downs is not None:
            entries[mlp.down.weight] = _rows(downs, mlp.down, index)


def _taken(entries: dict[str, TensorEntry], name: str, shape: tuple[int, ...]) -> TensorEntry | None:
    entry = entries.pop(name, None)
    if entry is not None and entry.shape != shape:
        raise CheckpointError(
            f"{entry.file}: tensor {name!r} is {list(entry.shape)}, config.json implies {list(shape)}.",
            hint="config.json belongs to another model, or its experts are joined in another way.",
        )
    return entry


def _rows(joined: TensorEntry, linear: Linear, part: int) -> TensorEntry:
    """The view of one weight: the ``part``-th of its size."""
    size = linear.numel * joined.dtype.itemsize
    return replace(
        joined,
        name=linear.weight,
        shape=(linear.out_features, linear.in_features),
        offset=joined.offset + part * size,
        nbytes=size,
    )
