"""Tensors that a file holds otherwise: what llama.cpp multiplies with, and back to the checkpoint's."""

from __future__ import annotations

import pytest
import torch

from qconv.formats.gguf.changes import (
    Change,
    added,
    decay,
    latent_keys_and_values,
    moved_columns,
    moved_rows,
    renamed,
    with_rows_moved,
)

ORDER = torch.tensor([2, 0, 3, 1])
HEADS, KEYS, VALUES, RANK = 3, 8, 6, 10
CHANGES: dict[str, tuple[Change, tuple[int, ...]]] = {
    "norm": (added("norm.weight", (12,), 1.0), (12,)),
    "convolution": (renamed("conv1d.weight", (12, 4)), (12, 1, 4)),
    "decay": (decay("A_log", (4,)), (4,)),
    "rows": (moved_rows("z.weight", (4, 3), ORDER), (4, 3)),
    "columns": (moved_columns("out.weight", (3, 4), ORDER), (3, 4)),
    "rows of a decay": (with_rows_moved(decay("A_log", (4,)), ORDER), (4,)),
    "latent": (latent_keys_and_values("x.kv_b_proj.weight", HEADS, KEYS, VALUES, RANK), (42, RANK)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tensor_comes_back(name: str) -> None:
    change, shape = CHANGES[name]
    source = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pieces = [piece.make(source) for piece in change.pieces]
    assert [tuple(made.shape) for made in pieces] == [piece.shape for piece in change.pieces]
    # One more or an exponential in float32 costs a bit.
    torch.testing.assert_close(change.join(*pieces).reshape(shape), source, rtol=1e-6, atol=1e-6)


def test_latent_keys_are_absorbed_by_queries_and_values_come_after() -> None:
    """Scores and values of transformers' heads, computed with the file's tensors in llama.cpp's order."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(HEADS * (KEYS + VALUES), RANK, generator=generator)
    latent, queries = torch.randn(5, RANK, generator=generator), torch.randn(5, HEADS, KEYS, generator=generator)
    both = (latent @ weight.T).view(5, HEADS, KEYS + VALUES)
    keys, values = both[..., :KEYS], both[..., KEYS:]
    key_half, value_half = (piece.make(weight) for piece in CHANGES["latent"][0].pieces)
    absorbed = torch.einsum("hrk,qhk->qhr", key_half, queries)
    scores = torch.einsum("qhk,shk->hqs", queries, keys)
    torch.testing.assert_close(torch.einsum("qhr,sr->hqs", absorbed, latent), scores, rtol=1e-4, atol=1e-4)
    mixed = torch.einsum("hqs,shv->qhv", scores, values)
    of_latent = torch.einsum("hqs,sr->qhr", scores, latent)
    torch.testing.assert_close(torch.einsum("hvr,qhr->qhv", value_half, of_latent), mixed, rtol=1e-3, atol=1e-2)
