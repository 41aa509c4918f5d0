"""Tensors of many shards mapped file by file.

A process may hold some 65,000 mappings (``vm.max_map_count``), fewer than a large sparse model has tensors. So what is
kept as a whole shares one mapping a file; what is used and dropped maps tensor by tensor (:func:`map_tensor`).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import populate, require_whole_bytes
from qconv.errors import CheckpointError

MapTensor = Callable[[TensorEntry], Tensor]
"""Gives the tensor that lies at an entry; writing to it changes no file."""


class SharedMaps:
    """Maps each file once, copy-on-write, for as long as one of its tensors is referred to."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def __call__(self, entry: TensorEntry) -> Tensor:
        """The tensor of an entry, read in.

        Raises:
            CheckpointError: the file cannot be mapped, or became shorter.
        """
        require_whole_bytes(entry)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        try:
            view = self._maps.get(entry.file)
            if view is None:
                with entry.file.open("rb") as file:
                    view = self._maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if entry.offset + entry.span > len(view):
                raise ValueError("the file became shorter")
            populate(view, entry.offset, entry.span)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{entry.file}: cannot read tensor {entry.name!r}: {error}.",
                hint="Check the disk, and that the file did not change.",
            ) from error
        return entry.tensor(torch.frombuffer(view, dtype=torch.uint8, count=entry.span, offset=entry.offset))
