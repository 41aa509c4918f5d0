"""Inputs rounded as engines round them: against E4M3 by hand, one expert by hand, and whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import qconv
from qconv.core.architecture import Moe
from qconv.planning.recipe import load_recipe
from qconv.runtime.activations import ActivationScheme, InputRounding
from qconv.runtime.engine_rounding import rounds_inputs
from qconv.runtime.files import open_files
from qconv.runtime.modules import PackedExperts
from qconv.runtime.stream import stream_logits
from tests.conftest import build, random_model, save_model

FEW: dict[str, Any] = {"calibration.tokens": 512, "calibration.sequence_length": 64}
ROUNDED: dict[str, Any] = {"method": "rtn"}
RECIPES: dict[str, dict[str, Any]] = {"fp8": {}, "fp8-dynamic": {}, "fp8-static": FEW, "w8a8": ROUNDED, "w4a8": ROUNDED}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The builds of a small model that round inputs; do not write to them."""
    folder = tmp_path_factory.mktemp("rounded")
    source = save_model(
        random_model("qwen3_moe", hidden_size=256, moe_intermediate_size=128, head_dim=128), folder / "model"
    )
    for name, changes in RECIPES.items():
        build(source, folder / name, load_recipe(name, changes))
    return {name: folder / name for name in ("model", *RECIPES)}


def by_hand(value: float, step: float) -> float:
    """``value`` on E4M3's numbers times ``step``: three bits of fraction, ties to even."""
    scaled = min(448.0, abs(value) / step)
    exponent = max(-6, int(torch.frexp(torch.tensor(scaled, dtype=torch.float64)).exponent) - 1)
    unit = 2.0 ** (exponent - 3)
    return float(torch.round(torch.tensor(scaled / unit, dtype=torch.float64))) * unit * step * (1 if value > 0 else -1)


@given(st.integers(0, 2**32 - 1))
def test_each_token_has_a_scale_of_its_own(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3, 8, generator=generator) * 10.0 ** torch.randint(-2, 4, (3, 1), generator=generator)
    found = InputRounding()(inputs)
    for row, rounded in zip(inputs.tolist(), found.tolist(), strict=True):
        step = float(torch.tensor(max(map(abs, row))) / 448.0)
        assert rounded == pytest.approx([by_hand(one, step) for one in row], rel=1e-6)
    torch.testing.assert_close(InputRounding()(found), found, rtol=1e-6, atol=0.0)


@given(st.integers(0, 2**32 - 1))
def test_integers_reach_to_the_largest_of_each_token(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3, 8, generator=generator) * 10.0 ** torch.randint(-2, 4, (3, 1), generator=generator)
    found = InputRounding(number="int")(inputs)
    for row, rounded in zip(inputs.double(), found.double(), strict=True):
        step = float(row.abs().max()) / 127.0
        torch.testing.assert_close(rounded, torch.round(row / step) * step, rtol=1e-6, atol=0.0)
        assert float(rounded.abs().max()) == pytest.approx(float(row.abs().max()), rel=1e-6)  # 127 steps, not 127.5
    assert InputRounding(number="int")(torch.zeros(2, 4)).abs().max() == 0.0
    assert InputRounding(number="int")(inputs.bfloat16()).dtype == torch.bfloat16


def test_groups_and_stored_scales() -> None:
    inputs = torch.tensor([[448.0, 16.7, 0.448, 0.0167]])
    torch.testing.assert_close(InputRounding(group=2)(inputs), torch.tensor([[448.0, 16.0, 0.448, 0.016]]))
    static = InputRounding(scale=torch.tensor(0.5))
    torch.testing.assert_close(static(torch.tensor([[1000.0, 8.6, -3.0]])), torch.tensor([[224.0, 9.0, -3.0]]))
    assert InputRounding()(torch.zeros(2, 4)).abs().max() == 0.0
    assert InputRounding()(inputs.bfloat16()).dtype == torch.bfloat16


def test_what_config_json_says() -> None:
    native = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 64]}
    assert ActivationScheme.parse(native) == ActivationScheme(64)
    assert ActivationScheme.parse(native | {"activation_scheme": "static"}) == ActivationScheme(64, static=True)

    def group(**values: Any) -> dict[str, Any]:
        inputs = {"type": "float", "num_bits": 8, "dynamic": True, **values}
        return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"input_activations": inputs}}}

    assert ActivationScheme.parse(group(strategy="token")) == ActivationScheme()
    assert ActivationScheme.parse(group(strategy="group", group_size=128)) == ActivationScheme(128)
    assert ActivationScheme.parse(group(strategy="tensor", dynamic=False)) == ActivationScheme(static=True)
    for other in (group(strategy="token", num_bits=4), group(strategy="group", group_size="x"), group(strategy="new")):
        assert ActivationScheme.parse(other) is None
    hostile: tuple[Any, ...] = ({}, {"config_groups": 3}, {"config_groups": {"a": 1}}, {"quant_method": "awq"})
    assert [ActivationScheme.parse(one) for one in hostile] == [None] * 4
    assert ActivationScheme(128).of(None, 130) is None
    assert ActivationScheme(static=True).of(None, 128) is None


@pytest.mark.parametrize("name", RECIPES)
def test_an_expert_rounds_before_each_of_its_linears(name: str, builds: dict[str, Path]) -> None:
    files = open_files(builds[name])
    assert rounds_inputs(files)
    moe = files.architecture.layers[0].mlp
    assert isinstance(moe, Moe)
    model = qconv.load(builds[name], backend="reference", dtype=torch.float32, round_inputs=True)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, PackedExperts)
    inputs = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    chosen, weights = torch.ones(5, 1, dtype=torch.int64), torch.ones(5, 1)

    def linear(which: Any, values: Tensor) -> Tensor:
        rounding = files.input_rounding(which)
        assert rounding is not None
        assert (rounding.scale is not None) == (name == "fp8-static")
        assert rounding.group == (128 if name == "fp8" else None)
        assert rounding.number == ("int" if name == "w8a8" else "e4m3")
        return functional.linear(rounding(values), files.weight(which).dequantize(torch.float32))

    mlp = moe.experts[1]
    expected = linear(mlp.down, functional.silu(linear(mlp.gate, inputs)) * linear(mlp.up, inputs))
    torch.testing.assert_close(experts(inputs, chosen, weights), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_whole_models_and_streamed_ones_round_alike(name: str, builds: dict[str, Path]) -> None:
    ids = torch.randint(3, 200, (1, 24), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"dtype": torch.float32, "backend": "reference"}
    with torch.inference_mode():
        exact, rounded = (
            qconv.load(builds[name], round_inputs=one, **options)(input_ids=ids).logits[0] for one in (False, True)
        )
    (streamed,) = stream_logits(builds[name], [ids[0]], round_inputs=True, **options)
    size = float(exact.abs().max())
    # A value that lies on a tie may be rounded the other way; all others agree to float32.
    assert float((streamed - rounded).abs().median()) < 1e-5 * size
    assert 1e-4 * size < float((rounded - exact).abs().max()) < 0.5 * size
    for linear in ("q_proj", "o_proj"):
        module = qconv.load(builds[name], round_inputs=True, **options).model.layers[0].self_attn.get_submodule(linear)
        assert len(module._forward_pre_hooks) == 1


def test_other_builds_round_nothing(builds: dict[str, Path], rtn_build: Path) -> None:
    assert not rounds_inputs(open_files(builds["model"]))
    assert not rounds_inputs(open_files(rtn_build))
