"""The bytes of a GGUF tensor from the checkpoint, block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qconv.artifacts.folded import Weights
from qconv.errors import UsageError
from qconv.formats.gguf.imatrix import Imatrix
from qconv.formats.gguf.names import GgufTensor, permute_heads
from qconv.grids.ggml import GgmlType, encode

Importance = Callable[[GgufTensor, int], Tensor | None]
"""Gives the importance of a tensor's columns, float [columns], for the expert (or other part) of that number."""


def uniform(tensor: GgufTensor, part: int) -> None:
    """Every column counts alike."""


def importance_of(matrix: Imatrix, shrinkage_tokens: float, exponent: float = 1.0) -> Importance:
    """Importance from a matrix: each input's mean square to the power ``exponent``.

    Experts are shrunk toward their layer first (:meth:`Entry.mean_squares`).

    Raises, when called:
        UsageError: the matrix is of another model.
    """

    @functools.lru_cache(maxsize=1)  # an expert comes after the one before it
    def rows(tensor: GgufTensor) -> Tensor | None:
        entry = matrix.entry(tensor.name, len(tensor.sources), tensor.columns)
        means = None if entry is None else entry.mean_squares(shrinkage_tokens)
        return None if means is None else means.pow(exponent)

    def of(tensor: GgufTensor, part: int) -> Tensor | None:
        means = rows(tensor)
        return None if means is None else means[part]

    return of


def encoder(type: GGMLQuantizationType) -> GgmlType:
    """The encoder of a type.

    Raises:
        UsageError: there is none.
    """
    try:
        return GgmlType(type)
    except ValueError:
        raise UsageError(
            f"{type.name} has no encoder in qconv.", hint="Choose another file type, or another type for these tensors."
        ) from None


def encoded(
    source: Weights, tensor: GgufTensor, type: GGMLQuantizationType, importance: Importance = uniform
) -> Iterator[Tensor]:
    """A tensor's bytes in file order, uint8, a block of rows at a time; of merged experts one after the other.

    Args:
        source: The checkpoint, or what folding makes of it.
        tensor: Which tensor.
        type: What it becomes.
        importance: The importance of its columns.

    Raises:
        CheckpointError: a weight cannot be read or is not finite.
        UsageError: there is no encoder of that type, or a weight is beyond its range.
    """
    target = encoder(type)
    for _, block, weights in weighted_blocks(source, tensor, importance):
        yield encode(block, target, weights)


def weighted_blocks(
    source: Weights, tensor: GgufTensor, importance: Importance
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """A tensor's rows in file order: the number of the part, [rows, columns], the importance of their columns.

    Raises:
        CheckpointError: a weight cannot be read or is not finite.
        UsageError: the importance is of another model.
    """
    for part, rows in enumerate(parts(source, tensor)):
        weights = importance(tensor, part)
        for block in rows:
            yield part, block.reshape(-1, tensor.columns), weights


def parts(source: Weights, tensor: GgufTensor) -> Iterator[Iterator[Tensor] | Sequence[Tensor]]:
    """Each source tensor as blocks of rows. One that is permuted or changed is read whole."""
    if tensor.constant:
        yield [torch.tensor(tensor.constant)]
    for name in tensor.sources:
        if tensor.change is not None:
            yield [tensor.made_of(source.read(name))]
        else:
            yield [permute_heads(source.read(name), tensor.heads)] if tensor.heads else source.blocks(name)
