"""The dense model that starts as parts of the bundled one."""

from __future__ import annotations

import torch

from evals.dense_model import BATCH, EXPERTS, LENGTH, batches, begun
from evals.options import TINY
from evals.quality import load


def test_it_begins_with_the_bundled_models_attention_and_four_of_its_experts() -> None:
    source = load(TINY)
    model = begun(source)
    ids = torch.arange(100, 140).view(1, -1)
    with torch.no_grad():
        assert torch.equal(
            model.model.layers[0].self_attn.q_proj.weight, source.model.layers[0].self_attn.q_proj.weight
        )
        normed = torch.randn(7, source.config.hidden_size)
        experts = source.model.layers[1].mlp.experts
        halves = [experts.gate_up_proj[number].chunk(2) for number in range(experts.num_experts)]
        outputs = [
            (torch.nn.functional.silu(normed @ gate.t()) * (normed @ up.t())) @ down.t()
            for (gate, up), down in zip(halves, experts.down_proj, strict=True)
        ]
        made = EXPERTS * model.model.layers[1].mlp(normed)
        # The sum of four of the experts: least squares finds them and nothing else.
        shares = torch.linalg.lstsq(
            torch.stack([one.flatten() for one in outputs], 1).double(), made.flatten().double()
        )
        assert sorted(shares.solution.round(decimals=3).tolist()) == [0.0] * (16 - EXPERTS) + [1.0] * EXPERTS
        assert model(ids).logits.shape == source(ids).logits.shape


def test_batches_are_windows_and_the_same_every_time() -> None:
    tokens = torch.arange(5000)
    first, again = next(batches(tokens)), next(batches(tokens))
    assert torch.equal(first, again)
    assert first.shape == (BATCH, LENGTH + 1)
    assert bool((first.diff(dim=1) == 1).all())
