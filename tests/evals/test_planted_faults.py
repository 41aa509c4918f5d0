"""Faults planted into checkpoints and builds are found in every type; and where they are not, that shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evals import planted_faults
from evals.families import VOCABULARY
from evals.model_types import save_random
from evals.planted_faults import Missed, planted, tensors_of, written
from qconv.artifacts.source import Source
from qconv.verification.outcome import Verification
from tests.models.discovery.test_fitting import FITTING

EVERY_TIME = ("glm4_moe", "llama4_text", "minimax_m2", "mistral")
"""Of each layout one; `make families` goes through the others, too."""
KINDS = [pytest.param(one, marks=() if one in EVERY_TIME else pytest.mark.slow) for one in FITTING]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random checkpoint of a type; do not write to it."""
    made: dict[str, Path] = {}

    def save(model_type: str) -> Path:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type) / "model"
            made[model_type] = save_random(model_type, folder, torch.bfloat16, VOCABULARY)
        return made[model_type]

    return save


@pytest.mark.parametrize("model_type", KINDS)
def test_every_fault_is_found_and_named(saved: Callable[[str], Path], tmp_path: Path, model_type: str) -> None:
    assert planted(saved(model_type), tmp_path) > 10


def test_a_reader_that_takes_everything_is_told(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untyped: Any = planted_faults
    real, model = Source.open, saved("mistral")
    monkeypatch.setattr(untyped.Source, "open", lambda path: real(model))
    with pytest.raises(Missed, match=r"a missing expert: .*down_proj"):
        planted(model, tmp_path)


def test_a_verification_that_finds_nothing_is_told(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted_faults, "verify", lambda *_, **__: Verification())
    with pytest.raises(Missed, match="gate_proj"):
        planted(saved("mistral"), tmp_path)


def test_a_tensor_that_is_lost_is_told(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untyped: Any = planted_faults
    real = untyped.quantize

    def losing(model: Path, out: Path, *arguments: object, **options: object) -> object:
        made: object = real(model, out, *arguments, **options)
        tensors = tensors_of(out)
        del tensors["model.layers.1.input_layernorm.weight"]
        written(out, tensors)
        return made

    monkeypatch.setattr(planted_faults, "quantize", losing)
    with pytest.raises(Missed, match=r"layers\.1\.input_layernorm\.weight is not in the build"):
        planted(saved("mistral"), tmp_path)
