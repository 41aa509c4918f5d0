"""The encoders in C++: the bytes of the torch operations on whatever input, which every other test is about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconv import native
from qconv.grids.ggml import GgmlType, compiled, encode
from tests.compiled import by_torch, require
from tests.grids.ggml.conftest import NEARLY_EXACT, SPREAD, bell_weights, blocks_of_256, column_importance

every_type = pytest.mark.parametrize("type", list(GgmlType), ids=lambda type: type.name)


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    """Without it, everything here would compare torch with torch."""
    require(compiled.LIBRARY)


def odd_weights(seed: int) -> dict[str, Tensor]:
    """float32 [9, 512] of every kind that may upset arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(9, 512, generator=generator, dtype=torch.float64)
    row = torch.rand(9, 1, generator=generator, dtype=torch.float64)
    chance = torch.rand(9, 512, generator=generator)
    outlier = normal * 1e-6
    outlier[:, 7::64] = 1e3
    kinds = {
        "wide": normal * torch.exp(8.0 * torch.randn(9, 512, generator=generator)),
        "tiny": normal * 2.0 ** (-60.0 * row),
        "denormal": normal * 2.0**-140,
        "huge": normal * 4e4,
        "outlier": outlier,
        "ties": torch.round(normal * 4.0) / 4.0,
        "signs": torch.sign(normal),
        "far off": normal * 1e-4 - 5.0,
        "sparse": normal * (chance < 0.05),
        "signed zeros": torch.where(chance < 0.5, -0.0, 0.0),
        "constant": normal[:, :1].expand(9, 512),
    }
    return {name: weight.clamp(-65504.0, 65504.0).float() for name, weight in kinds.items()}


@every_type
@settings(max_examples=6)  # of eleven matrices each
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([None, 1.5, 6.0]))
def test_the_bytes_are_torchs_on_odd_weights(type: GgmlType, seed: int, spread: float | None) -> None:
    importance = None if spread is None else column_importance(512, seed, spread)
    for name, weight in odd_weights(seed).items():
        assert torch.equal(encode(weight, type, importance), by_torch(encode, weight, type, importance)), name


@every_type
@given(weight=blocks_of_256(SPREAD + NEARLY_EXACT, -46, 5), weighted=st.booleans())
def test_the_bytes_are_torchs_on_mixed_blocks(type: GgmlType, weight: Tensor, weighted: bool) -> None:
    importance = column_importance(256, spread=4.0) if weighted else None
    assert torch.equal(encode(weight, type, importance), by_torch(encode, weight, type, importance))


@every_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_and_number_of_rows(type: GgmlType, dtype: torch.dtype) -> None:
    importance = column_importance(768)
    every_half = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    finite = every_half[every_half.isfinite()][: 80 * 768].view(80, 768)  # float16's subnormals among them
    for weight in (bell_weights(40, 768)[:37], bell_weights(2, 768)[:1], finite):
        weight = weight.clamp(-60000.0, 60000.0).to(dtype)
        assert torch.equal(encode(weight, type, importance), by_torch(encode, weight, type, importance))


def test_threads_do_not_disturb_each_other() -> None:
    weights = [bell_weights(32, 1024, seed) for seed in range(8)]
    importance = column_importance(1024)

    def encoded(weight: Tensor) -> Tensor:
        return encode(weight, GgmlType.Q4_K, importance)

    alone = list(map(encoded, weights))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(encoded, weights), alone))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """As if nothing had been loaded, from here on and after the test."""
    native._loaded.cache_clear()
    yield
    native._loaded.cache_clear()


def test_where_nothing_compiles_torch_takes_over(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight = bell_weights(3, 512)
    expected = by_torch(encode, weight, GgmlType.Q4_K)
    monkeypatch.setenv("CXX", "/bin/false")
    with caplog.at_level(logging.WARNING, "qconv"):
        assert torch.equal(encode(weight, GgmlType.Q4_K), expected)
    assert "left to torch, several times slower: /bin/false fails" in caplog.text
