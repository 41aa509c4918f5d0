"""Inputs rounded in groups: against the definitions in NumPy, one expert by hand, whole models and streamed ones.

``tests/interop/test_fp4.py`` compares the same with compressed-tensors' own code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import qconv
from qconv.core.architecture import Moe
from qconv.grids.nearest import E2M1, E4M3
from qconv.planning.recipe import load_recipe
from qconv.runtime.files import open_files
from qconv.runtime.grouped_activations import MicroscalingRounding, Nvfp4Rounding
from qconv.runtime.modules import PackedExperts
from qconv.runtime.stream import stream_logits
from tests.conftest import build, random_model, save_model

FEW: dict[str, Any] = {"calibration.tokens": 512, "calibration.sequence_length": 64, "method": "rtn"}
RECIPES: dict[str, dict[str, Any]] = {"nvfp4-w4a4": FEW, "nvfp4-modelopt": FEW, "mxfp8": {"method": "rtn"}}
VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp4(multiples: Any) -> Any:
    """The nearest E2M1 numbers by distance, ties to the even code."""
    off = np.abs(np.abs(multiples)[..., None] - VALUES)
    nearest = off == off.min(-1, keepdims=True)
    code = np.where(nearest[..., ::2].any(-1), 2 * nearest[..., ::2].argmax(-1), nearest.argmax(-1))
    return np.sign(multiples) * VALUES[code]


@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-4, 1.0, 1e3]))
def test_nvfp4_scales_each_group_by_e4m3_times_the_stored_scale(seed: int, size: float) -> None:
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)) ** 3 * size
    shared = 2.0 ** np.floor(np.log2(float(inputs.abs().max()) / 2688.0))
    rounded = Nvfp4Rounding(scale=torch.tensor(shared, dtype=torch.float64))(inputs)
    groups = inputs.view(5, 4, 16)
    scales = (groups.abs().amax(2) / 6.0 / shared).clamp(max=448.0).to(torch.float8_e4m3fn).double()
    steps = scales.masked_fill(scales == 0.0, 0.125).numpy()[..., None] * shared
    multiples = np.clip(groups.double().numpy() / steps, -6.0, 6.0)
    expected = (fp4(multiples) * steps).reshape(5, 64)
    # The division is one of float32 there: what lies within its error of a tie may go either way.
    ties = np.abs(np.abs(multiples)[..., None] - (VALUES[1:] + VALUES[:-1]) / 2.0).min(-1).reshape(5, 64) < 1e-6
    assert np.array_equal(rounded.double().numpy()[~ties], expected[~ties])


@pytest.mark.parametrize(("floats", "highest", "least"), [(E2M1, 6.0, 3.5), (E4M3, 448.0, 224.0)])
@given(seed=st.integers(0, 10**6), power=st.integers(-60, 60))
def test_microscaling_puts_the_largest_near_the_highest(
    floats: Any, highest: float, least: float, seed: int, power: int
) -> None:
    inputs = torch.randn(3, 96, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    rounded = MicroscalingRounding(32, floats=floats)(inputs)
    largest = inputs.view(3, 3, 32).abs().amax(2, keepdim=True).double()
    step = torch.exp2(torch.floor(torch.log2(largest / 1.75)) + (1.0 - (2.0 if floats is E2M1 else 8.0)))
    multiples = largest / step
    assert bool((multiples >= least).all())
    assert bool((multiples < 2.0 * least).all())
    values = (rounded.view(3, 3, 32).double() / step).float()
    assert torch.equal(floats(values.clone(), 0), values)
    assert float(values.abs().max()) <= highest
    off = (rounded - inputs).abs().view(3, 3, 32) / step
    # Half a step at the top; what is beyond the highest is cut off.
    half = torch.tensor(1.0 if floats is E2M1 else 16.0)
    assert bool((off <= torch.maximum(multiples - highest, half)).all())


def test_zeros_stay() -> None:
    zeros = torch.zeros(2, 64)
    assert torch.equal(Nvfp4Rounding(scale=torch.tensor(0.5))(zeros), zeros)
    assert torch.equal(MicroscalingRounding(32)(zeros), zeros)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Builds of a small model; do not write to them."""
    folder = tmp_path_factory.mktemp("grouped")
    source = save_model(random_model("qwen3_moe"), folder / "model")
    for name, changes in RECIPES.items():
        build(source, folder / name, load_recipe(name, changes))
    return {name: folder / name for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_an_expert_rounds_before_each_of_its_linears(name: str, builds: dict[str, Path]) -> None:
    files = open_files(builds[name])
    moe = files.architecture.layers[0].mlp
    assert isinstance(moe, Moe)
    model = qconv.load(builds[name], backend="reference", dtype=torch.float32, round_inputs=True)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, PackedExperts)
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))

    def linear(which: Any, values: Tensor) -> Tensor:
        rounding = files.input_rounding(which)
        assert isinstance(rounding, MicroscalingRounding if name == "mxfp8" else Nvfp4Rounding)
        return functional.linear(rounding(values), files.weight(which).dequantize(torch.float32))

    mlp = moe.experts[1]
    expected = linear(mlp.down, functional.silu(linear(mlp.gate, inputs)) * linear(mlp.up, inputs))
    found = experts(inputs, torch.ones(5, 1, dtype=torch.int64), torch.ones(5, 1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


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
    assert float((rounded - exact).abs().max()) > 1e-4 * size
