"""Read an importance matrix with llama.cpp's own GGUF reader, as its quantization program does. Arguments: FILE ANSWER.

The answer is JSON: ``type``, ``datasets``, ``chunk_count``, ``chunk_size``, and ``entries`` of [sums, counts] by name,
each as ggml's shape and the values' total.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

STRING, UINT32 = 8, 4  # of gguf_type
F32 = 0  # of ggml_type


class Parameters(ctypes.Structure):
    """gguf_init_params: read no tensors into a context."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


def library() -> Any:
    """The C functions that xllamacpp exports."""
    package = importlib.metadata.distribution("xllamacpp")
    path = next(file for file in package.files or [] if file.name.startswith("xllamacpp.") and file.suffix == ".so")
    c = ctypes.CDLL(str(package.locate_file(path)))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    for name, result, *arguments in (
        ("gguf_init_from_file", pointer, text, Parameters),
        ("gguf_find_key", number, pointer, text),
        ("gguf_get_kv_type", ctypes.c_int, pointer, number),
        ("gguf_get_val_str", text, pointer, number),
        ("gguf_get_val_u32", ctypes.c_uint32, pointer, number),
        ("gguf_get_arr_type", ctypes.c_int, pointer, number),
        ("gguf_get_arr_n", ctypes.c_size_t, pointer, number),
        ("gguf_get_arr_str", text, pointer, number, ctypes.c_size_t),
        ("gguf_get_n_tensors", number, pointer),
        ("gguf_get_tensor_name", text, pointer, number),
        ("gguf_get_tensor_type", ctypes.c_int, pointer, number),
        ("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), pointer, number),
        ("gguf_get_tensor_size", ctypes.c_size_t, pointer, number),
        ("gguf_get_tensor_offset", ctypes.c_size_t, pointer, number),
        ("gguf_get_data_offset", ctypes.c_size_t, pointer),
    ):
        function = getattr(c, name)
        function.restype, function.argtypes = result, arguments
    return c


def main(path: str, answer: str) -> None:
    c = library()
    file = c.gguf_init_from_file(path.encode(), Parameters(True, None))
    assert file, "llama.cpp does not read the file"

    def key(name: str, kind: int) -> int:
        index = int(c.gguf_find_key(file, name.encode()))
        assert index >= 0, f"no key {name}"
        found = c.gguf_get_arr_type(file, index) if name == "imatrix.datasets" else c.gguf_get_kv_type(file, index)
        assert found == kind, f"{name} has type {found}"
        return index

    datasets = key("imatrix.datasets", STRING)
    data, start = Path(path).read_bytes(), int(c.gguf_get_data_offset(file))
    entries: dict[str, list[Any]] = {}
    for index in range(c.gguf_get_n_tensors(file)):
        name, _, leaf = c.gguf_get_tensor_name(file, index).decode().rpartition(".")
        assert c.gguf_get_tensor_type(file, index) == F32
        begin = start + c.gguf_get_tensor_offset(file, index)
        values = np.frombuffer(data[begin : begin + c.gguf_get_tensor_size(file, index)], dtype="<f4")
        part = [list(c.gguf_get_tensor_ne(file, index)[:2]), float(values.sum(dtype=np.float64))]
        entries.setdefault(name, [None, None])[("in_sum2", "counts").index(leaf)] = part
    found = {
        "type": c.gguf_get_val_str(file, key("general.type", STRING)).decode(),
        "datasets": [
            c.gguf_get_arr_str(file, datasets, number).decode() for number in range(c.gguf_get_arr_n(file, datasets))
        ],
        "chunk_count": c.gguf_get_val_u32(file, key("imatrix.chunk_count", UINT32)),
        "chunk_size": c.gguf_get_val_u32(file, key("imatrix.chunk_size", UINT32)),
        "entries": entries,
    }
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
