"""A small model as GGUF, and bytes of hostile files."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qconv.artifacts.source import Source
from qconv.planning.gguf_plan import GgufPlan, plan_gguf, write_file
from tests.conftest import random_model, save_model


@pytest.fixture(scope="session")
def expressible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen3_moe checkpoint that llama.cpp can express; do not write to it."""
    return save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path_factory.mktemp("gguf") / "model")


Write = Callable[..., tuple[GgufPlan, list[Path]]]


@pytest.fixture
def write_gguf(expressible: Path, tmp_path: Path) -> Write:
    """Writes that checkpoint as GGUF: ``write_gguf("Q8_0", max_split_size=...)`` gives the plan and the files."""

    def write(file_type: str, out: str = "out", **options: Any) -> tuple[GgufPlan, list[Path]]:
        folder = tmp_path / out
        folder.mkdir()
        source = Source.open(expressible)
        plan = plan_gguf(source, file_type, "model", **options)
        for layout in plan.files:
            write_file(folder, plan, layout, source)
        return plan, [folder / layout.name for layout in plan.files]

    return write


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, type: int, value: bytes) -> bytes:
    """A key/value; 4 is uint32, 8 a string, 9 an array."""
    return text(name) + struct.pack("<I", type) + value


def tensor(name: str | bytes = "t", shape: Sequence[int] = (8,), type: int = 0, offset: int = 0) -> bytes:
    """A tensor's info; 0 is F32, 8 is Q8_0; ``shape`` in the file's order."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type, offset)


def gguf_bytes(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """A GGUF file, with counts that may lie."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data
