"""Tensors that a GGUF file holds otherwise than the checkpoint does, beyond the order of rows: there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the file that one of the checkpoint is made to.

    Attributes:
        name: What the ``gguf`` package's tables call it.
        shape: Its shape, outermost dimension first.
        make: Makes it of the checkpoint's tensor.
        rows: Where it is the checkpoint's rows in another order and nothing else, their numbers; else None.
        columns: Where its columns are the checkpoint's in another order, their numbers; else None.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor]
    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What one tensor of the checkpoint becomes in the file.

    Attributes:
        pieces: The file's tensors.
        join: Makes the checkpoint's of them, but for its shape.
    """

    pieces: tuple[Piece, ...]
    join: Callable[..., Tensor]


def added(name: str, shape: tuple[int, ...], offset: float) -> Change:
    """A norm's weight without what transformers adds to it; computed in float32."""
    return Change((Piece(name, shape, partial(_plus, offset)),), partial(_plus, -offset))


def renamed(name: str, shape: tuple[int, ...]) -> Change:
    """The same numbers under another name, or in another shape."""
    return Change((Piece(name, shape, partial(torch.reshape, shape=shape)),), _same)


def decay(name: str, shape: tuple[int, ...]) -> Change:
    """A state's decay, of which the checkpoint has the logarithm of the negative."""
    return Change((Piece(name, shape, _decay),), _log_of_decay)


def moved_rows(name: str, shape: tuple[int, ...], rows: Tensor) -> Change:
    """The same rows in another order."""
    return Change((Piece(name, shape, partial(_taken, rows), rows=rows),), partial(_taken, rows.argsort()))


def moved_columns(name: str, shape: tuple[int, ...], columns: Tensor) -> Change:
    """The same columns in another order."""
    make, back = partial(_taken_columns, columns), partial(_taken_columns, columns.argsort())
    return Change((Piece(name, shape, make, columns=columns),), back)


def split_rows(pieces: Mapping[str, Tensor], columns: int) -> Change:
    """Rows by their numbers, [rows, columns] of each name; together they are all."""
    rows = list(pieces.values())
    made = tuple(Piece(name, (len(one), columns), partial(_taken, one)) for name, one in pieces.items())
    return Change(made, partial(_merged, torch.cat(rows).argsort()))


def with_rows_moved(change: Change, rows: Tensor) -> Change:
    """Another change of one piece, whose rows then move."""
    (piece,) = change.pieces
    make = partial(_after, partial(_taken, rows), piece.make)
    return Change((replace(piece, make=make),), partial(_after, change.join, partial(_taken, rows.argsort())))


def latent_keys_and_values(name: str, heads: int, keys: int, values: int, rank: int) -> Change:
    """DeepSeek's ``kv_b_proj``, [heads * (keys + values), rank], as llama.cpp multiplies with it.

    The part of the keys goes to the queries, so it is transposed head by head: [heads, rank, keys]. That of the values
    is [heads, values, rank].
    """
    stem = name.removesuffix("kv_b_proj.weight")
    pieces = (
        Piece(f"{stem}k_b_proj.weight", (heads, rank, keys), partial(_keys, heads, keys)),
        Piece(f"{stem}v_b_proj.weight", (heads, values, rank), partial(_values, heads, keys)),
    )
    return Change(pieces, _joined)


def _taken(rows: Tensor, tensor: Tensor) -> Tensor:
    return tensor[rows]


def _merged(order: Tensor, *pieces: Tensor) -> Tensor:
    return torch.cat(pieces)[order]


def _taken_columns(columns: Tensor, tensor: Tensor) -> Tensor:
    return tensor[:, columns]


def _after(second: Callable[[Tensor], Tensor], first: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    return second(first(tensor))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _plus(offset: float, tensor: Tensor) -> Tensor:
    return tensor.float() + offset


def _decay(logarithm: Tensor) -> Tensor:
    return -logarithm.float().exp()


def _log_of_decay(made: Tensor) -> Tensor:
    return (-made).log()


def _keys(heads: int, keys: int, weight: Tensor) -> Tensor:
    return weight.view(heads, -1, weight.shape[-1])[:, :keys].transpose(1, 2).contiguous()


def _values(heads: int, keys: int, weight: Tensor) -> Tensor:
    return weight.view(heads, -1, weight.shape[-1])[:, keys:].contiguous()


def _joined(keys: Tensor, values: Tensor) -> Tensor:
    return torch.cat([keys.transpose(1, 2), values], dim=1)
