"""C++ beside torch: the same call without it, and with it compiled for another processor."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest import mock

import pytest

from qconv import native

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_NEEDED = {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}
"""The last of a level's instructions, as Linux names them."""


def by_torch(function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
    """What a function gives where nothing is compiled."""
    with mock.patch.dict(os.environ, {native.SWITCH: "0"}):
        return function(*arguments, **named)


def require(library: str) -> None:
    """Skip where it cannot be compiled: then torch would be compared with torch."""
    if native.load(library) is None:
        pytest.skip("needs a C++ compiler")


def compile_for(processor: str, library: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every call use a library made for a processor that is named as compilers do; skip where this is none."""
    needed = _NEEDED.get(processor, "")
    if needed not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"needs a processor with {needed}")
    monkeypatch.setattr(native, "FLAGS", [flag.replace("native", processor) for flag in native.FLAGS])
    built = native.build(native.kernels_folder() / "cpu", library, cache, native.compiler())
    monkeypatch.setattr(native, "load", lambda name: built)
