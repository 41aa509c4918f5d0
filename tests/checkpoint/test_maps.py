"""One mapping a file, whatever number of tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qconv.checkpoint.maps import SharedMaps
from qconv.checkpoint.reader import Checkpoint
from qconv.errors import CheckpointError


def mappings(folder: Path) -> int:
    """How many of this process's mappings are of files in a folder."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_tensors_are_equal_and_share_mappings(moe: Path) -> None:
    checkpoint, maps = Checkpoint.open(moe), SharedMaps()
    tensors = {name: maps(entry) for name, entry in checkpoint.entries.items()}
    assert all(torch.equal(tensor, checkpoint.read(name)) for name, tensor in tensors.items())
    # A range that was written to would be a mapping of its own; nothing was.
    assert mappings(moe) == len(checkpoint.files) < len(tensors)
    del maps, tensors
    assert mappings(moe) == 0


def test_writing_changes_no_file(moe_copy: Path) -> None:
    checkpoint = Checkpoint.open(moe_copy)
    entry = checkpoint.entry("model.norm.weight")
    SharedMaps()(entry).zero_()
    assert bool(checkpoint.read("model.norm.weight").any())


def test_a_file_that_became_shorter_is_an_error(moe_copy: Path) -> None:
    checkpoint = Checkpoint.open(moe_copy)
    entry = checkpoint.entry("model.norm.weight")
    entry.file.write_bytes(entry.file.read_bytes()[: entry.offset])
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        SharedMaps()(entry)
