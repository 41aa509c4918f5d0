"""The kernels' translation units, from the package's data."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import qconv
from qconv.runtime.backends.cuda.compiler import Source


def kernels_folder() -> Path:
    """The folder of the CUDA sources: inside the wheel, or the checkout's top level in an editable install."""
    package = Path(qconv.__file__).parent
    packaged = package / "kernels" / "cuda"
    return packaged if packaged.is_dir() else package.parent / "kernels" / "cuda"


@cache
def source_of(format: str) -> Source:
    """The translation unit with the kernels of a weight format: ``awq``, ``int4`` ..."""
    folder = kernels_folder()
    headers = {path.name: path.read_text() for path in sorted(folder.glob("*.cuh"))}
    return Source(f"{format}.cu", (folder / f"{format}.cu").read_text(), headers)


def formats() -> tuple[str, ...]:
    """The weight formats that have kernels."""
    return tuple(sorted(path.stem for path in kernels_folder().glob("*.cu")))
