"""Modelled memory and the workers that it allows; what the other way would gain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.building.bench import SliceShape
from qconv.core.architecture import Architecture
from qconv.models import architecture
from qconv.planning import costs as module
from qconv.planning.alternatives import other_way
from qconv.planning.costs import Costs, Demand, demand_of, demand_of_gguf, demand_of_passing
from qconv.planning.gguf_recipe import GgufCalibrationSettings, GgufRecipe
from qconv.planning.plan import make_plan
from qconv.planning.recipe import load_recipe

GIB = 2**30
SIZES = st.integers(0, 10 * GIB)


@pytest.fixture(scope="module")
def coder() -> Architecture:
    """Two layers of Qwen3-Coder-480B's shapes."""
    return architecture(SliceShape().config(2, 160))


def demand(coder: Architecture, name: str, **changes: Any) -> Demand:
    return demand_of(make_plan(coder, load_recipe(name, changes), lambda _: torch.bfloat16))


@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 100 * GIB), st.integers(1, 256))
def test_what_memory_allows_fits_into_it(
    base: int, alone: int, shared: int, each: int, available: int, most: int
) -> None:
    found = Demand(base, alone, shared, each)
    workers = found.workers(available, most)
    assert 1 <= workers <= most
    if workers > 1 and each:
        assert base + shared + workers * each <= available
    if workers < most:
        assert base + shared + (workers + 1) * each > available


def test_all_processors_are_used_where_memory_is_plenty(coder: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 cores and half a terabyte: more than the 8 workers that were once the most."""
    for name in ("awq", "gptq", "w4a16", "fp8"):
        assert demand(coder, name).workers(512 * GIB, 64) == 64
    assert demand(coder, "gptq").workers(16 * GIB, 64) < 16
    monkeypatch.setattr(module, "processors", lambda: 64)
    monkeypatch.setattr(module, "available_memory", lambda: 24 * GIB)
    taken = Costs.of(demand(coder, "gptq"), 0)
    assert 4 <= taken.workers < 64
    assert taken.memory <= 24 * GIB
    monkeypatch.setattr(module, "available_memory", lambda: None)
    assert Costs.of(demand(coder, "gptq"), 0).workers == 64


def test_what_takes_more_is_modelled_as_more(coder: Architecture) -> None:
    rounding, gptq = demand(coder, "w4a16", method="rtn"), demand(coder, "gptq")
    plain = demand(coder, "gptq", **{"calibration.propagate": True})
    assert rounding.at(2) < demand(coder, "awq", method="awq").at(2) < plain.at(2) < gptq.at(2)
    text = GgufCalibrationSettings()
    alone, calibrated = GgufRecipe(type="Q4_K_M"), GgufRecipe(type="Q4_K_M", calibration=text)
    collected = GgufRecipe(type="Q4_K_M", method=("rtn",), calibration=text)
    sizes = [demand_of_gguf(coder, one).at(2) for one in (alone, collected, calibrated)]
    assert sizes == sorted(sizes)
    assert demand_of_gguf(coder, collected) == demand_of_passing(coder)
    # Measured on this machine's two processors: 0.49, 2.8 and 4.7 GiB (docs/evidence/scale.md).
    assert 0.4 * GIB < rounding.at(2) < 1.5 * GIB
    assert 4.0 * GIB < gptq.at(2) < 8.0 * GIB


def test_builds_of_one_run_share_what_is_held() -> None:
    assert Demand(1, 2, 3, 4).beside(Demand(2, 1, 5, 3)) == Demand(2, 2, 5, 4)


def test_the_other_way_is_said_where_it_was_measured() -> None:
    assert "0.32 of the divergence" in (other_way(GgufRecipe(type="Q4_K_M")) or "")
    assert "--method rtn: 3.1 times" in (other_way(GgufRecipe(type="Q4_K_M", method=("gptq",))) or "")
    assert "4.5 times" in (other_way(load_recipe("awq")) or "")
    assert "0.40 of" in (other_way(load_recipe("fp8")) or "")
    mixed = load_recipe("w4a16", {"rules": [{"match": "o_proj", "grid": "int8"}]})
    for recipe in (GgufRecipe(type="BF16"), load_recipe("fp8-static"), load_recipe("w4a16", {"grid.bits": 8}), mixed):
        assert other_way(recipe) is None
