"""Rows sorted by expert into tiles: every row once, each tile of one expert, whatever the experts' shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.runtime.backends.cuda.products import Rows
from qconv.runtime.backends.cuda.routing import route


def assert_routed(chosen: Tensor, experts: int, rows: Rows) -> None:
    """What the kernels rely on."""
    flat = chosen.flatten()
    assert rows.ids is not None
    assert rows.experts is not None
    assert rows.count == len(flat)
    assert rows.per_input == chosen.shape[1]
    ids = rows.ids.view(-1, rows.tile)
    assert len(ids) == len(rows.experts) == rows.tiles
    real = ids[ids < rows.count]
    assert torch.equal(real.sort().values, torch.arange(rows.count, dtype=torch.int32))  # each once
    for tile, expert in zip(ids, rows.experts.tolist(), strict=True):
        members = tile[tile < rows.count].long()
        if expert == -1:
            assert not len(members)
        else:
            assert len(members)
            assert bool((flat[members] == expert).all())
            assert bool((tile[: len(members)] < rows.count).all())  # padding comes last


@given(st.integers(1, 12), st.integers(1, 70), st.data())
def test_any_choice(experts: int, tokens: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    favour = torch.rand(experts, generator=generator) ** data.draw(st.integers(0, 20))
    chosen = (torch.rand(tokens, experts, generator=generator) * favour).topk(top_k).indices
    assert_routed(chosen, experts, route(chosen, experts))


@pytest.mark.parametrize(("tokens", "tile"), [(1, 8), (64, 8), (65, 16), (200, 32), (5000, 64)])
def test_tiles_suit_the_mean_share(tokens: int, tile: int) -> None:
    chosen = torch.arange(tokens).view(-1, 1) % 8
    assert route(chosen, 8).tile == tile


def test_one_hot_expert_and_empty_ones() -> None:
    chosen = torch.full((100, 1), 3)
    rows = route(chosen, 160)
    assert_routed(chosen, 160, rows)
    assert rows.experts is not None
    assert set(rows.experts.tolist()) <= {3, -1}
