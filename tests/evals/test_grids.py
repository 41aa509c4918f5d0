"""The script that measures every grid: its model with outliers, and builds of types that are formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evals import grids
from evals.grids import FACTOR, OUTLIERS, with_outliers
from evals.quality import load
from qconv.artifacts.build import Build
from qconv.core.settings import CalibrationSettings
from tests.conftest import random_model, save_model


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "llama"])
def test_a_model_with_outliers_is_the_same_function(model_type: str, tmp_path: Path) -> None:
    model = save_model(random_model(model_type), tmp_path / "model")
    harder = with_outliers(model, tmp_path / "outliers")
    ids = torch.arange(40).view(1, -1)
    with torch.no_grad():
        before, after = (load(folder)(ids).logits for folder in (model, harder))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    norms = [
        {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items() if "norm" in name}
        for folder in (model, harder)
    ]
    changed = [int((norms[1][name] / one == FACTOR).sum()) for name, one in norms[0].items() if "layernorm" in name]
    assert changed == [OUTLIERS] * 4


@pytest.mark.parametrize("type", grids.SAFETENSORS)
def test_types_that_are_formats_are_built_by_every_method(
    type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "CALIBRATION", CalibrationSettings(tokens=512))
    model = save_model(random_model("qwen3"), tmp_path / "model")
    for method in (grids.OWN, "matched"):
        made = Build.open(grids.build(model, type, method, tmp_path))
        assert made.format.name == grids.SAFETENSORS[type]
        assert made.method() == (("rtn",) if method == grids.OWN else ("gptq",))
