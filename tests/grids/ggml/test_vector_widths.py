"""The compiled encoders on processors with other vectors: the same bytes, whatever the compiler makes of the lanes."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from qconv.grids.ggml import GgmlType, compiled, encode
from tests.compiled import by_torch, compile_for
from tests.grids.ggml.conftest import bell_weights, column_importance

pytestmark = [
    pytest.mark.slow,  # each compiles the library anew
    pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors"),
]


@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])  # 4 lanes, 8 lanes; 16 with AVX-512
def test_the_bytes_do_not_depend_on_the_vectors(
    processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, importance = bell_weights(37, 768), column_importance(768)
    cases = [(type, given) for type in GgmlType for given in (None, importance)]
    expected = [by_torch(encode, weight, type, given) for type, given in cases]
    compile_for(processor, compiled.LIBRARY, tmp_path, monkeypatch)
    for (type, given), bytes_of_torch in zip(cases, expected, strict=True):
        assert torch.equal(encode(weight, type, given), bytes_of_torch), f"{type.name} {given is not None}"
