"""Encode weights with ggml's own quantizers. Arguments: REQUEST ANSWER TYPE...

The request is an .npz of float32 weights [rows, columns] and, for some of them, ``NAME.importance`` [columns]. The
answer holds uint8 ``TYPE/NAME`` [rows, bytes] and, with importance, ``TYPE/NAME.importance``. Both packages must agree.
Types that ggml encodes only with importance get ones where none is given.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
from typing import Any

import libgguf  # type: ignore[import-not-found]  # only in the environment ggml
import numpy as np


def load_ggml() -> Any:
    """The shared library that libggml-python brings."""
    path = importlib.metadata.distribution("libggml-python").locate_file("libggml/lib64/libggml-base.so")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return library


def encode(library: Any, type: Any, weight: Any, importance: Any | None) -> Any:
    elements, size = libgguf.GGML_QUANT_SIZES[type]
    rows, columns = weight.shape
    encoded = np.empty((rows, columns // elements * size), dtype=np.uint8)
    imatrix = None if importance is None else importance.ctypes.data
    written = library.ggml_quantize_chunk(int(type), weight.ctypes.data, encoded.ctypes.data, 0, rows, columns, imatrix)
    assert written == encoded.nbytes
    return encoded


def main(request: str, answer: str, *types: str) -> None:
    library = load_ggml()
    given = np.load(request)
    encoded = {}
    for name in (name for name in given.files if not name.endswith(".importance")):
        weight = np.ascontiguousarray(given[name])
        for type_name in types:
            type = libgguf.GGMLQuantizationType[type_name]
            for suffix in ("", ".importance"):
                if suffix and name + suffix not in given.files:
                    continue
                importance = given[name + suffix] if suffix else None
                if importance is None and library.ggml_quantize_requires_imatrix(int(type)):
                    importance = np.ones(weight.shape[1], dtype=np.float32)
                ours = encode(library, type, weight, importance)
                if type_name not in ("F32", "F16", "BF16"):
                    second = libgguf.quantize_rows(weight, type, imatrix=importance)
                    assert np.array_equal(ours, second.reshape(ours.shape)), f"{type_name} {name + suffix}"
                encoded[f"{type_name}/{name}{suffix}"] = ours
    np.savez(answer, **encoded)


if __name__ == "__main__":
    main(*sys.argv[1:])
