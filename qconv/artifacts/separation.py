"""A checkpoint whose experts lie in one tensor a layer, read as one with a tensor each.

transformers 5 holds experts so, and some families publish them so: ``gate_up_proj`` as [experts, 2 width, hidden] with
gate above up, or as [experts, hidden, 2 width], or with their rows by turns; ``down_proj``; biases; gpt-oss's MXFP4
blocks and scales. :class:`~qconv.core.architecture.Joined` says how a model's are. Each weight is a view of the file:
nothing is copied or read for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qconv.checkpoint import mxfp4
from qconv.checkpoint.config import quantization_of
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import Checkpoint
from qconv.core.architecture import Architecture, Linear, Mlp, Module, Moe
from qconv.errors import CheckpointError, UsageError
from qconv.models import architecture

_JOINED = re.compile(r"\.experts\.(?!\d)|\.(input|output)_linear\.weight$")
_LEAVES = {"": "weight", "_bias": "bias", "_blocks": mxfp4.BLOCKS, "_scales": mxfp4.SCALES}
"""What follows the name of a matrix of all experts, and what that holds of each linear."""


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """One tensor of all experts of a layer.

    Attributes:
        name: What it is called.
        leaf: What it holds of each linear: its weight, its bias, or MXFP4's blocks or scales.
        moe: The sparse block.
        halves: 2 where it holds gate and up, 1 where it holds down.
        transposed: Whether its matrices are [in_features, out_features].
        interleaved: Whether the rows of gate and up come by turns.
    """

    name: str
    leaf: str
    moe: Moe
    halves: int
    transposed: bool
    interleaved: bool

    def linears(self, mlp: Mlp) -> tuple[Linear, ...]:
        """Those of an expert that it holds."""
        return (mlp.gate, mlp.up) if self.halves == 2 else (mlp.down,)

    @property
    def shape(self) -> tuple[int, ...]:
        """What it must have."""
        one, count = self.linears(self.moe.experts[0])[0], len(self.moe.experts)
        rows, groups = self.halves * one.out_features, one.in_features // mxfp4.BLOCK
        return {
            "weight": (count, one.in_features, rows) if self.transposed else (count, rows, one.in_features),
            "bias": (count, rows),
            mxfp4.BLOCKS: (count, rows, groups, mxfp4.BLOCK // 2),
            mxfp4.SCALES: (count, rows, groups),
        }[self.leaf]

    def names(self) -> Iterator[str]:
        """The tensors that it stands for, expert by expert."""
        for mlp in self.moe.experts:
            for linear in self.linears(mlp):
                yield f"{linear.name}.{self.leaf}"

    def blocks(self, read: Callable[[str], Tensor]) -> Iterator[Tensor]:
        """Weights or biases put together, expert by expert, each [1, ...].

        Args:
            read: Gives a tensor by its name.
        """
        for mlp in self.moe.experts:
            parts = [read(f"{linear.name}.{self.leaf}") for linear in self.linears(mlp)]
            block = torch.stack(parts, 1).flatten(0, 1) if self.interleaved else torch.cat(parts)
            transposed = self.transposed and self.leaf == "weight"
            yield (block.t() if transposed else block).contiguous().unsqueeze(0)

    def views(self, entry: TensorEntry) -> Iterator[TensorEntry]:
        """The same as views of the file.

        Args:
            entry: Where it lies.

        Raises:
            CheckpointError: it has another shape.
        """
        if entry.shape != self.shape:
            raise CheckpointError(
                f"{entry.file}: tensor {self.name!r} is {list(entry.shape)}, config.json implies {list(self.shape)}.",
                hint="config.json belongs to another model, or its experts are joined in another way.",
            )
        strides = entry.steps
        axis = 2 if self.transposed and self.leaf == "weight" else 1
        others = [one for one in range(1, len(entry.shape)) if one != axis]
        rows = entry.shape[axis] // self.halves
        step = self.halves if self.interleaved else 1
        for number, name in enumerate(self.names()):
            expert, half = divmod(number, self.halves)
            first = half if self.interleaved else half * rows
            yield entry.view(
                name,
                expert * strides[0] + first * strides[axis],
                (rows, *(entry.shape[one] for one in others)),
                (step * strides[axis], *(strides[one] for one in others)),
            )


def joined_tensors(model: Architecture) -> dict[str, JoinedTensor]:
    """Every tensor of all experts of a layer that a checkpoint of a model may hold, by name."""
    found: dict[str, JoinedTensor] = {}
    joined = model.joined
    for layer in model.layers:
        if not isinstance(layer.mlp, Moe):
            continue
        moe, first = layer.mlp, layer.mlp.experts[0]
        blocks = dict.fromkeys(
            name.removesuffix(".experts") for name in (moe.experts_name, model.held_name(moe.experts_name))
        )
        for stem, halves, one in ((joined.gate_up, 2, first.gate), (joined.down, 1, first.down)):
            for suffix, leaf in _LEAVES.items():
                if leaf == "bias" and not one.bias:
                    continue
                for block in blocks:
                    name, interleaved = f"{block}.{stem}{suffix}", joined.interleaved and halves == 2
                    found[name] = JoinedTensor(name, leaf, moe, halves, joined.transposed, interleaved)
    return found


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A tensor of a dense checkpoint; ``joined`` where it holds those of all experts."""

    name: str
    shape: tuple[int, ...]
    joined: JoinedTensor | None = None

    def blocks(self, read: Callable[[str], Tensor]) -> Iterator[Tensor]:
        """Its consecutive blocks of rows; ``read`` gives a tensor of the architecture by its name."""
        if self.joined is None:
            yield read(self.name)
        else:
            yield from self.joined.blocks(read)


def dense_tensors(model: Architecture) -> Iterator[list[DenseTensor]]:
    """What a dense checkpoint of a model holds, as its readers know it: the embedding, each layer, norm and head."""
    joined = [one for one in joined_tensors(model).values() if one.leaf in ("weight", "bias") and model.joined.always]
    joined = [one for one in joined if one.name.startswith(one.moe.experts_name)]
    taken = {name for one in joined for name in one.names()}

    def of(modules: Iterable[Module]) -> list[DenseTensor]:
        tensors = (tensor for module in modules for tensor in module.tensors())
        return [DenseTensor(name, shape) for name, shape in tensors if name not in taken]

    yield of([model.embedding])
    for layer in model.layers:
        here = [DenseTensor(one.name, one.shape, one) for one in joined if one.moe is layer.mlp]
        yield [*of(layer.modules()), *here]
    yield of([model.final_norm, *([model.lm_head] if model.lm_head is not None else [])])


def separated(stored: Checkpoint) -> Checkpoint:
    """The checkpoint with tensors for each expert, under the names that the family's checkpoints have.

    Raises:
        CheckpointError: of an unknown architecture, or a tensor of all experts has another shape, or blocks no scales.
        UsageError: experts are joined in a way that is not read.
    """
    if not any(map(_JOINED.search, stored.entries)):
        return stored
    model = architecture(stored.config)
    require_readable_experts(
        stored.path, {name: entry.file.name for name, entry in stored.entries.items()}, stored.config, model
    )
    entries = _renamed(stored.entries, model)
    for name, tensor in joined_tensors(model).items():
        entry = entries.pop(name, None)
        if entry is not None:
            _require_pair(entry, stored.entries)
            entries.update((one.name, one) for one in tensor.views(entry))
    return replace(stored, entries=entries)


def separated_names(model: Architecture, listed: Iterable[str]) -> set[str]:
    """The tensors that :func:`separated` makes of those that an index lists."""
    joined, names = joined_tensors(model), {*listed}
    renamed = {held: stored for stored, held in _names(model) if held in names and stored not in names}
    found = {renamed.get(name, name) for name in names if name not in joined}
    return found | {one for name in names & joined.keys() for one in joined[name].names()}


def require_readable_experts(
    path: Path, listed: Mapping[str, str], config: Mapping[str, object], model: Architecture
) -> None:
    """Check that experts that are joined in one tensor are not quantized besides, unless to MXFP4.

    Args:
        path: The checkpoint's folder.
        listed: The file of each tensor, by the tensor's name.
        config: config.json.
        model: The model that it describes.

    Raises:
        UsageError: they are.
    """
    section = quantization_of(config)
    if section is None or (isinstance(section, Mapping) and section.get("quant_method") == mxfp4.METHOD):
        return
    joined = sorted(listed.keys() & joined_tensors(model).keys())
    if joined:
        raise UsageError(
            f"{path / listed[joined[0]]}: tensor {joined[0]!r} holds all experts of a layer, and so do "
            f"{len(joined) - 1} others, and they are quantized: fused experts, which qconv reads unquantized or in "
            "MXFP4 alone.",
            hint="Give the unquantized checkpoint, or one with tensors for each expert.",
        )


def _require_pair(entry: TensorEntry, entries: Mapping[str, TensorEntry]) -> None:
    """Check that MXFP4 blocks of all experts have scales, and scales blocks."""
    for one, other in (("_blocks", "_scales"), ("_scales", "_blocks")):
        beside = f"{entry.name.removesuffix(one)}{other}"
        if entry.name.endswith(one) and beside not in entries:
            raise CheckpointError(
                f"{entry.file}: {entry.name!r} has no {beside!r} beside it.",
                hint="Only together they are weights: download the checkpoint again.",
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
