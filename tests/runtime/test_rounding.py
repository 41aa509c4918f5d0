"""The yardstick of ``tests.runtime.rounding`` passes a model in bf16, and sees what is more than rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qconv
from qconv.runtime.dense import write_dense
from qconv.runtime.modules import PackedExperts
from tests.runtime.rounding import Routing, assert_within_bf16_rounding, excess, forward, routers

IDS = torch.randint(3, 2048, (8, 48), generator=torch.Generator().manual_seed(0))


def swap_experts(model: Any) -> None:
    experts: Any = next(module for module in model.modules() if isinstance(module, PackedExperts))
    operator, other = experts.operator, torch.tensor([0, 2, 1, *range(3, 6)])
    experts.operator = lambda inputs, chosen, weights: operator(inputs, other[chosen], weights)


def scale_a_row_of_the_router(model: Any) -> None:
    weight: Any = routers(model)[1].weight
    weight.data[2] *= 1.1


def scale_the_last_norm(model: Any) -> None:
    model.model.norm.weight.data *= 1.02


@pytest.fixture(scope="module")
def models(awq_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The dequantized model in bf16 and in float32."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("rounding") / "dense"
    write_dense(awq_build, folder, torch.float32)
    loaded: Any = AutoModelForCausalLM
    rounded, exact = (loaded.from_pretrained(folder, dtype=dtype).eval() for dtype in (torch.bfloat16, torch.float32))
    return rounded, exact


@pytest.mark.parametrize("damage", [swap_experts, scale_a_row_of_the_router, scale_the_last_norm])
def test_damage_is_more_than_rounding(damage: Callable[[Any], None], awq_build: Path, models: tuple[Any, Any]) -> None:
    packed = qconv.load(awq_build, dtype=torch.bfloat16)
    assert_within_bf16_rounding(packed, *models, IDS)
    damage(packed)
    with pytest.raises(AssertionError, match=r"logits|router"):
        assert_within_bf16_rounding(packed, *models, IDS)


def test_replayed_experts_are_the_ones_that_compute(awq_build: Path, models: tuple[Any, Any]) -> None:
    """Replaying a model's own routing changes nothing; replaying another's does."""
    exact = models[1]
    free = forward(exact, IDS)
    assert torch.equal(forward(exact, IDS, free.routings).logits, free.logits)
    other = [Routing(one.inputs, one.logits, (one.chosen + 1) % one.logits.shape[1]) for one in free.routings]
    assert not torch.allclose(forward(exact, IDS, other).logits, free.logits, rtol=0.1)


def test_only_a_near_tie_is_excused() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    inputs = torch.tensor([[1.0, 0.99], [1.0, 0.5], [1.0, 0.5]])
    logits = inputs @ weight.t()
    wanted = Routing(inputs, logits, torch.tensor([[0], [0], [0]]))
    got = Routing(inputs, logits, torch.tensor([[1], [1], [0]]))
    # Two exchanges: a gap of 0.01 where rounding reaches 0.01 * 1.99 + 1.99 / 256, and one of 0.5.
    near, far = excess(got, wanted, weight, 0.01)
    assert near == pytest.approx(0.01 / (0.0199 + 1.99 / 256))
    assert far == pytest.approx(0.5 / (0.015 + 1.5 / 256))
