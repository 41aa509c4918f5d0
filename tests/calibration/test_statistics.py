"""Input statistics against dense formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.calibration.statistics import MAX_BLOCK, InputStatistics, block_width


def dense_gram(inputs: Tensor, width: int) -> Tensor:
    """The diagonal blocks of X^T X / tokens, from the whole matrix in float64."""
    whole = inputs.double().t() @ inputs.double() / len(inputs)
    starts = range(0, inputs.shape[1], width)
    return torch.stack([whole[start : start + width, start : start + width] for start in starts])


def gather(inputs: Tensor, width: int, windows: list[int] | None = None) -> InputStatistics:
    """Statistics of inputs that come in windows."""
    statistics = InputStatistics.empty(inputs.shape[1], width)
    for part in torch.split(inputs, windows or [len(inputs)]):
        statistics.update(part)
    return statistics


def assert_close(found: Tensor, expected: Tensor) -> None:
    """float32 sums of a few hundred terms."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


INPUTS = st.builds(
    lambda tokens, blocks, width, seed, scale: (
        torch.randn(tokens, blocks * width, generator=torch.Generator().manual_seed(seed)) * scale,
        width,
    ),
    st.integers(1, 60),
    st.integers(1, 4),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 1e3]),
)


@given(INPUTS, st.data())
def test_running_means_are_the_means_of_everything(case: tuple[Tensor, int], data: st.DataObject) -> None:
    inputs, width = case
    cut = data.draw(st.integers(0, len(inputs)))
    statistics = gather(inputs, width, [cut, len(inputs) - cut])  # either may be empty
    assert statistics.tokens == len(inputs)
    assert_close(statistics.gram, dense_gram(inputs, width))
    assert_close(statistics.magnitude, inputs.double().abs().mean(0))


def test_a_long_run_keeps_its_scale() -> None:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics.empty(8, 4)
    for _ in range(500):
        statistics.update(inputs)
    assert statistics.tokens == 32_000
    assert_close(statistics.gram, dense_gram(inputs, 4))


@given(INPUTS, st.integers(0, 200), st.integers(0, 10**6))
def test_shrinkage_is_the_designs_formula(case: tuple[Tensor, int], strength: int, seed: int) -> None:
    inputs, width = case
    layer = torch.randn(50, inputs.shape[1], generator=torch.Generator().manual_seed(seed))
    own, shared = gather(inputs, width), gather(layer, width)
    n, k = len(inputs), strength
    shrunk = own.shrunk(shared, float(strength))
    # H = (n H_e + k H_layer) / (n + k)
    assert_close(shrunk.gram, (n * dense_gram(inputs, width) + k * dense_gram(layer, width)) / (n + k))
    assert_close(shrunk.magnitude, (n * inputs.double().abs().mean(0) + k * layer.double().abs().mean(0)) / (n + k))
    assert shrunk.tokens == n + k
    assert_close(shared.gram, dense_gram(layer, width))  # others shrink toward it, too
    assert shrunk.gram.data_ptr() == own.gram.data_ptr() or n + k == 0 or not own.gram.numel()  # not held twice


@given(st.integers(1, 60), st.integers(0, 10**6))
def test_a_drift_of_few_tokens_counts_little(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, reference = torch.randn(2, tokens, 12, generator=generator)
    statistics = InputStatistics.empty(12, 12, drift=True)
    statistics.update(inputs, reference=reference)
    statistics.shrink_drift()
    assert statistics.drift is not None
    drift = (reference - inputs).double().T @ inputs.double() / tokens
    assert_close(statistics.drift, drift * tokens / (tokens + 12))


def test_no_drift_is_left_alone() -> None:
    inputs = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    without, untouched = gather(inputs, 12), InputStatistics.empty(12, 12, drift=True)
    without.shrink_drift()
    assert without.drift is None
    untouched.shrink_drift()
    assert untouched.drift is not None
    assert_close(untouched.drift, torch.zeros(12, 12))


@pytest.mark.parametrize("strength", [0.0, 64.0])
def test_without_tokens_of_its_own_an_expert_has_the_layers_statistics(strength: float) -> None:
    layer = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    shrunk = InputStatistics.empty(8, 4).shrunk(gather(layer, 4), strength)
    assert_close(shrunk.gram, dense_gram(layer, 4))
    assert_close(shrunk.magnitude, layer.double().abs().mean(0))


@given(INPUTS, st.integers(0, 10**6))
def test_rescaled_statistics_are_those_of_rescaled_inputs(case: tuple[Tensor, int], seed: int) -> None:
    inputs, width = case
    scale = torch.exp2(torch.randint(-3, 4, (inputs.shape[1],), generator=torch.Generator().manual_seed(seed)).float())
    rescaled = gather(inputs, width).rescaled(scale)
    assert_close(rescaled.gram, dense_gram(inputs / scale, width))
    assert_close(rescaled.magnitude, (inputs / scale).double().abs().mean(0))


@pytest.mark.parametrize(
    ("in_features", "group", "width"),
    [
        (256, 128, 128),
        (256, 32, 32),
        (6144, 6144, MAX_BLOCK),
        (2560, 2560, MAX_BLOCK),
        (3 * 13 * 79, 3 * 13 * 79, 3 * 79),
        (520, 520, 260),
    ],
)
def test_blocks_are_groups_or_the_widest_divisor_below_the_bound(in_features: int, group: int, width: int) -> None:
    assert block_width(in_features, group) == width
    assert in_features % width == 0


def test_narrow_blocks_are_cut_out_of_wide_ones() -> None:
    inputs = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))

    def seen(width: int) -> InputStatistics:
        statistics = InputStatistics.empty(24, width)
        statistics.update(inputs)
        return statistics

    for wide, narrow in ((24, 8), (24, 1), (12, 4), (8, 8)):
        torch.testing.assert_close(seen(wide).diagonal(narrow), seen(narrow).gram)
    assert seen(24).diagonal(0).numel() == 0
    # Without second moments, folding scales has none to change.
    assert seen(0).rescaled(torch.full((24,), 2.0)).gram.numel() == 0
