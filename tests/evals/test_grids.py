"""The script that measures every grid: its model with outliers, and weights rounded in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evals import grids
from evals.grids import FACTOR, METHODS, OUTLIERS, with_outliers, write_rounded
from evals.quality import load
from qconv.core.settings import CalibrationSettings
from qconv.grids.fp4 import Mxfp4Grid, Nvfp4Grid
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


@pytest.mark.parametrize("kind", [Nvfp4Grid, Mxfp4Grid])
def test_weights_in_memory_are_on_the_grid_and_nearer_by_gptq(
    kind: type[Nvfp4Grid] | type[Mxfp4Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "CALIBRATION", CalibrationSettings(tokens=256, sequence_length=32))
    model = save_model(random_model("qwen3"), tmp_path / "model")
    ids = torch.arange(32).view(1, -1)
    distances = []
    with torch.no_grad():
        true = load(model)(ids).logits
        for method in (grids.OWN, "gptq"):
            out = write_rounded(model, kind, METHODS[method], tmp_path / method)
            distances.append(float((load(out)(ids).logits - true).norm()))
            weight = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
            # A group of sixteen has at most fifteen values: eight magnitudes with their signs, and one zero.
            assert max(len(torch.unique(group)) for group in weight.reshape(-1, 16)) <= 15
            assert len(torch.unique(weight)) > 15
    assert 0.0 < distances[1] < distances[0]
