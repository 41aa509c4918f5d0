"""Copies of GGUF files with other keys and tensors, written by the ``gguf`` package."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

Key = tuple[Any, GGUFValueType]


def copied(
    source: Path,
    target: Path,
    keys: Mapping[str, Key] | None = None,
    drop: Collection[str] = (),
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """A copy with ``keys`` set, keys and tensors of ``drop`` left out and float32 ``tensors`` added."""
    read = gguf.GGUFReader(str(source))
    changed = dict(keys or {})
    architecture = read.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(target), architecture)
    for name, field in read.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changed or name in drop:
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type)
    for name, (value, kind) in changed.items():
        writer.add_key_value(name, value, kind)
    for tensor in read.tensors:
        if tensor.name not in drop:
            data = np.array(tensor.data)
            raw_shape = data.shape if data.dtype == np.uint8 else None
            writer.add_tensor(tensor.name, data, raw_shape=raw_shape, raw_dtype=tensor.tensor_type)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
