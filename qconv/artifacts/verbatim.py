"""What a build holds just as its source does: tensors that transformers' model of the type leaves out.

Layers that predict further tokens, towers for images and sound: engines load them beside the language model, which
alone is quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qconv.artifacts.inspection import natural_order
from qconv.boundary.printable import name_of
from qconv.checkpoint.header import TensorEntry, TensorSpec
from qconv.checkpoint.reader import Checkpoint, require_whole_bytes
from qconv.core.architecture import Architecture
from qconv.models.discovery import left_out

_JOINED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What lies in a tensor of all experts."""


@dataclass(frozen=True, slots=True)
class Verbatim:
    """A tensor that is copied.

    Attributes:
        name: What it is called.
        part: What it belongs to, such as ``MTP``.
        dtype: Its dtype; of one that is stored quantized that of the numbers that it stands for.
        shape: Its shape.
        dequantized: Whether it is stored quantized.
    """

    name: str
    part: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    dequantized: bool

    @classmethod
    def of(cls, entry: TensorEntry, part: str, dequantized: bool) -> Verbatim:
        """A tensor of a checkpoint.

        Raises:
            CheckpointError: its elements share bytes.
        """
        require_whole_bytes(entry)
        return cls(entry.name, part, entry.dtype, entry.shape, dequantized)

    @property
    def spec(self) -> TensorSpec:
        """What it is in the build."""
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def modules(self) -> tuple[str, ...]:
        """What engines may take for quantized: the module whose weight it is, or which holds joined matrices.

        Of joined experts also each one's linears: vLLM asks for those of the first (``get_moe_method`` of its
        compressed-tensors).
        """
        module, _, leaf = self.name.rpartition(".")
        if not module or len(self.shape) < 2 or (leaf != "weight" and len(self.shape) < 3):
            return ()
        linears = _JOINED.get(leaf, ()) if module.endswith(".experts") else ()
        return (module, *(f"{module}.{number}.{one}" for number in range(self.shape[0]) for one in linears))


@dataclass(frozen=True, slots=True)
class VerbatimPart:
    """A part of a model that is copied: its tensors, their bytes in the build, how many of them were dequantized."""

    part: str
    tensors: int
    nbytes: int
    dequantized: int

    def __str__(self) -> str:
        return f"{self.tensors:,} tensors of {_said(self.part)} ({self.nbytes:,} bytes)"


def verbatim_of(checkpoint: Checkpoint, model: Architecture, names: Iterable[str]) -> tuple[Verbatim, ...]:
    """Those of ``names``, tensors that are none of the model's, that a build copies, in the order of their names.

    Raises:
        CheckpointError: one of them cannot be copied.
    """
    found = left_out(checkpoint.config, model, names)
    return tuple(
        Verbatim.of(checkpoint.entry(name), found[name], checkpoint.is_dequantized(name))
        for name in sorted(found, key=natural_order)
    )


def parts_of(verbatim: Iterable[Verbatim]) -> list[VerbatimPart]:
    """The parts that tensors make up, in the order of the first of each."""
    found: dict[str, list[Verbatim]] = {}
    for one in verbatim:
        found.setdefault(one.part, []).append(one)
    return [
        VerbatimPart(part, len(of), sum(one.spec.nbytes for one in of), sum(one.dequantized for one in of))
        for part, of in found.items()
    ]


def part_values(verbatim: Iterable[Verbatim]) -> list[dict[str, Any]]:
    """The parts, ready for JSON."""
    return [asdict(part) for part in parts_of(verbatim)]


def copied(parts: Sequence[VerbatimPart]) -> str:
    """That parts are copied, as a sentence without its end."""
    said = f"{_listed(parts)} are copied from the source as they are, unquantized"
    dequantized = sum(part.dequantized for part in parts)
    return f"{said}; {dequantized:,} of them, stored quantized, are dequantized once" if dequantized else said


def not_taken(parts: Sequence[VerbatimPart]) -> str:
    """That a build has no place for parts, as a sentence without its end."""
    return f"{_listed(parts)} are left out: the file holds the language model alone"


def _listed(parts: Sequence[VerbatimPart]) -> str:
    return " and ".join(map(str, parts))


def _said(part: str) -> str:
    return name_of(part) if part.isupper() else {"other": "other parts"}.get(part, f"the {name_of(part)}")
